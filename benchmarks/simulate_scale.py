"""CPU time, wall time and memory of simulating large jobs, each in a process of its own. Prints; asserts nothing.

python benchmarks/simulate_scale.py [--in-full]

CPU time counts the process from its start, imports included; wall time also what others do on the machine.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time

CASES = {
    "8B": ("meta-llama/Llama-3.1-8B", 8),
    "70B": ("meta-llama/Llama-3.1-70B", 64),
    "405B": ("meta-llama/Llama-3.1-405B", 512),
}
"""Model and ranks; all weights trained, ZeRO-3, checkpointing, one sequence of 4,096 tokens a rank."""


def simulate(model: str, ranks: int, *, in_full: bool) -> str:
    from dataclasses import replace

    from vramplan.simulate.request import Conditions, SimulationRequest
    from vramplan.simulate.worker import simulate_here
    from vramplan.spec.load import run_from_mapping

    run = run_from_mapping(
        {
            "model": model,
            "seq_len": 4096,
            "micro_batch_size": 1,
            "grad_accum_steps": 1,
            "layout": {"dp": ranks},
            "activation_checkpointing": "full",
            "zero": {"stage": 3, "offload_optimizer": "none", "offload_param": "none"},
        }
    )
    found = simulate_here(SimulationRequest(run, conditions=replace(Conditions(), by_depth=not in_full)).to_dict())
    how = f"from {', '.join(map(str, found.traced_layers))} layers" if found.traced_layers else "in full"
    return (
        f"{found.num_blocks:>7,} allocations {how:<20} allocated {found.allocated_peak_bytes:>15,} "
        f"reserved {found.reserved_peak_bytes or 0:>15,}  {found.error or ''}"
    )


def main(words: list[str]) -> None:
    if words and words[0] in CASES:
        model, ranks = CASES[words[0]]
        started = time.perf_counter()
        line = simulate(model, ranks, in_full="--in-full" in words)
        used = resource.getrusage(resource.RUSAGE_SELF)
        wall = time.perf_counter() - started
        print(
            f"{model} on {ranks} ranks: {used.ru_utime + used.ru_stime:6.1f} CPU s, {wall:6.1f} s wall, "
            f"{used.ru_maxrss / 2**20:5.2f} GiB; {line}",
            flush=True,
        )
        return
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for case in CASES:
        subprocess.run([sys.executable, __file__, case, *words], env=env, check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main(sys.argv[1:])
