"""Reentrant checkpointing: a layer runs without a graph, and again in backward, inside which its own backward runs."""

from __future__ import annotations

from collections.abc import Callable

from vramplan.facts.dtype import Dtype
from vramplan.memory.size import ZERO
from vramplan.memory.tape import RANDOM_STATE, Node, Tape, Tensor


def checkpoint_reentrant(
    tape: Tape, function: Callable[..., Tensor], x: Tensor, kept: list[Tensor], on_host: bool = False
) -> Tensor:
    """``torch/utils/checkpoint.py``, ``CheckpointFunction``: its backward's frame holds the result until the end.

    ``kept``: takes what lives as long as the node, the random state. ``on_host``: ``x`` is kept in the host's memory.
    """
    random_state = tape.new((tape.random_state_bytes, 0, 0, 0, 0), Dtype.UINT8, RANDOM_STATE)
    kept.append(random_state)
    held = tape.new(ZERO, x.dtype, RANDOM_STATE) if on_host else x
    with tape.without_graph():
        out = function(x)
    numel, dtype = x.numel, x.dtype

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        again = tape.new(numel, dtype, "residual stream") if on_host else node.unpack(0).detach()
        found: list[Tensor | None] = []

        def deliver(_: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
            found.extend(grads)
            return []

        again.node = Node("AccumulateGrad", 1 << 61, [], deliver, tape.where)
        result, grad = function(again), grads[0]
        assert grad is not None
        tape.backward(result, grad)
        del result, again, grad
        return found

    return tape.attach("checkpoint", out, [x], [held, random_state], backward)
