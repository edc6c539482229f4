"""Reads a file of JSON lines while another process writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vramplan.measure.run_dir import whole_events


class Tail:
    """Gives each event once, when its line is complete. Starts at the end of what is there already."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def read(self) -> list[dict[str, Any]]:
        """The events that were completed since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return []
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole_events(whole)
