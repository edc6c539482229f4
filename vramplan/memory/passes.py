"""What a run passes besides its steps: evaluations, saves, a resume, the export of what was trained."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vramplan.memory.job import Job
from vramplan.memory.rows import chunk_rows, tile_rows
from vramplan.spec.run import RunSpec


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's forward: sequences, and tokens of each, whole also where ranks share them."""

    size: int
    length: int


@dataclass(frozen=True, slots=True)
class Passes:
    """Moments beside the steps, each only if the run passes it."""

    evaluation: Batch | None = None
    """The largest forward of an evaluation; None: the run has no held-out set."""
    pinned: Batch | None = None
    """The forward whose loss is stored with a checkpoint and met again when it is loaded (``train/pinned.py``); None:
    nothing is saved."""
    resumes: bool = False
    exports: bool = False
    saves_after_evaluation: bool = False
    """Whether every save comes right after an evaluation, which leaves weights gathered under ZeRO-3."""

    @classmethod
    def of(cls, run: RunSpec) -> Passes:
        """What the trainer does in a run as its spec asks (``train/session.py``, ``train/loop.py``): it evaluates where
        there is a held-out set, saves and exports at the end at the latest, and goes on from a checkpoint after a
        failure. Sequences are taken to be as long as may be. Nothing where another trainer runs it."""
        if run.engine != "deepspeed" or "nvme" in (run.zero.offload_optimizer, run.zero.offload_param):
            return STEPS_ONLY
        layout = run.layout
        if layout is not None and layout.dp * layout.sp != layout.world_size:  # counted but not trained
            return STEPS_ONLY
        size = run.training.eval_micro_batch_size or run.micro_batch_size or 1
        held_out = Batch(size, run.seq_len) if run.data.set_names else None
        return cls(held_out, Batch(1, run.seq_len), resumes=True, exports=True)


STEPS_ONLY = Passes()
"""Nothing but steps, as in measurements of ``vramplan bench``."""


def job_of_batch(job: Job, batch: Batch) -> Job:
    """The job as it evaluates a batch, of whose sequences a rank may have a stretch (Ulysses)."""
    length = -(-batch.length // job.layout.sp)
    return replace(
        job,
        micro_batch_size=batch.size,
        seq_len=batch.length,
        tile_rows=tile_rows(batch.size, length, job.architecture) if job.tile_rows else 0,
        chunk_rows=chunk_rows(job.loss, batch.size * length, job.architecture) if job.device == "cpu" else (0, 0),
    )
