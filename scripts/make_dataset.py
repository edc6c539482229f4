#!/usr/bin/env python
"""Writes vramplan/data/builtin/arithmetic.jsonl: questions about training memory, answered by the calculator.

usage: python scripts/make_dataset.py [FILE]

Every number in an answer is computed by vramplan's own functions, so the set is as right as they are.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from vramplan.facts.architecture import Role
from vramplan.facts.catalogue import find_model
from vramplan.facts.dtype import Dtype
from vramplan.facts.families import architecture_from_config
from vramplan.spec.layout import shard
from vramplan.units import format_bytes, format_count

TARGET = Path(__file__).parent.parent / "vramplan" / "data" / "builtin" / "arithmetic.jsonl"
ADAMW_MOMENTS = 2
SIZES = (0.135, 0.5, 1, 1.5, 3, 7, 7.6, 8, 13, 14, 27, 32, 70)
"""Billions of parameters."""
RANKS = (1, 2, 4, 8, 16, 32, 64)
MODELS = (
    "HuggingFaceTB/SmolLM2-135M",
    "meta-llama/Llama-3.2-1B-Instruct",
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B",
    "mistralai/Mistral-7B-v0.1",
    "Qwen/Qwen2.5-0.5B",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-4B",
    "Qwen/Qwen3-8B",
    "openai-community/gpt2",
)
OPTIMIZER = "AdamW's states"
SHARDED_FROM = {OPTIMIZER: 1, "gradients": 2, "weights": 3}
"""The ZeRO stage from which each is divided among the ranks."""
Pair = tuple[str, str]
T = TypeVar("T")


def rows() -> list[dict[str, list[dict[str, str]]]]:
    """All rows, in ``messages`` form; the same on every call."""
    pairs = itertools.chain(
        adamw_states(),
        weights(),
        gradients(),
        whole_state(),
        model_counts(),
        lora(),
        logits(),
        batches(),
        layer_inputs(),
    )
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in pairs
    ]


def adamw_states() -> Iterator[Pair]:
    width = ADAMW_MOMENTS * Dtype.FP32.nbytes
    for size, stage, ranks in every(2, itertools.product(SIZES, (0, 1, 2, 3), RANKS[1:])):
        question = (
            f"How many bytes do AdamW's states of {billions(size)} model take under ZeRO-{stage} on {ranks} GPUs?"
            if (stage + ranks) % 3
            else f"With AdamW and ZeRO-{stage} on {ranks} GPUs, "
            f"how large are the optimizer states of {billions(size)} model on one GPU?"
        )
        yield question, sharded(OPTIMIZER, numel(size), width, "two fp32 moments", stage, ranks)


def gradients() -> Iterator[Pair]:
    for size, stage, ranks in every(11, itertools.product(SIZES, (0, 1, 2, 3), RANKS[1:])):
        question = (
            f"How much memory do the bf16 gradients of {billions(size)} model need per GPU, ZeRO-{stage}, {ranks} GPUs?"
        )
        yield question, sharded("gradients", numel(size), Dtype.BF16.nbytes, "one bf16 value", stage, ranks)


def weights() -> Iterator[Pair]:
    for size, dtype in itertools.product(SIZES, (Dtype.BF16, Dtype.FP32)):
        count = numel(size)
        yield (
            f"How large are the weights of {billions(size)} model in {dtype.value}?",
            (
                f"{dtype.value} takes {dtype.nbytes} bytes a weight: {format_count(count)} x {dtype.nbytes} = "
                f"{amount(count * dtype.nbytes)}."
            ),
        )
    for size, stage, ranks in every(7, itertools.product(SIZES, (2, 3), RANKS[1:])):
        question = (
            f"What do the bf16 weights of {billions(size)} model take on each of {ranks} GPUs under ZeRO-{stage}?"
        )
        yield question, sharded("weights", numel(size), Dtype.BF16.nbytes, "one bf16 value", stage, ranks)


def whole_state() -> Iterator[Pair]:
    """bf16 weights and gradients, and in fp32 the master weights and both moments."""
    per_parameter = {
        "weights": Dtype.BF16.nbytes,
        "gradients": Dtype.BF16.nbytes,
        OPTIMIZER: (1 + ADAMW_MOMENTS) * Dtype.FP32.nbytes,
    }
    for size, stage, ranks in every(6, itertools.product(SIZES, (0, 1, 2, 3), RANKS[2:])):
        count = numel(size)
        held = {name: shard(count, divisor(name, stage, ranks)) * width for name, width in per_parameter.items()}
        divided = [name for name in per_parameter if divisor(name, stage, ranks) > 1]
        yield (
            (
                f"What does full bf16 training of {billions(size)} model with AdamW hold on each of {ranks} GPUs "
                f"at ZeRO-{stage}, activations apart?"
            ),
            (
                f"Weights {per_parameter['weights']}, gradients {per_parameter['gradients']}, "
                f"master weights and moments {per_parameter[OPTIMIZER]} bytes a parameter. ZeRO-{stage} divides "
                f"{' and '.join(divided) or 'nothing'}. That is {amount(sum(held.values()))} on each GPU."
            ),
        )


def model_counts() -> Iterator[Pair]:
    for name in MODELS:
        architecture = architecture_from_config(find_model(name).config)
        count, short = architecture.num_params, name.split("/")[-1]
        embedding = architecture.params_by_role[Role.EMBEDDING]
        yield f"How many parameters has {short}?", f"{short} has {count:,} parameters ({format_count(count)})."
        yield (
            f"How many of {short}'s parameters are embeddings?",
            f"{embedding:,} of {count:,}: {embedding / count:.1%}.",
        )
        yield (
            f"How large are the weights of {short} in bf16?",
            f"{count:,} parameters x {Dtype.BF16.nbytes} bytes = {amount(count * Dtype.BF16.nbytes)}.",
        )
        per_layer = sum(tensor.numel for tensor in architecture.layers[0].tensors())
        yield (
            f"How many layers has {short}, and how many parameters has one?",
            f"{architecture.num_layers} layers of {per_layer:,} parameters each.",
        )


def lora() -> Iterator[Pair]:
    for (fan_in, fan_out), rank in itertools.product(
        ((576, 576), (2048, 8192), (4096, 4096), (4096, 14336), (8192, 28672)), (4, 8, 16, 64)
    ):
        count = rank * (fan_in + fan_out)
        yield (
            f"How many parameters does a LoRA adapter of rank {rank} add to a linear layer of {fan_in} x {fan_out}?",
            (
                f"A is {rank} x {fan_in} and B is {fan_out} x {rank}: "
                f"{rank} x ({fan_in} + {fan_out}) = {count:,} parameters."
            ),
        )


def logits() -> Iterator[Pair]:
    for name, tokens in itertools.product(MODELS[1::2], (512, 2048, 4096, 8192)):
        vocab, short = architecture_from_config(find_model(name).config).vocab_size, name.split("/")[-1]
        width = Dtype.FP32.nbytes
        yield (
            f"How large are {short}'s logits of {tokens} tokens in fp32?",
            f"{tokens} tokens x {vocab:,} words x {width} bytes = {amount(tokens * vocab * width)}.",
        )


def batches() -> Iterator[Pair]:
    for micro, accumulation, ranks in every(2, itertools.product((1, 2, 4, 8), (1, 2, 4, 16), RANKS[1:6])):
        yield (
            f"What is the global batch of micro-batch {micro}, {accumulation} accumulation steps and {ranks} GPUs?",
            f"{micro} x {accumulation} x {ranks} = {micro * accumulation * ranks} sequences.",
        )
    for total, ranks, micro in itertools.product((64, 128, 256), (2, 4, 8), (1, 2, 4)):
        yield (
            f"How many accumulation steps make a global batch of {total} on {ranks} GPUs with micro-batch {micro}?",
            f"{total} / ({ranks} x {micro}) = {total // (ranks * micro)} steps.",
        )


def layer_inputs() -> Iterator[Pair]:
    for name, tokens in itertools.product(MODELS[::2], (2048, 4096, 8192)):
        architecture, short = architecture_from_config(find_model(name).config), name.split("/")[-1]
        layers, hidden, width = architecture.num_layers, architecture.hidden_size, Dtype.BF16.nbytes
        yield (
            f"Under full activation checkpointing, what does {short} keep for {tokens} tokens in bf16?",
            (
                f"The input of each layer: {layers} layers x {tokens} tokens x {hidden} x {width} bytes = "
                f"{amount(layers * tokens * hidden * width)}."
            ),
        )


def sharded(what: str, count: int, width: int, unit: str, stage: int, ranks: int) -> str:
    """What ``count`` parameters' ``what`` take on one rank, in words."""
    degree = divisor(what, stage, ranks)
    keeps = f"{what[0].upper()}{what[1:]}: {unit} a parameter, {width} bytes."
    share = (
        f"ZeRO-{stage} divides them among {ranks} GPUs" if degree > 1 else f"ZeRO-{stage} keeps them whole on every GPU"
    )
    parts = f" / {degree}" if degree > 1 else ""
    return f"{keeps} {share}: {format_count(count)}{parts} x {width} = {amount(shard(count, degree) * width)} each."


def divisor(what: str, stage: int, ranks: int) -> int:
    return ranks if stage >= SHARDED_FROM[what] else 1


def numel(size: float) -> int:
    return round(size * 10**9)


def billions(size: float) -> str:
    """``8`` -> ``an 8 B``."""
    return f"{'an' if str(size).startswith('8') else 'a'} {size:g} B"


def amount(num_bytes: int) -> str:
    return f"{num_bytes:,} bytes ({format_bytes(num_bytes)})"


def every(stride: int, choices: Iterator[T]) -> Sequence[T]:
    """One in ``stride``: a fixed selection that still meets every value of every factor."""
    return list(choices)[::stride]


def jsonl() -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows())


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET).write_text(jsonl(), encoding="utf-8")
