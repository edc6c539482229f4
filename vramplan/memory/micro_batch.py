"""The instants of one micro-batch, as ``profile.py`` makes them."""

from __future__ import annotations

from dataclasses import dataclass

from vramplan.memory.tape import Point


@dataclass(frozen=True)
class Gradient:
    """A parameter's gradient is complete: what is alive at that instant, itself included."""

    name: str
    numel: int
    at: Point


@dataclass(frozen=True)
class Profile:
    """Every instant of one micro-batch's forward and backward."""

    forward: tuple[Point, ...]
    forward_end: Point
    backward: tuple[Point, ...]
    graph_done: Point
    """Autograd has ended: DeepSpeed reduces what is left in its buckets, and only then releases gathered weights
    (runtime/engine.py, ``_backward_epilogue``)."""
    backward_end: Point
    gradients: tuple[Gradient, ...]
    """Each parameter gradient in the order of backward."""
