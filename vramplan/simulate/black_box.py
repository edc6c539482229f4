"""Where a simulation was when a kernel took its process along. No torch here.

A kernel that is called by address (``ctypes``) finds no bytes behind a fake tensor, and the process dies of it with all
that it had traced. Where it was stands in a small file that outlives it; the run is then simulated again up to there.
"""

from __future__ import annotations

import mmap
import signal
from dataclasses import dataclass
from pathlib import Path

from vramplan.errors import SimulationError

_SIZE = 4096


@dataclass(frozen=True, slots=True)
class Death:
    """Where an earlier process of the same simulation died, and by which signal."""

    phase: str
    module: str
    """Empty: outside of any."""
    signal: int

    def __str__(self) -> str:
        where = self.module or "code outside of any module"
        name = signal.Signals(self.signal).name
        return (
            f"{self.phase}: {where} cannot be simulated: {name} ended the process in it, as happens to a kernel that "
            "takes tensors by their address: fake tensors have none (torch.library.custom_op can give it a fake)"
        )


class BlackBox:
    """Keeps the last whereabouts in a file of one page, mapped so that a write needs no system call.

    A run whose earlier process died goes no further than there.
    """

    def __init__(self, path: Path | None = None, death: Death | None = None) -> None:
        self._death = death
        self._page: mmap.mmap | None = None
        if path is not None:
            path.write_bytes(bytes(_SIZE))
            with path.open("r+b") as file:
                self._page = mmap.mmap(file.fileno(), _SIZE)

    def arrive(self, phase: str, module: str = "") -> None:
        """The run comes to a module of a phase, or to the phase.

        Raises:
            SimulationError: this is where the earlier process died.
        """
        self.note(phase, module)
        if self._death is not None and (phase, module) == (self._death.phase, self._death.module):
            raise SimulationError(str(self._death))

    def note(self, phase: str, module: str = "") -> None:
        """The run is there."""
        if self._page is not None:
            line = f"{phase}\n{module}".encode()[: _SIZE - 1]
            self._page[: len(line) + 1] = line + b"\0"


def read_death(path: Path, signal_number: int) -> Death | None:
    """What a black box says after a signal ended its process; None where it says nothing."""
    if not path.exists():
        return None
    phase, _, module = path.read_bytes().partition(b"\0")[0].decode(errors="replace").partition("\n")
    return Death(phase, module, signal_number) if phase else None
