"""A weight on the tape: a leaf of the graph, whose gradient goes to its owner."""

from __future__ import annotations

from vramplan.facts.dtype import Dtype
from vramplan.memory.size import ZERO
from vramplan.memory.tape import LEAF, Node, Storage, Tape, Tensor


class Parameter(Tensor):
    """A weight: its bytes are counted among the model's states, not here; its gradient goes to ``tape.on_grad``."""

    __slots__ = ("grad_numel", "lowered", "name", "waits")

    def __init__(self, tape: Tape, name: str, numel: int, dtype: Dtype, trainable: bool) -> None:
        super().__init__(Storage(tape, ZERO, "parameters"), (numel, 0, 0, 0, 0), dtype)
        self.storage.refs += 1  # never freed: the model owns it
        self.name = name
        self.grad_numel = numel
        self.lowered = False
        """Whether ZeRO-3 gathers it in autocast's format."""
        self.waits = False
        """Whether its gradient stays with it until ``deliver`` is called."""
        if trainable:
            self.node = Node(LEAF, 1 << 62, [], self._deliver, "")

    def _deliver(self, node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
        grad = grads[0]
        grads.clear()
        if grad is not None and self.waits:
            self.storage.tape.waiting[self.name] = grad
        elif grad is not None:
            self._hand_over(grad)
        return []

    def _hand_over(self, grad: Tensor) -> None:
        tape = self.storage.tape
        tape.settle()
        tape.grad_numel += self.grad_numel
        tape.on_grad(self, grad)

    def deliver(self) -> None:
        """Hand over a gradient that has waited."""
        grad = self.storage.tape.waiting.pop(self.name, None)
        if grad is not None:
            self._hand_over(grad)
