"""The directory that ``vramplan simulate -o`` writes: the timeline as a page, and a snapshot for torch's viewer."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vramplan.errors import SpecError
from vramplan.report.simulated import title_of
from vramplan.report.timeline_html import write_timeline_page
from vramplan.simulate.asked import ClosedRun
from vramplan.simulate.result import SimulationResult
from vramplan.simulate.snapshot import write_snapshot
from vramplan.simulate.trace_file import load_trace
from vramplan.spec.alloc_conf import AllocConf


def write_simulation_dir(closed: ClosedRun, found: SimulationResult, trace: Path, directory: Path) -> list[Path]:
    """Writes timeline.html and snapshot.pickle; the paths in that order. ``trace``: the file of the whole trace.

    A CPU has no caching allocator: its snapshot shows what torch's would hold on a GPU without a limit.

    Raises:
        SpecError: the directory cannot be written.
    """
    page, snapshot = directory / "timeline.html", directory / "snapshot.pickle"
    limit = None if found.capacity_bytes is None else found.capacity_bytes - found.overhead_bytes
    try:
        write_timeline_page(found, page, title_of(closed, found))
        write_snapshot(
            load_trace(trace),
            snapshot,
            AllocConf.parse(closed.run.alloc_conf),
            limit if found.device_type == "cuda" else None,
        )
    except OSError as error:
        raise _unwritable(directory, error) from error
    return [page, snapshot]


@contextmanager
def trace_beside(directory: Path) -> Iterator[Path]:
    """Makes the directory, and a name in it for the trace's file, which is gone in the end.

    Raises:
        SpecError: the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".trace-", dir=directory)
    except OSError as error:
        raise _unwritable(directory, error) from error
    with scratch as name:
        yield Path(name) / "trace.npz"


def _unwritable(directory: Path, error: OSError) -> SpecError:
    return SpecError(f"{directory}: cannot be written ({error.strerror}); choose another -o")
