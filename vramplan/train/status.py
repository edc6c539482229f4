"""What a rank says of itself from outside's view: its phase and heartbeat while it lives, its failure when it ends."""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vramplan.emit.launch import SUPERVISOR_VARIABLE, process_identity
from vramplan.errors import VramplanError
from vramplan.facts.host import node_identity
from vramplan.measure.marker import OUT_OF_MEMORY_EXIT_CODE, Marker, is_of_host, is_out_of_memory
from vramplan.measure.run_dir import write_json
from vramplan.train.disk import DiskReserve, full_disk_sentence
from vramplan.train.out_of_memory import Reserve, data_bytes, memory_state
from vramplan.train.progress import Activity, Told, tell

ORPHAN_EXIT_CODE = 87
STOPPED_EXIT_CODE = 88
_WIDTH = 512
_BEAT_S = 1.0


@dataclass(frozen=True, slots=True)
class Status:
    """Where a rank is. ``step`` and ``micro`` count from 1; 0 outside the steps."""

    rank: int
    pid: int
    phase: str = "start"
    step: int = 0
    micro: int = 0
    time: float = 0.0
    """Of the last heartbeat, in seconds since 1970."""
    progress: int = 0
    """Rises as the rank goes on (``train/progress.py``): one that lives and stands still beats only."""
    node: str = ""
    """``facts.host.node_identity``: where ``pid`` means something."""


class RankStatus:
    """A rank's status file, rewritten in place at each change and each second.

    One ``pwrite`` of a fixed width: the file survives SIGKILL, and costs microseconds.
    """

    def __init__(self, path: Path, rank: int, plan: str = "") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
        self.now = Status(rank, os.getpid(), node=node_identity())
        self.plan = plan
        self.device = "cpu"
        """Kind of the device on which the plan's tensors lie."""
        self.reserve = Reserve()
        self.disk_reserve = DiskReserve(path.with_name(f".{path.name}.reserve"))
        self.baseline_bytes = 0
        self.shapes: tuple[tuple[int, ...], ...] = ()
        self.samples: tuple[int, ...] = ()
        self._seen_at_work = 0
        self._write()

    def mark(self, phase: str, step: int = 0, micro: int = 0) -> None:
        if not micro:
            self.hold((), ())
        tell()
        self.now = replace(self.now, phase=phase, step=step, micro=micro)
        self._write()

    def remember_baseline(self) -> None:
        """What the process takes before it holds anything of the model."""
        self.baseline_bytes = data_bytes()

    def hold(self, shapes: tuple[tuple[int, ...], ...], samples: tuple[int, ...]) -> None:
        """The micro-batch that is worked on, to be named if it does not fit."""
        self.shapes, self.samples = shapes, samples

    def beat(self, at_work: bool = False) -> None:
        """Says that the rank lives; ``at_work``: and that it was seen to go on."""
        self._seen_at_work += at_work
        self._write()

    def _write(self) -> None:
        progress = Told.count + self._seen_at_work
        text = json.dumps(asdict(replace(self.now, time=time.time(), progress=progress)))
        os.pwrite(self._file, text.ljust(_WIDTH - 1).encode() + b"\n", 0)


def start_guard(status: RankStatus, stop: Path | None = None) -> None:
    """A thread that beats for the rank, and ends the process at once when its launcher or supervisor is gone or the
    file ``stop`` is there, by which ranks on other nodes are told."""
    threading.Thread(target=_guard, args=(status, os.getppid(), stop), name="vramplan-guard", daemon=True).start()


def _guard(status: RankStatus, launcher: int, stop: Path | None) -> None:
    supervisor, activity = os.environ.get(SUPERVISOR_VARIABLE), Activity()
    while os.getppid() == launcher and (supervisor is None or _lives(supervisor)):
        if stop is not None and stop.exists():
            os._exit(STOPPED_EXIT_CODE)
        status.beat(activity.look())
        time.sleep(_BEAT_S)
    if stop is not None:
        with suppress(OSError):  # the other nodes' ranks do not see that the supervisor is gone
            stop.touch()
    os._exit(ORPHAN_EXIT_CODE)


def _lives(identity: str) -> bool:
    return process_identity(int(identity.partition(":")[0])) == identity


def write_failure(path: Path, status: RankStatus, error: BaseException) -> int:
    """Tells the supervisor why this rank ends; gives the exit code to end with."""
    status.reserve.release()
    status.disk_reserve.release()
    full_disk = full_disk_sentence(error)
    now, kind, message = status.now, type(error).__name__, full_disk or str(error)
    out_of_memory = full_disk is None and is_out_of_memory(kind, message)
    by_user = full_disk is not None or isinstance(error, VramplanError)
    code = error.exit_code if isinstance(error, VramplanError) else VramplanError.exit_code if by_user else 1
    code = OUT_OF_MEMORY_EXIT_CODE if out_of_memory else code
    trace = "".join(traceback.format_exception(error))
    memory = None
    if out_of_memory:
        of_host = status.device == "cpu" or is_of_host(kind, message, trace)
        memory = memory_state(message, status.baseline_bytes, status.reserve.num_bytes, of_host=of_host)
    marker = Marker(
        rank=now.rank,
        phase=now.phase,
        kind=kind,
        message=message,
        by_user=by_user and not out_of_memory,
        exit_code=code,
        time=time.time(),
        step=now.step,
        micro=now.micro,
        plan=status.plan,
        device=status.device,
        memory=memory,
        shapes=status.shapes,
        samples=status.samples,
        traceback=trace,
    )
    with suppress(OSError):  # on a full disk the exit code has to do
        write_json(path, marker.to_dict())
    return code
