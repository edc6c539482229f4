"""The process that simulates: ``python -m vramplan.simulate.worker``, a fork server of simulations.

A request is ``SimulationRequest.to_dict``; the child writes ``SimulationResult.to_dict`` to ``out``.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

# What every simulation needs is imported before the first fork.
import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - imported by every engine with ZeRO, and slowly
import peft  # noqa: F401
import transformers
import transformers.conversion_mapping

from vramplan.forkserver import serve
from vramplan.simulate.black_box import BlackBox, Death
from vramplan.simulate.extend import trace_run
from vramplan.simulate.no_disk import elsewhere
from vramplan.simulate.replay import replay
from vramplan.simulate.request import Conditions, black_box_of
from vramplan.simulate.result import SimulationResult
from vramplan.simulate.summary import Curves, largest_live, make_timeline, summarise_phases
from vramplan.simulate.trace_file import save_trace
from vramplan.spec.alloc_conf import AllocConf
from vramplan.spec.layout import Layout
from vramplan.spec.run import RunSpec


def handle(request: dict[str, Any]) -> None:
    """Simulates one run in this process."""
    result = simulate_here(request)
    Path(request["out"]).write_text(json.dumps(result.to_dict()), encoding="utf-8")


def simulate_here(request: dict[str, Any]) -> SimulationResult:
    """The result of a request, which needs a process that has joined no process group yet."""
    started = time.perf_counter()
    run, layout = RunSpec.model_validate(request["run"]), Layout(**request["layout"])
    capacity, overhead = request["capacity_bytes"], request["overhead_bytes"]
    black_box = BlackBox(
        black_box_of(Path(request["out"])) if "out" in request else None,
        Death(**request["death"]) if request["death"] else None,
    )
    with elsewhere(run) as moved:
        traced = trace_run(moved, layout, Conditions(**request["conditions"]), request["device_type"], black_box)
    trace = traced.trace
    replayed = None
    if request["device_type"] == "cuda":
        limit = None if capacity is None else capacity - overhead
        replayed = replay(trace, AllocConf.parse(run.alloc_conf), limit)
    curves = Curves.of(trace)
    if request["save_trace"]:
        save_trace(trace, Path(request["save_trace"]))
    return SimulationResult(
        device_type=request["device_type"],
        phases=summarise_phases(trace, curves, replayed),
        largest_live=largest_live(trace, curves),
        timeline=make_timeline(trace, curves),
        numel_total=traced.numel_total,
        numel_trainable=traced.numel_trainable,
        num_blocks=len(trace),
        seconds=time.perf_counter() - started,
        alloc_retries=replayed.alloc_retries if replayed else None,
        failure=replayed.failure if replayed else None,
        error=str(traced.error) if traced.error else None,
        host_rss_peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        traced_layers=traced.traced_layers,
        in_full_because=traced.in_full_because,
        overhead_bytes=overhead,
        capacity_bytes=capacity,
    )


def prepare() -> None:
    """Does once what every simulation would do again in its own process.

    The modules' objects are none of a simulation's garbage. Without them Python would look through all that is left far
    more often than a trainer's process does (it waits until a quarter has been added), so it does so only when told.
    """
    # DeepSpeed's CPU optimizers ask for the processor's maker, to warn: a second of another Python process
    sys.modules["cpuinfo"] = cast("ModuleType", SimpleNamespace(get_cpu_info=dict))
    with suppress(ImportError, AttributeError):  # PEFT asks for it: 600 patterns are compiled
        transformers.conversion_mapping.get_checkpoint_conversion_mapping("llama")
    gc.collect()
    gc.freeze()
    youngest, middle, _ = gc.get_threshold()
    gc.set_threshold(youngest, middle, 1 << 30)


if __name__ == "__main__":
    prepare()
    serve(handle)
