"""What one change to a closed run would give, each simulated."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vramplan.search.remedy import with_field
from vramplan.simulate.asked import ClosedRun, request_on
from vramplan.simulate.request import simulate_jobs
from vramplan.simulate.result import SimulationResult
from vramplan.spec.run import RunSpec


@dataclass(frozen=True, slots=True)
class Change:
    """One change, and the run with it."""

    name: str
    run: RunSpec


@dataclass(frozen=True, slots=True)
class Explained:
    """A run simulated as it is, and with each change."""

    closed: ClosedRun
    found: SimulationResult
    changes: tuple[tuple[Change, SimulationResult], ...]


def explain(closed: ClosedRun, parallel: int = 1) -> Explained:
    """Simulates the run and every change of ``possible_changes``, in its order.

    Raises:
        SimulationError: a process died without a result.
    """
    changes = {str(number): change for number, change in enumerate(possible_changes(closed))}
    requests = [closed.request(key="")]
    requests += [request_on(change.run, closed.node, key=key) for key, change in changes.items()]
    results = dict(simulate_jobs(requests, parallel))
    return Explained(closed, results[""], tuple((change, results[key]) for key, change in changes.items()))


def possible_changes(closed: ClosedRun) -> Iterator[Change]:
    """Checkpointing, each higher ZeRO stage, half the micro-batch, offload, the chunked loss, and the fused one where
    it is installed; each leaves what is learnt as it is."""
    run, on_gpu = closed.run, closed.node.device.kind != "cpu"
    stage, degree = run.zero.stage or 0, closed.node.world_size
    if run.activation_checkpointing != "full" or run.checkpoint_every > 1:
        every_layer = {"activation_checkpointing": "full", "checkpoint_every": 1}
        yield _change("checkpointing full", run, every_layer)
    if degree > 1:
        for higher in range(stage + 1, 4):
            # DeepSpeed's default (runtime/zero/config.py, overlap_comm_valid)
            changed = {"zero.stage": higher, "zero.overlap_comm": higher == 3}
            yield _change(f"ZeRO {higher}", run, changed)
    micro = run.micro_batch_size or 1
    if micro % 2 == 0:
        halved = {"micro_batch_size": micro // 2, "grad_accum_steps": 2 * (run.grad_accum_steps or 1)}
        yield _change(f"micro-batch {micro // 2}, accumulated twice as often", run, halved)
    if on_gpu and run.zero.offload_optimizer != "cpu" and run.optimizer.kind == "adamw":
        offloaded = {"zero.offload_optimizer": "cpu", **({} if stage else {"zero.stage": 1})}
        yield _change(f"optimizer on the CPU{'' if stage else ' (ZeRO 1)'}", run, offloaded)
    if on_gpu and stage == 3 and run.zero.offload_param != "cpu":
        yield _change("weights and optimizer on the CPU", run, dict.fromkeys(_OFFLOADS, "cpu"))
    if on_gpu and run.loss == "hf":
        yield _change("chunked loss", run, {"loss": "chunked"})
    if on_gpu and run.loss != "liger" and importlib.util.find_spec("liger_kernel") is not None:
        yield _change("fused loss (liger)", run, {"loss": "liger"})


_OFFLOADS = ("zero.offload_optimizer", "zero.offload_param")


def _change(name: str, run: RunSpec, fields: dict[str, Any]) -> Change:
    for field, value in fields.items():
        run = with_field(run, field, value)
    return Change(name, run)
