"""Reentrant checkpointing: a layer runs without a graph, and again in backward, inside which its own backward runs."""

from __future__ import annotations

from collections.abc import Callable

from vramplan.facts.dtype import Dtype
from vramplan.memory.size import ZERO
from vramplan.memory.tape import LEAF, RANDOM_STATE, Node, Tape, Tensor
from vramplan.memory.views import GRADIENTS


def checkpoint_reentrant(
    tape: Tape,
    function: Callable[..., Tensor],
    x: Tensor,
    kept: list[Tensor],
    other_result: Callable[[], Tensor | None],
    on_host: bool = False,
) -> Tensor:
    """``torch/utils/checkpoint.py``, ``CheckpointFunction``: its backward's frame holds the result until the end.

    ``other_result``: what else a run of ``function`` returned. What the second one did is held as long, and its
    gradient is zeros (``torch.autograd.Function`` materialises those that are not there). ``kept``: takes what lives as
    long as the node, the random state. ``on_host``: ``x`` is kept in the host's memory.
    """
    random_state = tape.new((tape.random_state_bytes, 0, 0, 0, 0), Dtype.UINT8, RANDOM_STATE)
    kept.append(random_state)
    held = tape.new(ZERO, x.dtype, RANDOM_STATE) if on_host else x
    with tape.without_graph():
        out = function(x)
    numel, dtype, like = x.numel, x.dtype, other_result()
    missing = (like.numel, like.dtype) if like is not None else None
    del like

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        zeros = tape.new(*missing, GRADIENTS) if missing is not None else None
        again = tape.new(numel, dtype, "residual stream") if on_host else node.unpack(0).detach()
        found: list[Tensor | None] = []

        def deliver(_: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
            found.extend(grads)
            return []

        again.node = Node(LEAF, 1 << 61, [], deliver, tape.where)
        result, grad, other = function(again), grads[0], other_result()
        assert grad is not None
        if other is not None and zeros is not None:
            result = _joined(result, other, zeros)
        tape.backward(result, grad)
        del result, other, again, grad, zeros
        return found

    return tape.attach("checkpoint", out, [x], [held, random_state], backward)


def _joined(result: Tensor, other: Tensor, zeros: Tensor) -> Tensor:
    """The result of a layer, whose backward hands zeros to what else the layer returned."""
    out = Tensor(result.storage, result.numel, result.dtype)

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        return [grads[0], zeros]

    return result.storage.tape.attach("roots", out, [result, other], [], backward)


def requiring_gradient(x: Tensor, keep: list[Tensor]) -> Tensor:
    """``enable_input_require_grads``, which transformers switches on with checkpointing: the output of embeddings that
    are not trained becomes a leaf, whose gradient is kept as long as the graph is (``keep``: by the outputs)."""
    if x.requires_grad:
        return x
    leaf = Tensor(x.storage, x.numel, x.dtype)

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        keep.extend(grad for grad in (x, grads[0]) if grad is not None)
        return []

    leaf.node = Node(LEAF, 1 << 61, [], backward, "embedding")
    return leaf
