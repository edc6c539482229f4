"""A small autograd engine without numbers: it follows who holds which bytes through forward and backward.

torch frees a tensor when its last reference goes: a Python variable, a node of the autograd graph that saved it for
backward, or a gradient on its way. This module keeps the same references for tensors that have a size and no
values, so a block written with the same operators and the same local variables as the model's code in transformers
has the same bytes alive at the same instants. Sizes are polynomials of the batch (``memory/size.py``), so one run
answers every batch and sequence length.

The rules it follows, from torch 2.13:

- nodes run in descending order of creation, gradient sinks first (``torch/csrc/autograd/engine.cpp``, the
  comparison of ``ReadyQueue``); what a node saved is released after its outputs exist (``evaluate_function``);
- a second gradient of the same tensor is added in place if the first is held by nobody else and is no view
  (``input_buffer.cpp``, ``can_accumulate_inplace``; seen with the profiler: the gradient of a 3-D linear's input or of
  a linear's weight, both views of a matrix product, is never added to in place);
- non-reentrant checkpointing keeps a region's inputs, recomputes it at the first saved tensor that is asked for, and
  stops recomputing at the last one (``torch/utils/checkpoint.py``, ``_checkpoint_without_reentrant_generator``).
"""

from __future__ import annotations

import heapq
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from vramplan.facts.dtype import Dtype
from vramplan.memory.size import ZERO, Size, add, sub

if TYPE_CHECKING:
    from vramplan.memory.leaf import Parameter


RANDOM_STATE = "random state"
LEAF = "AccumulateGrad"  # the node of a leaf
GRADIENTS = "activation gradients"
TEMPORARY = "temporary of an operator"
LOGITS_GRADIENTS = "gradients of the logits"


class Storage:
    """Bytes with a label and a count of the tensors that share them; freed with the last."""

    __slots__ = ("label", "refs", "size", "tape")

    def __init__(self, tape: Tape, size: Size, label: str) -> None:
        self.tape = tape
        self.size = size
        self.label = label
        self.refs = 0


class Tensor:
    """A reference to a storage: its number of elements (a polynomial), its dtype, and the node that made it."""

    __slots__ = ("dtype", "is_view", "node", "numel", "slot", "storage")

    def __init__(self, storage: Storage, numel: Size, dtype: Dtype, node: Node | None = None, slot: int = 0) -> None:
        self.storage = storage
        self.numel = numel
        self.dtype = dtype
        self.node = node
        self.slot = slot
        self.is_view = False
        storage.refs += 1

    def __del__(self) -> None:
        storage = self.storage
        storage.refs -= 1
        if storage.refs == 0:
            storage.tape.free(storage)

    @property
    def requires_grad(self) -> bool:
        return self.node is not None

    def detach(self) -> Tensor:
        """The same bytes, outside the graph."""
        return Tensor(self.storage, self.numel, self.dtype)


Backward = Callable[["Node", list["Tensor | None"]], list["Tensor | None"]]


class Node:
    """One operator of the graph: what it saved, where its gradients go, how it computes them."""

    __slots__ = ("backward", "inputs", "name", "num_outputs", "order", "saved", "where")

    def __init__(
        self, name: str, order: int, inputs: list[tuple[Node, int] | None], backward: Backward, where: str
    ) -> None:
        self.name = name
        self.order = order
        self.inputs = inputs
        self.backward = backward
        self.saved: list[Tensor | Packed] = []
        self.num_outputs = 1
        self.where = where

    def unpack(self, index: int) -> Tensor:
        """The tensor saved at ``index``; recomputes the checkpointed region that it belongs to if need be."""
        saved = self.saved[index]
        return saved.take() if isinstance(saved, Packed) else saved


class StopRecompute(Exception):
    """Every tensor that the region's backward needs has been recomputed (torch's ``_StopRecomputationError``)."""


class Region:
    """A checkpointed stretch of forward: its inputs are kept, what it saves is recomputed in backward."""

    def __init__(
        self, tape: Tape, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], on_host: bool = False
    ) -> None:
        self.tape = tape
        self.on_host = on_host
        self.function = function
        self.random_state = tape.new((tape.random_state_bytes, 0, 0, 0, 0), Dtype.UINT8, RANDOM_STATE)
        if on_host:  # torch's save_on_cpu packs what the region's input saver saves
            empty = tape.new(ZERO, Dtype.UINT8, RANDOM_STATE).storage
            inputs = tuple(Tensor(empty, each.numel, each.dtype, each.node, each.slot) for each in inputs)
        self.inputs = inputs  # held until every node of the region has let go of what it saved
        self.num_saved = 0
        self.holders: list[weakref.ref[Packed]] = []
        """What stands for each saved tensor, as long as its node lives."""
        self.recomputed: dict[int, Tensor] = {}

    def recompute(self) -> None:
        tape = self.tape
        if self.on_host:
            inputs = tuple(tape.new(tensor.numel, tensor.dtype, "residual stream") for tensor in self.inputs)
        else:
            inputs = tuple(tensor.detach() for tensor in self.inputs)
        for tensor, original in zip(inputs, self.inputs, strict=True):
            if original.node is not None:
                tape.leaf(tensor, original.node.name)
        with tape.recording(Recorder(self)), suppress(StopRecompute):
            self.function(*inputs)


class Packed:
    """A saved tensor of a checkpointed region: an index instead of bytes."""

    __slots__ = ("__weakref__", "index", "region")

    def __init__(self, region: Region, index: int) -> None:
        self.region = region
        self.index = index

    def take(self) -> Tensor:
        if self.index not in self.region.recomputed:
            self.region.recompute()
        return self.region.recomputed.pop(self.index)


class Recorder:
    """Collects what a region's second forward saves, and stops it at the last."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.count = 0

    def pack(self, tensor: Tensor) -> Tensor:
        if self.region.holders[self.count]() is not None:  # else its node has gone (torch: ``_recomputation_hook``)
            self.region.recomputed[self.count] = tensor.detach()
        self.count += 1
        if self.count == self.region.num_saved:
            raise StopRecompute
        return tensor


class Packer:
    """Counts what a region's first forward saves, and keeps none of it."""

    def __init__(self, region: Region) -> None:
        self.region = region

    def pack(self, tensor: Tensor) -> Packed:
        packed = Packed(self.region, self.region.num_saved)
        self.region.num_saved += 1
        self.region.holders.append(weakref.ref(packed))
        return packed


@dataclass(slots=True)
class Point:
    """The bytes alive after allocations and before the next release, by label; ``where`` names the stretch."""

    where: str
    index: int
    total: Size
    by_label: dict[str, Size]
    grad_numel: int
    """Elements of parameter gradients that backward has delivered so far."""


class Tape:
    """Live bytes, the graph, and every instant at which an allocation happened."""

    def __init__(self) -> None:
        self.total: Size = ZERO
        self.by_label: dict[str, Size] = {}
        self.points: list[Point] = []
        self.where = ""
        self.grad_numel = 0
        self.logits_numel = ZERO
        self.on_grad: Callable[[Parameter, list[Tensor]], None] = lambda param, held: None
        self.widens_operands = False
        """Whether an addition of two formats first copies the narrower operand (``TensorIterator.cpp``,
        ``compute_types``: on the CPU)."""
        self.kernel_buffers = False
        """Whether a matrix product holds buffers of its own while it runs (oneDNN's: on the CPU)."""
        self.random_state_bytes = 0
        """What a checkpointed region keeps of the device's random state (``preserve_rng_state``)."""
        self.in_first_forward = True
        """False while backward runs, and what it recomputes."""
        self.training = True
        """False in an evaluation: nothing is dropped (``Module.eval``)."""
        self.waiting: dict[str, Tensor] = {}
        """Gradients of parameters whose owner takes them together (``Parameter.waits``)."""
        self._rising: str | None = None
        """The stretch of the last allocation, if nothing was freed since."""
        self._orders = count(1)
        self._hooks: list[Packer | Recorder] = []
        self._grad_enabled = True

    @property
    def records(self) -> bool:
        """Whether a checkpointed region runs for the second time, so that what it saves is stored by the region."""
        return bool(self._hooks) and isinstance(self._hooks[-1], Recorder)

    def new(self, numel: Size, dtype: Dtype, label: str) -> Tensor:
        """Allocate ``numel`` elements (a size polynomial of elements) of ``dtype`` under ``label``."""
        width = dtype.nbytes
        size = (numel[0] * width, numel[1] * width, numel[2] * width, numel[3] * width, numel[4] * width)
        self.total = add(self.total, size)
        label = LOGITS_GRADIENTS if numel == self.logits_numel and label in (GRADIENTS, TEMPORARY) else label
        self.by_label[label] = add(self.by_label[label], size) if label in self.by_label else size
        self._rising = self.where
        return Tensor(Storage(self, size, label), numel, dtype)

    def settle(self) -> None:
        """Note the instant, if bytes have only grown since the last one: no other before it was as high."""
        if self._rising is not None:
            self.points.append(Point(self._rising, len(self.points), self.total, dict(self.by_label), self.grad_numel))
            self._rising = None

    def free(self, storage: Storage) -> None:
        """The last reference to a storage has gone."""
        self.settle()
        self.total = sub(self.total, storage.size)
        self._take_off(storage)

    def _take_off(self, storage: Storage) -> None:
        left = sub(self.by_label.get(storage.label, ZERO), storage.size)
        if left == ZERO:
            self.by_label.pop(storage.label, None)
        else:
            self.by_label[storage.label] = left

    def relabel(self, storage: Storage, label: str) -> None:
        """Count a storage under another heading from now on."""
        self.settle()
        self._take_off(storage)
        self.by_label[label] = add(self.by_label.get(label, ZERO), storage.size)
        storage.label = label

    def leaf(self, tensor: Tensor, name: str = "input") -> Tensor:
        """Make ``tensor`` require a gradient that nobody collects (the input of a checkpointed region)."""
        tensor.node = Node(name, next(self._orders), [], lambda node, grads: [], self.where)
        return tensor

    def attach(
        self, name: str, out: Tensor, inputs: list[Tensor | None], saved: list[Tensor], backward: Backward
    ) -> Tensor:
        """Put ``out`` on the graph if any of ``inputs`` requires a gradient."""
        node = self.record(name, inputs, saved, backward)
        if node is not None:
            out.node, out.slot = node, 0
        return out

    def record(self, name: str, inputs: list[Tensor | None], saved: list[Tensor], backward: Backward) -> Node | None:
        """The node of an operator whose result is still to be made, or None if no input requires a gradient.

        torch saves an operator's inputs before it runs, so recomputing can stop between the two.
        """
        if not self._grad_enabled:
            return None
        edges = [
            (tensor.node, tensor.slot) if tensor is not None and tensor.node is not None else None for tensor in inputs
        ]
        if not any(edges):
            return None
        node = Node(name, next(self._orders), edges, backward, self.where)
        for tensor in saved:
            held: Tensor | Packed = Tensor(tensor.storage, tensor.numel, tensor.dtype)
            if self._hooks:
                held = self._hooks[-1].pack(held)  # type: ignore[arg-type]
            node.saved.append(held)
        return node

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        """Name the stretch of the step that the following allocations belong to."""
        before, self.where = self.where, where
        try:
            yield
        finally:
            self.where = before

    @contextmanager
    def without_graph(self) -> Iterator[None]:
        """``torch.no_grad``."""
        before, self._grad_enabled = self._grad_enabled, False
        try:
            yield
        finally:
            self._grad_enabled = before

    @contextmanager
    def recording(self, hook: Packer | Recorder) -> Iterator[None]:
        self._hooks.append(hook)
        try:
            yield
        finally:
            self._hooks.pop()

    def checkpoint(self, function: Callable[..., Tensor], *inputs: Tensor, on_host: bool = False) -> Tensor:
        """Run ``function`` and keep only ``inputs``; what it saves is recomputed when backward asks.

        ``on_host``: the inputs are kept in the host's memory, and copied back to be used.
        """
        held = tuple(Tensor(t.storage, t.numel, t.dtype, t.node, t.slot) for t in inputs)
        region = Region(self, function, held, on_host)
        del held
        with self.recording(Packer(region)):
            return function(*inputs)

    def backward(self, root: Tensor, grad: Tensor) -> None:
        """Run the graph below ``root`` in torch's order; parameter gradients go to ``on_grad``."""
        assert root.node is not None  # job_from_run refuses a method that trains nothing
        outer, self.in_first_forward = self.in_first_forward, False
        waiting = _count_dependencies(root.node)
        buffers: dict[int, list[Tensor | None]] = {id(root.node): [grad]}
        del grad
        ready = [(-root.node.order, 0, root.node)]
        num_pushed = 1  # of equals the one that was ready first runs first
        del root
        while ready:
            node = heapq.heappop(ready)[2]
            grads = buffers.pop(id(node))
            where, self.where = self.where, node.where if node.where else self.where
            outputs = node.backward(node, grads)
            del grads
            node.saved.clear()
            for position, edge in enumerate(node.inputs):
                if edge is None:
                    continue
                target, slot = edge
                out = outputs[position]
                outputs[position] = None
                buffer = buffers.setdefault(id(target), [None] * target.num_outputs)
                if out is not None:
                    self._accumulate(buffer, slot, out)
                del out
                waiting[id(target)] -= 1
                if waiting[id(target)] == 0:
                    heapq.heappush(ready, (-target.order, num_pushed, target))
                    num_pushed += 1
            self.where = where
            node.inputs = []
        self.in_first_forward = outer

    def _accumulate(self, buffer: list[Tensor | None], slot: int, grad: Tensor) -> None:
        held = buffer[slot]
        if held is None:
            buffer[slot] = grad
        elif held.storage.refs != 1 or held.is_view:
            buffer[slot] = self.new(held.numel, held.dtype, GRADIENTS)
        # else: added in place, nothing is allocated


def _count_dependencies(root: Node) -> dict[int, int]:
    waiting: dict[int, int] = {}
    stack, seen = [root], {id(root)}
    while stack:
        for edge in stack.pop().inputs:
            if edge is None:
                continue
            target = edge[0]
            waiting[id(target)] = waiting.get(id(target), 0) + 1
            if id(target) not in seen:
                seen.add(id(target))
                stack.append(target)
    return waiting
