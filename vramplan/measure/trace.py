"""Where the bytes alive at a phase's peak were born, read off the profiler's event tree.

With stacks on, each allocation hangs in the tree below the operators, autograd nodes, modules and Python calls that
were running. An autograd node has no Python of its own: it is given the module and line of the forward operator
with its sequence number.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vramplan.measure.blocks import MemoryEvent
from vramplan.memory.birth import PLUMBING, Birth

_ENGINE_PREFIX = "autograd::engine::evaluate_function: "


@dataclass(frozen=True, slots=True)
class _Scope:
    """What surrounds an event: innermost operator, autograd node, module address, and the innermost line."""

    op: str = ""
    node: str = ""
    module: int = 0
    frame: str = ""
    outer_frame: str = ""


@dataclass
class BirthReader:
    """Turns event trees into memory events with births. Keeps the forward's lines for the backward's nodes."""

    module_names: dict[int, str] = field(default_factory=dict)
    """Full names of modules by ``id``; fill it when the model exists."""
    _forward: dict[int, _Scope] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keep_code_alive()

    def name_modules(self, named_modules: Iterator[tuple[str, Any]]) -> None:
        self.module_names.update({id(module): name for name, module in named_modules})

    def read(self, tree: list[Any]) -> Iterator[MemoryEvent]:
        """Memory events of a session's tree, in the tree's order."""
        stack = [(event, _Scope()) for event in reversed(tree)]
        while stack:
            event, scope = stack.pop()
            kind = event.tag.name
            if kind == "Allocation":
                fields = event.extra_fields
                if fields.device.type == "cpu":
                    yield MemoryEvent(event.start_time_ns, fields.ptr, fields.alloc_size, self._birth(scope))
                continue
            inner = self._enter(event, kind, scope)
            stack.extend((child, inner) for child in reversed(event.children))

    def _enter(self, event: Any, kind: str, scope: _Scope) -> _Scope:
        fields = event.extra_fields
        if kind == "TorchOp":
            return self._enter_op(event.name, fields.sequence_number, scope)
        if kind in ("PyCall", "PyCCall"):
            caller = fields.caller
            frame = f"{caller.file_name}:{caller.line_number} {caller.function_name}"
            module = fields.module.self_ptr if kind == "PyCall" and fields.module else scope.module
            if caller.file_name.startswith(PLUMBING) or not caller.line_number:
                return _Scope(scope.op, scope.node, module, scope.frame, scope.outer_frame)
            return _Scope(scope.op, scope.node, module, frame, scope.frame)
        return scope

    def _enter_op(self, name: str, sequence: int, scope: _Scope) -> _Scope:
        if name.startswith(_ENGINE_PREFIX):
            born = self._forward.get(sequence, scope)
            return _Scope("", name.removeprefix(_ENGINE_PREFIX), born.module, born.frame, born.outer_frame)
        inner = _Scope(name, scope.node, scope.module, scope.frame, scope.outer_frame)
        if sequence >= 0 and not scope.node:
            self._forward[sequence] = inner
        return inner

    def _birth(self, scope: _Scope) -> Birth:
        module = self.module_names.get(scope.module, "")
        return Birth(scope.op, scope.node, module, scope.frame, scope.outer_frame)


def keep_code_alive() -> None:
    """From now on keeps every code object that is executed by import or ``exec``.

    The profiler holds file and function names by bare pointers into code objects (``CodeLocation`` in
    torch/csrc/autograd/profiler_python.cpp); a module's own code dies after its import, and its names with it.
    """
    if not _kept_code:
        _kept_code.append(None)
        sys.addaudithook(_keep)


_kept_code: list[object] = []


def _keep(event: str, args: tuple[object, ...]) -> None:
    if event == "exec":
        _kept_code.append(args[0])


def largest_live(live: Mapping[int, MemoryEvent], count: int | None = None) -> list[dict[str, Any]]:
    """Blocks alive at a peak, equal births together, largest sum first: bytes, how many, and where they were born."""
    groups: dict[Birth, list[int]] = {}
    for event in live.values():
        groups.setdefault(event.birth or Birth(), []).append(event.num_bytes)
    ordered = sorted(groups.items(), key=lambda item: -sum(item[1]))
    return [
        {"bytes": sum(sizes), "count": len(sizes), "largest_bytes": max(sizes)} | birth.to_dict()
        for birth, sizes in ordered[:count]
    ]
