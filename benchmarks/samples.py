"""Hard-example mining and sample weights against uniform draws: `python benchmarks/samples.py > benchmarks/samples.md`.

A small model learns rows of three planted kinds: easy (the answer is the first digit of the question), hard (the sum of
both digits modulo ten) and noisy (questions like the hard ones with a wrong answer). Held out are all hundred questions
of either rule with their right answers. Every method takes equal steps through the loop that `vramplan train` runs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1", HF_HUB_OFFLINE="1")
os.environ.update(OMP_NUM_THREADS="1")
os.environ.setdefault("MASTER_PORT", "29613")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vramplan.data.dataset import load_data, read_samples
from vramplan.emit.deepspeed import ds_config
from vramplan.measure.run_dir import RunDir
from vramplan.spec.load import merge, run_from_mapping
from vramplan.spec.run import RunSpec
from vramplan.train.engine import TrainEngine, join_group
from vramplan.train.evaluate import evaluate
from vramplan.train.loop import Loop
from vramplan.train.metrics import Memory, Metrics
from vramplan.train.model import load_model
from vramplan.train.phases import Phases
from vramplan.train.status import RankStatus

WORDS = [*"0123456789", "first", "sum", ":", "end", "pad"]
COUNTS = {"easy": 700, "hard": 200, "noisy": 100}
BATCH = 32
NEVER = 10**6
"""Patience that no row outlives: nothing is held for noise."""
METHODS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "hard examples": {"hard_examples": {"temperature": 1.0}},
    "hard examples, noise not capped": {"hard_examples": {"temperature": 1.0, "patience": NEVER}},
    "weights: hard 3": {"train": {"weight_column": "hard_3"}},
    "weights: hard 3, noisy 0": {"train": {"weight_column": "hard_3_noisy_0"}},
}


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    words = " ".join(["python benchmarks/samples.py", *sys.argv[1:]])
    print(f"# Samples\n\n`{words}`\n\n{describe(options)}\n", flush=True)
    print("| method | loss on easy | loss on hard | of the rows drawn: easy | hard | noisy |\n" + "| --- " * 6 + "|")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        save_model(root / "model")
        for name, data in METHODS.items():
            print(row(name, [train(root, data, seed, options.steps) for seed in range(options.seeds)]), flush=True)
    print(f"\nMean of {options.seeds} seeds, each in brackets; {time.perf_counter() - started:.0f} s in all.")


def describe(options: argparse.Namespace) -> str:
    rows = ", ".join(f"{count} {kind}" for kind, count in COUNTS.items())
    return (
        f"{rows} rows, {options.steps} steps of {BATCH}; a Llama of two layers and width 64 from random weights. "
        "Losses: nats a token on all hundred questions of a kind with their right answers; every other token is the "
        "end of the row and learnt at once, so that guessing gives 1.15."
    )


def row(name: str, found: list[dict[str, float]]) -> str:
    def shown(key: str) -> str:
        values = [each[key] for each in found]
        return f"{statistics.mean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})"

    shares = [f"{statistics.mean(each[f'drawn {kind}'] for each in found):.1%}" for kind in COUNTS]
    return "| " + " | ".join([name, shown("easy"), shown("hard"), *shares]) + " |"


def train(root: Path, data: dict[str, Any], seed: int, steps: int) -> dict[str, float]:
    """Held-out losses after training, and the share of each kind among the rows that were drawn."""
    write_rows(root, seed)
    run = run_of(root, data, seed, steps)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(root / "model")
    loaded, device = load_data(run, tokenizer), join_group(run)
    run_dir = RunDir(Path(tempfile.mkdtemp(dir=root)))
    phases = Phases(RankStatus(run_dir.status_of(0), 0), device)
    phases.stop_measuring()
    config = ds_config(run, 1)
    engine = TrainEngine(run, load_model(run, Path(run.model), config).module, config, device)
    loop = Loop(engine, loaded, run_dir, Metrics(run, run_dir, 0, device), phases, Memory(device), 0)
    loop.restore_losses(0)
    kinds = [json.loads(line)["kind"] for line in (root / "rows.jsonl").read_text().splitlines()]
    drawn: Counter[str] = Counter()
    for step in range(steps):
        drawn.update(kinds[index] for index in loaded.stream.batch(step, BATCH))
        loop.step(step)
    found = {
        kind: evaluate(engine, read_samples(str(root / f"{kind}.jsonl"), run, tokenizer), 0).loss
        for kind in ("easy", "hard")
    }
    engine.deepspeed.destroy()
    return found | {f"drawn {kind}": drawn[kind] / drawn.total() for kind in COUNTS}


def write_rows(root: Path, seed: int) -> None:
    """The training rows, and both held-out sets."""
    chosen = random.Random(seed)
    rows = [planted(kind, chosen.randrange(100), chosen) for kind, count in COUNTS.items() for _ in range(count)]
    chosen.shuffle(rows)
    write(root / "rows.jsonl", rows)
    for kind in ("easy", "hard"):
        write(root / f"{kind}.jsonl", [planted(kind, number, chosen) for number in range(100)])


def planted(kind: str, number: int, chosen: random.Random) -> dict[str, Any]:
    first, second = divmod(number, 10)
    right = first if kind == "easy" else (first + second) % 10
    answer = (right + chosen.randrange(1, 10)) % 10 if kind == "noisy" else right
    return {
        "prompt": f"{'first' if kind == 'easy' else 'sum'} {first} {second} : ",
        "completion": str(answer),
        "kind": kind,
        "hard_3": 1.0 if kind == "easy" else 3.0,
        "hard_3_noisy_0": {"easy": 1.0, "hard": 3.0, "noisy": 0.0}[kind],
    }


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def save_model(directory: Path) -> None:
    """A model with random weights, and a tokenizer of digits and words."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="pad"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="end", pad_token="pad").save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def run_of(root: Path, data: dict[str, Any], seed: int, steps: int) -> RunSpec:
    fields = {
        "model": str(root / "model"),
        "precision": "fp32",
        "seq_len": 16,
        "global_batch_size": BATCH,
        "micro_batch_size": BATCH,
        "grad_accum_steps": 1,
        "activation_checkpointing": "none",
        "zero": {"stage": 0, "offload_optimizer": "none", "offload_param": "none"},
        "optimizer": {"kind": "adamw_torch", "lr": 2e-3, "weight_decay": 0.0},
        "data": {"train": {"path": str(root / "rows.jsonl")}, "eval_frac": 0.0},
        "training": {"max_steps": steps, "seed": seed, "trackers": []},
    }
    return run_from_mapping(merge(fields, {"data": data}))


if __name__ == "__main__":
    main()
