"""Whether a rank goes on, apart from living: what its main thread tells, and what the system counts of its work.

A thread that beats lives on when the main one stands still, so the main one tells of each batch, parameter and chunk of
a file that it is through with. What it does inside one call of another library (a checkpoint that is written, weights
that are read) is seen from bytes and pages instead. Its time on the CPU says nothing: a collective that waits for a
peer may spin (DeepSpeed's all-reduce in shared memory, csrc/cpu/comm/shm.cpp, ``wait_buffer_state_until_2``).
"""

from __future__ import annotations

from vramplan.measure.work_done import WorkDone, work_done, work_of_tree


class Told:
    """What the main thread is through with, counted. One process is one rank, so there is one."""

    count = 0


def tell() -> None:
    """Says that the main thread has come further; cheap enough for every batch and every parameter."""
    Told.count += 1


class Activity:
    """Work of this process and of those that it started (a compiler), without the thread that looks: bytes read and
    written (the page cache's included), and pages taken."""

    def __init__(self) -> None:
        self._last = self._work()

    def look(self) -> bool:
        """Whether there was any since the last look; always by the same thread."""
        before, self._last = self._last, self._work()
        return (self._last - before).moves_memory

    def _work(self) -> WorkDone:
        return work_of_tree("self") - work_done("thread-self", waited_for=False)
