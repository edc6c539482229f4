"""Methods against forgetting on the tape: the KL term beside the loss, and springs on the gradients as they come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vramplan.facts.dtype import Dtype
from vramplan.memory import ops
from vramplan.memory.blocks.context import tokens
from vramplan.memory.labels import KL, PULL
from vramplan.memory.leaf import Parameter
from vramplan.memory.size import Size
from vramplan.memory.tape import Node, Tape, Tensor
from vramplan.spec.layout import shard

KL_CHUNK_TOKENS = 256
"""Tokens whose probabilities the KL term has at once (``retain/kl.py``)."""


FISHER = "fisher"
"""Stands among springs for a backward that samples the Fisher diagonal."""


def base_logits(tape: Tape, vocab_size: int, dtype: Dtype) -> Tensor:
    """What the base said, alive until the loss is there (``train/engine.py``, ``forward``)."""
    return tape.new(tokens(vocab_size), dtype, KL)


def with_divergence(result: Tensor, scores: Tensor, vocab_size: int, chunk_tokens: int) -> Tensor:
    """The loss and the KL term (``retain/kl.py``): its gradient is made at once, a chunk of tokens at a time.

    A chunk of ``KL_CHUNK_TOKENS`` is taken for one of several (of just so many tokens it is the only one).
    """
    tape, numel, dtype = scores.storage.tape, scores.numel, scores.dtype
    grad = tape.new(numel, dtype, KL)
    chunk: Size = (chunk_tokens * vocab_size, 0, 0, 0, 0)
    named: list[Tensor] = []
    for _ in range(2 if chunk_tokens == KL_CHUNK_TOKENS else 1):  # names hold one chunk's until the next takes them
        _chunk(tape, chunk, dtype, named)
    named.clear()
    out = tape.new((1, 0, 0, 0, 0), Dtype.FP32, KL)

    def backward(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        return [tape.new(numel, dtype, KL)]

    out = tape.attach("kl", out, [scores], [grad], backward)
    del grad
    return ops.add(result, out, KL)


def _chunk(tape: Tape, numel: Size, dtype: Dtype, named: list[Tensor]) -> None:
    """Both log-softmaxes and the base's probabilities, which take the places of the ``named`` of the chunk before, and
    what passes."""
    fresh = []
    for _ in range(2):
        wide = tape.new(numel, Dtype.FP32, KL) if dtype is not Dtype.FP32 else None
        fresh.append(tape.new(numel, Dtype.FP32, KL))
        del wide
    named[:2] = fresh
    fresh.clear()
    named[2:] = [tape.new(numel, Dtype.FP32, KL)]
    difference = tape.new(numel, Dtype.FP32, KL)
    product = tape.new(numel, Dtype.FP32, KL)
    del difference, product


@contextmanager
def added(held: list[Tensor]) -> Iterator[None]:
    """A gradient is added to those of earlier micro-batches and gone while hooks run on the sum
    (``register_post_accumulate_grad_hook``; seen in the memory of a process). Afterwards it stands for the sum."""
    grad = held.pop()
    tape, numel, dtype, label = grad.storage.tape, grad.numel, grad.dtype, grad.storage.label
    del grad
    yield
    held.append(tape.new(numel, dtype, label))


def on_gradient(param: Parameter, ranks: int, springs: frozenset[str]) -> None:
    """The hook on a complete gradient: a pull, or a sample for the Fisher diagonal (``ModelRun.springs``)."""
    if FISHER not in springs:
        pull(param, ranks, springs)
        return
    tape, numel = param.storage.tape, (param.grad_numel, 0, 0, 0, 0)
    wide = tape.new(numel, Dtype.FP32, PULL) if param.dtype is not Dtype.FP32 else None
    squares = tape.new(numel, Dtype.FP32, PULL)
    del wide
    counted = tape.new(numel, Dtype.FP32, PULL)
    del squares, counted


def pull(param: Parameter, ranks: int, springs: frozenset[str]) -> None:
    """The hook on a complete gradient (``retain/anchored.py``, ``_pull``), on the rank's slice of the parameter.

    ``springs``: ``l2sp``, ``ewc`` or both.
    """
    tape, numel = param.storage.tape, shard(param.grad_numel, ranks)

    def new() -> Tensor:
        return tape.new((numel, 0, 0, 0, 0), Dtype.FP32, PULL)

    operands = [new(), new()] if param.dtype is not Dtype.FP32 else []
    distance = new()
    operands.clear()
    total, more = new(), None
    for _ in sorted(springs):
        scaled = new()  # L2-SP: the square, EWC: the weighted stiffness
        next_more = new()
        del scaled
        more, old = next_more, more
        del next_more, old
        total, old = new(), total
        del old
    if param.dtype is not Dtype.FP32:
        cast = tape.new((numel, 0, 0, 0, 0), param.dtype, PULL)
        del cast
    del distance, total, more
