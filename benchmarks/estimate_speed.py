"""How long `vramplan fit` takes from a cold start, one estimate, and a sweep over a million layouts of a 70B model.
Processor time, which a busy machine stretches less than the clock's. Prints; asserts nothing.

python benchmarks/estimate_speed.py
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time

import numpy as np

from vramplan.facts.devices import resolve_node
from vramplan.facts.resolve import resolve_architecture
from vramplan.memory.estimate import estimate
from vramplan.memory.from_run import job_from_run
from vramplan.memory.sweep import Candidates, allocated_peaks
from vramplan.spec.run import RunSpec

COLD = (
    "fit meta-llama/Llama-3.1-8B --method full --gpu h100-80gb --gpus 8 --seq-len 4096",
    "fit meta-llama/Llama-3.1-70B --gpu h100-80gb --gpus 8 --nodes 4 --seq-len 4096",
    "fit Qwen/Qwen2.5-7B-Instruct --method lora --gpu rtx4090 --seq-len 2048",
    "fit mistralai/Mixtral-8x7B-v0.1 --gpu h100-80gb --gpus 8",
)
COLD_RUNS = 7
NUM_CANDIDATES = 1_000_000
REPEATS = 200


def closed(stage: int, micro_batch_size: int) -> RunSpec:
    return RunSpec.model_validate(
        {
            "model": "meta-llama/Llama-3.1-70B",
            "seq_len": 4096,
            "micro_batch_size": micro_batch_size,
            "grad_accum_steps": 1,
            "zero": {"stage": stage},
            "activation_checkpointing": "full",
            "hardware": {"gpu": "h100-80gb", "gpus_per_node": 8, "nodes": 8},
        }
    )


def processor_s(command: list[str]) -> float:
    """The least processor time of several processes of a command; the first may write bytecode, as an install does."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    seconds = []
    for _ in range(COLD_RUNS):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env)
        _, _, usage = os.wait4(process.pid, 0)
        seconds.append(usage.ru_utime + usage.ru_stime)
    return min(seconds)


def main() -> None:
    libraries = "import pydantic.main, pydantic.types, typer.main, rich.console"
    print(f"{processor_s([sys.executable, '-c', libraries]):.3f} s  the import of pydantic, typer and rich alone")
    for command in COLD:
        print(f"{processor_s([sys.executable, '-m', 'vramplan', *shlex.split(command)]):.3f} s  vramplan {command}")
    run = closed(2, 1)
    node, architecture = resolve_node(run.hardware), resolve_architecture(run)
    for stage in range(4):
        started = time.process_time()
        estimate(closed(stage, REPEATS + 1), node, architecture)
        first_s = time.process_time() - started
        runs = [closed(stage, 1 + index) for index in range(REPEATS)]
        started = time.process_time()
        for each in runs:
            estimate(each, node, architecture)
        each_us = (time.process_time() - started) / REPEATS * 1e6
        print(f"ZeRO-{stage}: the first {first_s * 1e3:.1f} ms, each further batch {each_us:.0f} us")
    draw = np.random.default_rng(0).integers
    candidates = Candidates(
        stage=draw(0, 4, NUM_CANDIDATES),
        dp=2 ** draw(3, 11, NUM_CANDIDATES),
        checkpointing=draw(0, 2, NUM_CANDIDATES),
        micro_batch_size=draw(1, 65, NUM_CANDIDATES),
        grad_accum_steps=draw(1, 65, NUM_CANDIDATES),
        seq_len=512 * draw(1, 65, NUM_CANDIDATES),
    )
    started = time.process_time()
    allocated_peaks(job_from_run(run, node, architecture), candidates)
    print(f"{NUM_CANDIDATES:,} layouts: {time.process_time() - started:.2f} s of one core")


if __name__ == "__main__":
    main()
