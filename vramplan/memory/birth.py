"""Where bytes come from: the birthplace of a block, measured or simulated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Birth:
    """Where a block was asked for. Empty texts: not known."""

    op: str = ""
    """Innermost operator, e.g. ``aten::addmm``."""
    node: str = ""
    """Autograd node running, e.g. ``MmBackward0``; empty in forward."""
    module: str = ""
    """Full name of the innermost module (in backward: the one whose forward made the node)."""
    frame: str = ""
    """Innermost Python line outside torch's plumbing: ``file:line function``."""
    outer_frame: str = ""
    """The line that called it."""
    phase: str = ""

    def to_dict(self) -> dict[str, str]:
        return {name: value for name in self.__slots__ if (value := getattr(self, name))}


PLUMBING = (
    "torch/nn/modules/",
    "torch/autograd/",
    "torch/_ops.py",
    "torch/_tensor.py",
    "torch/utils/_contextlib.py",
    "deepspeed/utils/nvtx.py",
)
"""Files that stand between the line that asked for a tensor and the operator that made it."""
