"""Ctrl-C and SIGTERM while ranks run: they end the run in good order, however often and whenever they come."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """SIGINT or SIGTERM came while ranks ran."""


@contextmanager
def interrupts_raise() -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM raises ``Interrupted`` instead of ending the process; those that follow do
    nothing, so that what it sets off is done to its end."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in _NUMBERS:
            signal.signal(each, _do_nothing)  # not SIG_IGN, which a started process would inherit
        raise Interrupted(signal.Signals(number).name)

    with _handled_by(stop):
        yield


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM wait: one that came is met at the end, as it would have been without this."""
    came: list[int] = []
    with _handled_by(lambda number, frame: came.append(number)):
        yield
    if came:
        signal.raise_signal(came[0])


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in _NUMBERS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    pass
