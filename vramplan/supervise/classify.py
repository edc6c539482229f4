"""Why a run ended: from what was found of it to one cause. A pure function; ``evidence.py`` collects what it reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from vramplan.measure.marker import OUT_OF_MEMORY_EXIT_CODE, Marker, MemoryState, is_out_of_memory
from vramplan.units import format_bytes


class Cause(Enum):
    """What ended a run. The value is how it is named to the user."""

    LOGITS = "logits and loss"
    ACTIVATIONS = "activations"
    LOAD = "loading the model"
    INIT = "building the engine"
    FIRST_STEP = "the first optimizer step"
    STEP = "the optimizer step"
    REDUCTION = "gradient reduction"
    EVALUATION = "evaluation"
    SAVE = "saving"
    RESUME = "resuming"
    FRAGMENTATION = "fragmentation"
    COMMUNICATOR = "communication"
    COMPILER = "an ended compiler"
    HOST_MEMORY = "host memory"
    KILLED = "a killed process"
    HANG = "a hang"
    NAN = "a loss or gradient that is not finite"
    USER = "the user's own error"
    ERROR = "an error of the program"


MEMORY_CAUSES = frozenset(
    {
        Cause.LOGITS,
        Cause.ACTIVATIONS,
        Cause.LOAD,
        Cause.INIT,
        Cause.FIRST_STEP,
        Cause.STEP,
        Cause.REDUCTION,
        Cause.EVALUATION,
        Cause.SAVE,
        Cause.RESUME,
        Cause.FRAGMENTATION,
        Cause.HOST_MEMORY,
    }
)
"""Those that another plan can mend."""
PASSING_CAUSES = frozenset({Cause.KILLED, Cause.HANG, Cause.COMMUNICATOR, Cause.COMPILER})
"""Those that the same plan may not meet again."""

_SIGKILL_CODES = (-9, 137, 247)
"""Of a process, of a shell that waited for it, and of DeepSpeed's launcher (``sys.exit(-9)``)."""
_ABORT_CODES = (-6, 134, 250)
_OWN_CODES = (1, 2, 3)
"""Of a rank that met an error."""
# lines of a traceback: names of functions and what is written on the lines that were reached
_LOSS_SOURCES = ("cross_entropy", "loss_function(", "loss_utils", "lm_head(", "embed_out(", "in token_nll")
_REDUCTION_SOURCES = (
    "average_tensor",
    "allreduce_bucket",
    "reduce_ipg_grads",
    "reduce_independent_p_g_buckets",
    "setup_buckets",
    "ipg_buckets",
    "allreduce_gradients",
    "buffered_allreduce_fallback",
    "__avg_scatter",
    "_partition_grads",
)
_COMMUNICATION_TEXTS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "gloo/transport",
    "NCCL error",
    "ncclUnhandledCudaError",
    "ncclSystemError",
    "ncclRemoteError",
    "Timed out waiting",
    "recvBytes",
    "DistNetworkError",
    "failed to connect",
    "EADDRINUSE",  # another process took the port between its choice and the ranks' meeting
)
_NAN_TEXT = "the loss is "
_ENDED_COMPILER = "CompilerEnded"
"""What a rank raises that waited for another run's compiler (``rank/baton.py``)."""
_OVERFLOW_TEXTS = ("loss scale already at minimum",)
"""Of fp16's scaling, where gradients overflow at every scale (deepspeed/runtime/fp16/loss_scaler.py:259)."""


@dataclass(frozen=True, slots=True)
class RankState:
    """What a rank's status file said last."""

    rank: int
    phase: str
    step: int = 0
    micro: int = 0


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything that is known of a run that ended."""

    launcher_code: int | None
    """None where it had to be ended."""
    markers: tuple[Marker, ...] = ()
    ranks: tuple[RankState, ...] = ()
    dead: tuple[int, ...] = ()
    """Ranks whose process was gone while others lived, without a marker."""
    silent: tuple[int, ...] = ()
    """Ranks that lived without a heartbeat."""
    stuck_s: float | None = None
    """For how long no rank went on, where that was too long."""
    stuck_rank: int | None = None
    """Which of them stood still first."""
    tails: Mapping[int, str] | None = None
    """The last of each rank's output."""
    oom_kills: int = 0
    """By which the kernel's counters of processes that it killed for want of memory rose shortly before the end."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The cause, where it was met, and what is known of the bytes."""

    cause: Cause
    phase: str
    rank: int | None = None
    step: int = 0
    memory: MemoryState | None = None
    marker: Marker | None = None

    @property
    def is_memory(self) -> bool:
        """Whether another plan can mend it."""
        return self.cause in MEMORY_CAUSES

    @property
    def may_pass(self) -> bool:
        """Whether the same plan may be tried again."""
        return self.cause in PASSING_CAUSES

    def __str__(self) -> str:
        who = "the run" if self.rank is None else f"rank {self.rank}"
        if self.cause is Cause.HOST_MEMORY and self.marker is None:
            return f"{who} was killed for want of host memory in {self.phase}"
        if self.cause is Cause.HANG:
            return f"{who} hung in {self.phase}"
        if self.cause is Cause.KILLED:
            return f"{who} was killed in {self.phase}"
        if not self.is_memory:
            return f"{who} failed in {self.phase}: {self.cause.value}"
        return f"{who} ran out of memory in {self.phase} ({self.cause.value}{bytes_clause(self.memory)})"


def classify(found: Evidence) -> Verdict:
    """The cause. Memory comes before everything else that ranks say, for the others fail when their peer is gone."""
    for of_some in (_of_memory, _of_lost_marker, _of_host_memory, _of_user, _of_hang, _of_error, _of_death):
        verdict = of_some(found)
        if verdict is not None:
            return verdict
    return Verdict(Cause.KILLED, _where(found, None), None)


def _of_memory(found: Evidence) -> Verdict | None:
    told = [marker for marker in found.markers if marker.is_out_of_memory]
    if not told:
        return None
    first = min(told, key=lambda marker: marker.time)
    return Verdict(_memory_cause(first), first.phase, first.rank, first.step, first.memory, first)


def _memory_cause(marker: Marker) -> Cause:
    if marker.is_of_host:
        return Cause.HOST_MEMORY
    if marker.memory is not None and marker.memory.is_fragmented:
        return Cause.FRAGMENTATION
    by_phase = _phase_cause(marker.phase)
    if by_phase is Cause.ACTIVATIONS:
        if _tells_of(marker.traceback, _REDUCTION_SOURCES):
            return Cause.REDUCTION
        if _tells_of(marker.traceback, _LOSS_SOURCES):
            return Cause.LOGITS
    if by_phase is Cause.STEP and marker.step <= 1:
        return Cause.FIRST_STEP
    return by_phase


def _phase_cause(phase: str) -> Cause:
    """By the phase alone; every phase of a rank has one."""
    kind = phase.rpartition(".")[2]
    return {
        "forward": Cause.ACTIVATIONS,
        "backward": Cause.ACTIVATIONS,
        "optimizer_step": Cause.STEP,
        "evaluation": Cause.EVALUATION,
        "save": Cause.SAVE,
        "export": Cause.SAVE,
        "resume": Cause.RESUME,
        "engine_init": Cause.INIT,
        "retention": Cause.INIT,
    }.get(kind, Cause.LOAD)


def _of_lost_marker(found: Evidence) -> Verdict | None:
    """A rank's exit code says that it ran out of memory, but its marker is not whole."""
    if found.launcher_code != OUT_OF_MEMORY_EXIT_CODE:
        return None
    state = next((state for state in found.ranks if state.rank in found.dead), None) or _mute(found)
    if state is None:
        return None
    cause = _phase_cause(state.phase)
    cause = Cause.FIRST_STEP if cause is Cause.STEP and state.step <= 1 else cause
    return Verdict(cause, state.phase, state.rank, state.step)


def _mute(found: Evidence) -> RankState | None:
    """The first rank without a marker."""
    spoke = {marker.rank for marker in found.markers}
    return next((state for state in found.ranks if state.rank not in spoke), None)


def _of_host_memory(found: Evidence) -> Verdict | None:
    """Killed by the kernel (its counter rose), or aborted by an allocation that failed in a thread of C++."""
    killed = found.oom_kills > 0 and (
        found.launcher_code in _SIGKILL_CODES or found.launcher_code is None or found.dead
    )
    aborted = next((rank for rank, tail in (found.tails or {}).items() if is_out_of_memory("", tail)), None)
    if killed:
        rank = found.dead[0] if found.dead else None
    elif aborted is not None and (found.launcher_code in _ABORT_CODES or aborted in found.dead):
        rank = aborted
    else:
        return None
    return Verdict(Cause.HOST_MEMORY, _where(found, rank), rank, _step(found, rank))


def _of_user(found: Evidence) -> Verdict | None:
    named = [marker for marker in found.markers if marker.by_user]
    if not named:
        return None
    first = min(named, key=lambda marker: marker.time)
    cause = Cause.NAN if first.message.startswith(_NAN_TEXT) else Cause.USER
    return Verdict(cause, first.phase, first.rank, first.step, marker=first)


def _of_hang(found: Evidence) -> Verdict | None:
    if found.silent:
        rank = found.silent[0]
        return Verdict(Cause.HANG, _where(found, rank), rank, _step(found, rank))
    if found.stuck_s is not None:
        return Verdict(Cause.HANG, _where(found, found.stuck_rank))
    return None


def _of_error(found: Evidence) -> Verdict | None:
    """An exception that is not the echo of a peer's end."""
    own = [marker for marker in found.markers if not _tells_of(marker.message, _COMMUNICATION_TEXTS)]
    if not own:
        return None
    first = min(own, key=lambda marker: marker.time)
    cause = Cause.NAN if _tells_of(first.message, _OVERFLOW_TEXTS) else Cause.ERROR
    cause = Cause.COMPILER if first.kind == _ENDED_COMPILER else cause
    return Verdict(cause, first.phase, first.rank, first.step, marker=first)


def _of_death(found: Evidence) -> Verdict | None:
    spoke = {marker.rank for marker in found.markers}
    mute = [rank for rank in found.dead if rank not in spoke]
    if mute:
        # a rank that ends by itself says why, unless it cannot write: that will not pass. The launcher's code is that
        # of the rank which it looked at first, and a peer's marker may account for it
        told = any(marker.exit_code == found.launcher_code for marker in found.markers)
        cause = Cause.ERROR if found.launcher_code in _OWN_CODES and not told else Cause.KILLED
        return Verdict(cause, _where(found, mute[0]), mute[0], _step(found, mute[0]))
    if found.launcher_code in _SIGKILL_CODES:
        state = _mute(found) if spoke else None
        rank = None if state is None else state.rank
        return Verdict(Cause.KILLED, _where(found, rank), rank, _step(found, rank))
    if not found.markers:
        # one that ended by itself before it could write where it is (a full disk) meets that again
        said_nothing = not found.ranks and found.launcher_code in _OWN_CODES
        return Verdict(Cause.ERROR, _where(found, None)) if said_nothing else None
    first = min(found.markers, key=lambda marker: marker.time)
    return Verdict(Cause.COMMUNICATOR, first.phase, first.rank, first.step, marker=first)


def _where(found: Evidence, rank: int | None) -> str:
    states = [state for state in found.ranks if rank is None or state.rank == rank]
    return states[0].phase if states else "a phase unknown"


def _step(found: Evidence, rank: int | None) -> int:
    return next((state.step for state in found.ranks if rank is None or state.rank == rank), 0)


def _tells_of(text: str, names: tuple[str, ...]) -> bool:
    return any(name in text for name in names)


def bytes_clause(memory: MemoryState | None) -> str:
    """E.g. ``; 56.0 MiB asked for; 216.5 MiB held; 38.2 MiB free``; empty where nothing is known."""
    if memory is None:
        return ""
    parts = [
        (memory.requested, "asked for"),
        (memory.held, "held"),
        (memory.free, "free"),
    ]
    return "".join(f"; {format_bytes(size)} {word}" for size, word in parts if size is not None)
