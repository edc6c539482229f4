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
        held = [grad for grad in grads if grad is not None]
        grads.clear()
        if held and self.waits:
            self.storage.tape.waiting[self.name] = held.pop()
        elif held:
            self._hand_over(held)
        return []

    def _hand_over(self, held: list[Tensor]) -> None:
        """``held``: the gradient, of which there is no other name, so that its owner can let go of it."""
        tape = self.storage.tape
        tape.settle()
        tape.grad_numel += self.grad_numel
        tape.on_grad(self, held)

    def deliver(self) -> None:
        """Hand over a gradient that has waited."""
        waiting = self.storage.tape.waiting
        if self.name in waiting:
            self._hand_over([waiting.pop(self.name)])
