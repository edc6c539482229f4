"""Which modules ZeRO-3 gathers as one by ``stage3_module_granularity_threshold``.

Source: deepspeed 0.19.8, runtime/zero/parameter_offload.py, ``_get_granularity_recursively`` and
``_set_leaf_by_threshold_preorder``: a module's granularity is its parameters over the modules with parameters in it;
from the outside in, those at or below the threshold are taken whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from vramplan.facts.architecture import Architecture

MAX_LEAF_NUMEL = 1_000_000_000
"""``Z3_MAX_LEAF_SIZE``: larger modules are never taken whole."""

Leaves = Literal["none", "layers", "other"]
"""What is taken whole: nothing, every decoder layer, or something else."""


@dataclass(slots=True)
class _Module:
    """A module by its path; one whose modules have numbers for names is a list, which cannot be taken whole."""

    path: str
    own_numel: int = 0
    children: dict[str, _Module] = field(default_factory=dict)
    numel: int = 0
    num_modules: int = 0

    @property
    def is_list(self) -> bool:
        return bool(self.children) and all(name.isdecimal() for name in self.children)

    def count(self) -> None:
        """Parameters, and modules with parameters, of all below."""
        self.numel, self.num_modules = self.own_numel, 0 if self.is_list else 1
        for child in self.children.values():
            child.count()
            self.numel += child.numel
            self.num_modules += child.num_modules

    def taken(self, threshold: int) -> Iterator[str]:
        """Paths of the modules that are taken whole."""
        can_be = bool(self.children) and not self.is_list and self.numel <= MAX_LEAF_NUMEL
        if can_be and self.numel // self.num_modules <= threshold:
            yield self.path
            return
        for child in self.children.values():
            yield from child.taken(threshold)


@lru_cache(maxsize=64)
def leaves(architecture: Architecture, threshold: int) -> Leaves:
    """What a threshold of so many elements takes whole in a model without adapters."""
    layers = {f"{architecture.layer_prefix}.{index}" for index in range(architecture.num_layers)}
    found = set(_tree(architecture).taken(threshold)) if threshold else set()
    return "none" if not found else "layers" if found == layers else "other"


def _tree(architecture: Architecture) -> _Module:
    root = _Module("")
    tensors = [(tensor.name, tensor.numel) for tensor in architecture.named_tensors()]
    if architecture.tied_embeddings:  # the head's own module has the table's weight too
        tensors.append((f"{architecture.head.name}.weight", architecture.head.weight_numel))
    for name, numel in tensors:
        module, path = root, ""
        for part in name.split(".")[:-1]:
            path = f"{path}.{part}" if path else part
            module = module.children.setdefault(part, _Module(path))
        module.own_numel += numel
    root.count()
    return root
