"""The real engine of one rank, run on fake tensors: every byte that would be alive at every moment.

``simulate`` is the function; calling the package is the same, so ``vramplan.simulate(run)`` reads as its siblings do.
``simulate_jobs(map(record_request, ...))`` simulates many, each in a process of its own.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from vramplan.simulate.request import (
    AS_RECORDED,
    Conditions,
    SimulationRequest,
    Simulator,
    record_request,
    simulate,
    simulate_jobs,
)
from vramplan.simulate.result import SimulationResult

__all__ = [
    "AS_RECORDED",
    "Conditions",
    "SimulationRequest",
    "SimulationResult",
    "Simulator",
    "record_request",
    "simulate",
    "simulate_jobs",
]


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> SimulationResult:
        return simulate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
