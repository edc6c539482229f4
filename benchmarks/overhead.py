"""What the trainer adds to a bare DeepSpeed loop: `python benchmarks/overhead.py`.

Both train equal copies of one model on the same batches at the same rates, step by step in turn, in one process; their
losses are held equal. The bare loop does forward, backward and step on batches made beforehand. The trainer does all
that `vramplan train` does on a rank: draw and collate the batch, mark phases, sum the loss over the ranks, write
metrics.jsonl and TensorBoard. Ratios are medians over pairs of steps, so one slow moment decides nothing.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1", HF_HUB_OFFLINE="1")
os.environ.setdefault("MASTER_PORT", "29612")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vramplan.data.batch import Batch, collate, padded_length
from vramplan.data.dataset import RunData, load_data
from vramplan.emit.deepspeed import ds_config
from vramplan.measure.run_dir import RunDir
from vramplan.spec.load import run_from_mapping
from vramplan.spec.run import RunSpec
from vramplan.train.engine import TrainEngine, join_group
from vramplan.train.loop import Loop
from vramplan.train.metrics import Memory, Metrics
from vramplan.train.model import load_model
from vramplan.train.phases import Phases
from vramplan.train.pretrained import load_tokenizer, model_directory
from vramplan.train.schedule import learning_rate
from vramplan.train.status import RankStatus

PROMISE = 0.02
WARM_UP = 3


def main() -> int:
    """Prints both loops' step times and their ratio; 1 where it is more than promised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as directory:
        return compare(options, Path(directory))


def compare(options: argparse.Namespace, directory: Path) -> int:
    """Both loops in turn, the first of a pair changing from step to step."""
    source = run_of(options, "HuggingFaceTB/SmolLM2-135M-Instruct")
    tokenizer = load_tokenizer(model_directory(source), source)
    save_model(options, directory / "model", len(tokenizer))
    run = run_of(options, str(directory / "model"))
    data, device = load_data(run, tokenizer), join_group(run)
    trainer = make_trainer(run, data, RunDir(directory / "run"), device)
    bare, batches = bare_loop(run, device), batches_of(run, data)
    seconds: dict[str, list[tuple[float, float]]] = {"trainer": [], "bare": []}
    for step in range(options.steps):
        pair: dict[str, Callable[[], float]] = {
            "trainer": lambda step=step: train_one(trainer, step),
            "bare": lambda step=step: bare(batches[step], step),
        }
        losses = {}
        for name in ("trainer", "bare") if step % 2 else ("bare", "trainer"):
            wall, processor = time.perf_counter(), time.process_time()
            losses[name] = pair[name]()
            seconds[name].append((time.perf_counter() - wall, time.process_time() - processor))
        same = math.isclose(losses["trainer"], losses["bare"], rel_tol=1e-5)
        assert same, f"step {step + 1}: not the same training: {losses}"
    return report(options, {name: values[WARM_UP:] for name, values in seconds.items()})


def report(options: argparse.Namespace, seconds: dict[str, list[tuple[float, float]]]) -> int:
    """One line a clock."""
    print(
        f"Llama of {options.layers} layers, width {options.hidden}, SmolLM2's vocabulary, fp32, ZeRO {options.stage}, "
        f"{options.batch} sequences a step, {options.threads} CPU thread(s), {len(seconds['bare'])} pairs of steps"
    )
    ratios = {}
    for clock, name in enumerate(("wall time", "processor time")):
        ours, theirs = ([pair[clock] for pair in seconds[loop]] for loop in ("trainer", "bare"))
        ratios[name] = statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True)) - 1
        print(
            f"{name:15} trainer {statistics.median(ours) * 1e3:7.1f} ms, bare DeepSpeed "
            f"{statistics.median(theirs) * 1e3:7.1f} ms a step: {ratios[name]:+.2%}"
        )
    return int(ratios["processor time"] > PROMISE)


def train_one(trainer: Loop, step: int) -> float:
    """A step of the trainer; its loss."""
    result = trainer.step(step)
    trainer.between_steps(step + 1)
    return result.loss


def bare_loop(run: RunSpec, device: torch.device) -> Callable[[list[tuple[Batch, int]], int], float]:
    """DeepSpeed's engine in the loop that its tutorial shows, at the trainer's rates."""
    import deepspeed

    module = load_model(run, Path(run.model), ds_config(run, 1)).module
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=list(module.parameters()), config=ds_config(run, 1)
    )
    engine.train()

    def step_once(micros: list[tuple[Batch, int]], step: int) -> float:
        total = 0.0
        for batch, num_targets in micros:
            moved = batch.to(device)
            loss = engine(**moved.inputs(), labels=moved.labels, num_items_in_batch=num_targets).loss
            engine.backward(loss, scale_wrt_gas=False)
            total += loss.item()
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(step, run.training.max_steps or 1, run.peak_lr, run.training)
        engine.step()
        return total

    return step_once


def batches_of(run: RunSpec, data: RunData) -> list[list[tuple[Batch, int]]]:
    """By step: each micro-batch's tensors, and the targets of the whole batch."""
    found = []
    for step in range(run.training.max_steps or 1):
        samples = [data.train[index] for index in data.stream.batch(step, run.global_batch_size or 1)]
        length = run.seq_len if step < 2 else padded_length(samples, run.seq_len)
        size, num_targets = run.micro_batch_size or 1, sum(sample.num_targets for sample in samples)
        chunks = (samples[start : start + size] for start in range(0, len(samples), size))
        found.append([(collate(chunk, length, 0), num_targets) for chunk in chunks])
    return found


def make_trainer(run: RunSpec, data: RunData, run_dir: RunDir, device: torch.device) -> Loop:
    """What a rank has after its measured first steps."""
    run_dir.root.mkdir()
    phases = Phases(RankStatus(run_dir.status_of(0), 0), device)
    phases.stop_measuring()
    config = ds_config(run, 1)
    engine = TrainEngine(run, load_model(run, Path(run.model), config).module, config, device)
    return Loop(engine, data, run_dir, Metrics(run, run_dir, 0, device), phases, Memory(device), 0)


def save_model(options: argparse.Namespace, directory: Path, vocab_size: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def run_of(options: argparse.Namespace, model: str) -> RunSpec:
    fields: dict[str, Any] = {
        "model": model,
        "precision": "fp32",
        "seq_len": 136,
        "global_batch_size": options.batch,
        "micro_batch_size": max(1, options.batch // 2),
        "grad_accum_steps": 2 if options.batch > 1 else 1,
        "activation_checkpointing": "none",
        "zero": {"stage": options.stage, "offload_optimizer": "none", "offload_param": "none"},
        "optimizer": {"kind": "adamw_torch"},
        # one step more than is run: the last would evaluate and save
        "training": {"max_steps": options.steps + 1},
    }
    return run_from_mapping(fields)


if __name__ == "__main__":
    raise SystemExit(main())
