"""Which line of Python asked for a tensor."""

from __future__ import annotations

import sys
from types import CodeType, FrameType

from vramplan.memory.birth import PLUMBING

_MACHINERY = (
    *PLUMBING,
    "torch/_dynamo/",
    "torch/_subclasses/",
    "torch/_compile.py",
    "torch/_library/",
    "torch/utils/_python_dispatch.py",
    "vramplan/simulate/",
)
"""Files that stand between the line that is looked for and the tracker."""


class Lines:
    """Texts of lines, remembered."""

    def __init__(self) -> None:
        self._texts: dict[tuple[CodeType, int], str] = {}
        self._roots = sorted((path.rstrip("/") + "/" for path in sys.path if path), key=len, reverse=True)

    def calling(self, depth: int) -> tuple[str, str]:
        """The innermost line outside torch's plumbing, from ``depth`` calls above on, and the line that called it;
        each as ``file:line function``."""
        inner = ""
        frame: FrameType | None = sys._getframe(depth)
        while frame is not None:
            text = self._text(frame)
            if text and inner:
                return inner, text
            inner = inner or text
            frame = frame.f_back
        return inner, ""

    def _text(self, frame: FrameType) -> str:
        """Empty for machinery."""
        key = (frame.f_code, frame.f_lineno)
        text = self._texts.get(key)
        if text is None:
            path = self._short(frame.f_code.co_filename)
            is_machinery = path.startswith(_MACHINERY)
            text = self._texts[key] = "" if is_machinery else f"{path}:{frame.f_lineno} {frame.f_code.co_name}"
        return text

    def _short(self, path: str) -> str:
        """The path from its package on, as torch's profiler writes it."""
        for root in self._roots:
            if path.startswith(root):
                return path[len(root) :]
        return path
