"""Faults that a rank meets for real. Python imports this by itself where this directory is on PYTHONPATH.

``VRAMPLAN_TEST_FAULTS`` holds a JSON list; each fault names the rank, a pattern of the phase and what happens when it
begins. ``times`` (1 unless given) is counted over all attempts of a run, in files under ``marks``; 0 is every time.

- ``{"do": "data", "more": BYTES}``: RLIMIT_DATA that many bytes above what the process takes: allocations fail
- ``{"do": "data_from_load", "more": BYTES}``: the same above what it took when the model's loading began
- ``{"do": "file_size", "bytes": N}``: RLIMIT_FSIZE: no file can grow beyond
- ``{"do": "group", "path": DIRECTORY, "more": BYTES}``: the rank moves into a memory control group that gives it that
  many bytes more than it has, and the kernel kills it beyond
- ``{"do": "signal", "number": N}``: a signal to the rank itself (SIGKILL, SIGSTOP)
- ``{"do": "stand"}``: the main thread stands still for ever, while the others live
- ``{"do": "cut"}``: the largest file of the newest checkpoint loses its second half, and the rank is killed
- ``{"do": "half_marker"}``: the rank leaves half a marker of an out-of-memory and ends with its exit code
"""

import json
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path

_INFINITY = resource.RLIM_INFINITY


def _data_bytes() -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.partition("VmData:")[2].split(maxsplit=1)[0]) * 1024


def _is_due(fault, rank, phase):
    if fault["rank"] != rank or not re.fullmatch(fault["phase"], phase):
        return False
    times = fault.get("times", 1)
    marks = Path(fault["marks"])
    marks.mkdir(parents=True, exist_ok=True)
    done = len(list(marks.iterdir()))
    if times and done >= times:
        return False
    (marks / str(done)).touch()
    return True


def _happen(fault, at_load):
    if fault["do"] == "data":
        resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + fault["more"], _INFINITY))
    elif fault["do"] == "data_from_load":
        resource.setrlimit(resource.RLIMIT_DATA, (at_load + fault["more"], _INFINITY))
    elif fault["do"] == "file_size":
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], _INFINITY))
    elif fault["do"] == "group":
        _move(Path(fault["path"]), fault["more"])
    elif fault["do"] == "signal":
        os.kill(os.getpid(), fault["number"])
    elif fault["do"] == "stand":
        while True:
            time.sleep(60)
    elif fault["do"] == "cut":
        newest = max((_run_dir() / "checkpoints").glob("step-*"))
        largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault["do"] == "half_marker":
        path = _run_dir() / "ranks" / f"rank{fault['rank']}.failure.json"
        path.write_text('{"rank": 1, "phase": "step2.micro1.forw', encoding="utf-8")
        os._exit(86)


def _move(group, more):
    """What a process holds already stays with the group that it comes from (both versions)."""
    for name in ("memory.limit_in_bytes", "memory.max"):
        if (group / name).exists():
            (group / name).write_text(str(more))
    for name in ("memory.memsw.limit_in_bytes", "memory.swap.max"):  # the one counts memory too, the other does not
        if (group / name).exists():
            (group / name).write_text(str(more if "memsw" in name else 0))
    (group / "cgroup.procs").write_text(str(os.getpid()))


def _run_dir():
    return Path(sys.orig_argv[sys.orig_argv.index("vramplan.train") + 2])


def _install(faults, rank):
    from vramplan.train import status

    mark, at_load = status.RankStatus.mark, [0]

    def mark_and_fail(self, phase, step=0, micro=0):
        mark(self, phase, step, micro)
        if phase == "model_load":
            at_load[0] = _data_bytes()
        for fault in faults:
            if _is_due(fault, rank, phase):
                _happen(fault, at_load[0])

    status.RankStatus.mark = mark_and_fail


_faults = os.environ.get("VRAMPLAN_TEST_FAULTS")
if _faults and "RANK" in os.environ and sys.orig_argv[-1:] and "vramplan.train" in sys.orig_argv:
    _install(json.loads(_faults), int(os.environ["RANK"]))
