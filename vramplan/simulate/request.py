"""Simulations asked for from outside: each runs in a process of its own, which has torch. No torch here.

A process plays one world size in its life (a process group is joined once), and what goes wrong dies with it.
"""

from __future__ import annotations

import json
import signal
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from vramplan.errors import SimulationError, SpecError
from vramplan.facts.device import Node
from vramplan.facts.resolve import resolve_config
from vramplan.forkserver import ForkServer
from vramplan.simulate.black_box import Death, read_death
from vramplan.simulate.result import SimulationResult
from vramplan.spec.layout import Layout
from vramplan.spec.run import RunSpec

DeviceType = Literal["cpu", "cuda"]
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
"""Signals by which code ends its own process; others come from outside."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a run's spec leaves open about how it goes."""

    steps: int = 2
    """Optimizer steps; the second is as all later ones."""
    managed: bool = False
    """DeepSpeed counts micro-batches (as in measurement records); else the loop steps after the last one."""
    padded: bool = True
    """Where a padding mask is passed, it masks something."""
    skip_steps: bool = False
    """Every optimizer step is discarded as an overflow."""
    halved_weights: bool = False
    """ZeRO-3's weights are made in bf16 where fp32 is asked for, as in some records (``measure/record.py``)."""
    by_depth: bool = True
    """A deep model's trace may be followed from those of fewer layers where that is exact; else it is taken in full."""


AS_RECORDED = Conditions(managed=True, padded=False, by_depth=False)
"""How measurement records are taken (an all-ones mask is dropped by transformers)."""


@dataclass(frozen=True, slots=True)
class SimulationRequest:
    """One closed run to simulate."""

    run: RunSpec
    device_type: DeviceType = "cuda"
    capacity_bytes: int | None = None
    """What one rank may use of the device; None: unlimited."""
    overhead_bytes: int = 0
    """What the driver counts beside the allocator."""
    conditions: Conditions = field(default_factory=Conditions)
    save_trace: Path | None = None
    """Where to write the whole trace (``trace_file.py``)."""
    death: Death | None = None
    """Where a process that simulated this died; this one goes no further."""
    key: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the worker, with the model's config looked up."""
        run = self.run
        if run.model_config_fields is None:
            run = run.model_copy(update={"model_config_fields": dict(resolve_config(run))})
        return {
            "run": run.model_dump(mode="json"),
            "layout": asdict(layout_of(run)),
            "device_type": self.device_type,
            "capacity_bytes": self.capacity_bytes,
            "overhead_bytes": self.overhead_bytes,
            "conditions": asdict(self.conditions),
            "save_trace": str(self.save_trace) if self.save_trace else None,
            "death": asdict(self.death) if self.death else None,
        }


def layout_of(run: RunSpec) -> Layout:
    """The layout of a closed run.

    Raises:
        SpecError: it is still None.
    """
    if run.layout is None:
        raise SpecError("layout is not decided: plan the run first, or set layout.dp")
    return run.layout


class Simulator:
    """A process that has imported the training stack and forks a simulation at a request. A context manager."""

    def __init__(self, parallel: int = 1) -> None:
        self._parallel = parallel
        self._scratch = tempfile.TemporaryDirectory()
        self._log = Path(self._scratch.name) / "log"
        # the stack must not look for a GPU, and one simulation must not take all cores from the next
        env = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self._server = ForkServer("vramplan.simulate.worker", env, self._log)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()
        self._scratch.cleanup()

    def run(self, requests: Iterable[SimulationRequest]) -> Iterator[tuple[SimulationRequest, SimulationResult]]:
        """Each request with its result, as they end. One that a kernel's crash ended is simulated again up to there.

        Raises:
            SimulationError: a simulation died without a result.
        """
        waiting, running = list(requests)[::-1], dict[Path, SimulationRequest]()
        started = 0
        while waiting or running:
            while waiting and len(running) < self._parallel:
                started += 1
                out = Path(self._scratch.name) / f"{started}.json"
                running[out] = waiting.pop()
                self._server.submit(running[out].to_dict(), out)
            for ended in self._server.wait(timeout_s=1.0):
                request = running.pop(ended.out)
                death = read_death(black_box_of(ended.out), -ended.exit_code) if ended.exit_code < 0 else None
                if death is not None and death.signal in _CRASHES and request.death is None:
                    waiting.append(replace(request, death=death))
                else:
                    yield request, self._read(ended.out, ended.exit_code)

    def _read(self, out: Path, exit_code: int) -> SimulationResult:
        if not out.exists():
            last = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise SimulationError(f"the simulation ended with exit code {exit_code}: {' '.join(last)}")
        return SimulationResult.from_dict(json.loads(out.read_text(encoding="utf-8")))


def black_box_of(out: Path) -> Path:
    """The black box of the process that writes its result to ``out``."""
    return out.with_suffix(".at")


def record_request(
    run: RunSpec,
    *,
    key: str = "",
    steps: int = 2,
    skip_steps: bool = False,
    halved: bool = False,
    masked: bool = False,
    trained: bool = False,
) -> SimulationRequest:
    """What simulates a measurement record taken on a CPU; ``run`` is the record's, with its layout in it.

    ``skip_steps``: whether the record's optimizer steps were discarded, ``halved``: whether its weights were halved
    (``measure/record.py``). ``masked``: whether its masks hid something. ``trained``: whether the trainer took it,
    whose loop steps after the last micro-batch.
    """
    conditions = replace(
        AS_RECORDED,
        steps=steps,
        skip_steps=skip_steps,
        halved_weights=halved,
        padded=masked,
        managed=not trained,
    )
    return SimulationRequest(run, "cpu", conditions=conditions, key=key)


def simulate_jobs(requests: Iterable[SimulationRequest], parallel: int = 1) -> Iterator[tuple[str, SimulationResult]]:
    """Each request's ``key`` with its result, as they end; ``parallel`` at a time, each in a process of its own.

    A run that the real stack refuses, or that cannot be traced, is a result whose ``error`` says why.

    Raises:
        SimulationError: a process died without a result.
    """
    with Simulator(parallel) as simulator:
        for request, result in simulator.run(requests):
            yield request.key, result


def simulate(
    run: RunSpec,
    on: Node | DeviceType = "cuda",
    layout: Layout | None = None,
    *,
    conditions: Conditions | None = None,
    save_trace: Path | None = None,
) -> SimulationResult:
    """Runs the real engine of rank 0 of a closed run on fake tensors.

    ``on``: a node (its device's kind and capacity), or only the kind of device. ``layout``: instead of the run's.

    Raises:
        SpecError: a field that the planner decides is None.
        SimulationError: the process died, or no phase could be traced.
    """
    if layout is not None:
        run = run.model_copy(update={"layout": layout})
    request = SimulationRequest(run, conditions=conditions or Conditions(), save_trace=save_trace)
    if isinstance(on, Node):
        device_type: DeviceType = "cpu" if on.device.kind == "cpu" else "cuda"
        request = replace(request, device_type=device_type, capacity_bytes=on.capacity_bytes)
    else:
        request = replace(request, device_type=on)
    with Simulator() as simulator:
        ((_, result),) = simulator.run([request])
    if not result.phases:
        raise SimulationError(result.error or "nothing was traced")
    return result
