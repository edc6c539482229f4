"""What kernels of the CPU allocate and free inside an operator, against torch's profiler."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from vramplan.memory.term import Place
from vramplan.simulate.answers import ANSWERS
from vramplan.simulate.scratch import CPU_SCRATCH
from vramplan.simulate.tracker import Tracker

Operator = Callable[[torch.Tensor, torch.Tensor], object]
OPERATORS: dict[str, Operator] = {
    "gather": lambda x, at: x.detach().gather(1, at),
    "scatter": lambda x, at: x.detach().scatter(1, at, x.detach()[:, :4]),
    "scatter_": lambda x, at: x.detach().scatter_(1, at, x.detach()[:, :4]),
    "scatter_ a number": lambda x, at: x.detach().scatter_(1, at, 1.0),
    "scatter_add_": lambda x, at: x.detach().scatter_add_(1, at, x.detach()[:, :4]),
    "backward of max": lambda x, at: x.max(dim=-1).values.sum().backward(),
    "backward of topk": lambda x, at: x.topk(4, dim=-1).values.sum().backward(),
}


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(512, 64, dtype=dtype, requires_grad=True), torch.zeros(512, 4, dtype=torch.int64)


def profiled(run: Operator, dtype: torch.dtype) -> int:
    """Bytes at most beside the operands, as torch's profiler counts them."""
    x, at = operands(dtype)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run(x, at)
    sizes = [event.nbytes() for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(sizes, initial=0))


def simulated(run: Operator, dtype: torch.dtype) -> int:
    """The same, as the simulator counts them."""
    tracker = Tracker("cpu", scratch=CPU_SCRATCH, answers=ANSWERS)
    with FakeTensorMode(), tracker:
        x, at = operands(dtype)
        run(x, at)
    curve = tracker.trace.live_curve(tracker.trace.in_place(Place.DEVICE))
    return int(curve.max()) - x.nbytes - at.nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", OPERATORS)
def test_indexed_operators_take_what_the_profiler_sees(name: str, dtype: torch.dtype) -> None:
    assert simulated(OPERATORS[name], dtype) == pytest.approx(profiled(OPERATORS[name], dtype), abs=64)
