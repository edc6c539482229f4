"""How long one estimate takes, and a sweep over a million layouts of a 70B model. Prints; asserts nothing.

python benchmarks/estimate_speed.py
"""

from __future__ import annotations

import time

import numpy as np

from vramplan.facts.devices import resolve_node
from vramplan.facts.resolve import resolve_architecture
from vramplan.memory.estimate import estimate
from vramplan.memory.job import job_from_run
from vramplan.memory.sweep import Candidates, allocated_peaks
from vramplan.spec.run import RunSpec

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


def main() -> None:
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
