"""Peaks of very many layouts at once: each kind of layout is walked once, then numpy evaluates its batches.

A law (tests/laws) holds every peak equal to the one that ``estimate`` gives for the same layout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vramplan.errors import SpecError
from vramplan.memory.garbage import uncollected
from vramplan.memory.job import Job
from vramplan.memory.partition import ranks_that_differ
from vramplan.memory.rows import chunk_rows, fused_loss_rows, kl_chunk_tokens, tile_rows
from vramplan.memory.size import Size, basis_at, evaluate, undominated
from vramplan.memory.walked import walk
from vramplan.spec.layout import Layout

Ints = NDArray[np.int64]
_TOLD_APART = 3
"""Accumulating 3 micro-batches or more passes the same instants."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Layouts, a column each; all of one length N."""

    stage: Ints
    """ZeRO stage, 0 to 3."""
    dp: Ints
    """Data-parallel ranks."""
    checkpointing: Ints
    """1: every layer is recomputed; 0: nothing is."""
    micro_batch_size: Ints
    grad_accum_steps: Ints
    seq_len: Ints

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in self.__slots__}
        if len(set(lengths.values())) > 1:
            raise SpecError(f"the columns of candidates must have one length, not {lengths}")

    def __len__(self) -> int:
        return len(self.stage)


def allocated_peaks(job: Job, candidates: Candidates) -> Ints:
    """Peak bytes allocated on the rank that holds most, (N,), for layouts of ``job`` with the given columns.

    ``job`` gives everything else: model, method, precision, optimizer, buckets, offload. Layouts of one stage, number
    of ranks, checkpointing and kind of accumulation share their instants.
    """
    chunks = _chunks(job, candidates)
    columns = [
        candidates.stage,
        candidates.dp,
        candidates.checkpointing,
        np.minimum(candidates.grad_accum_steps, _TOLD_APART),
        *_shapes(job, candidates),
        *chunks,
    ]
    _, first, which = np.unique(_numbered(columns), return_index=True, return_inverse=True)
    order = np.argsort(which.astype(np.min_scalar_type(len(first))), kind="stable")
    bounds = np.searchsorted(which[order], np.arange(len(first) + 1))
    peaks = np.empty(len(candidates), dtype=np.int64)
    with uncollected():
        for kind, row in enumerate(first):
            members = order[bounds[kind] : bounds[kind + 1]]
            sizes = _peak_sizes(_job_of(job, candidates, chunks, int(row)))
            columns = [candidates.micro_batch_size[members], candidates.seq_len[members]]
            peaks[members] = _highest(sizes, basis_at(*columns))  # type: ignore[arg-type]
    return peaks


def _numbered(columns: list[Ints]) -> Ints:
    """A number for each row, the same for equal rows alone, (N,)."""
    number = np.zeros_like(columns[0])
    for column in columns:
        if column.any():  # most jobs have no chunks and no windows
            number = number * (int(column.max()) + 1) + column
    return number.astype(np.min_scalar_type(int(number.max(initial=0))))  # numpy sorts short numbers by radix


def _shapes(job: Job, candidates: Candidates) -> list[Ints]:
    """What of the batch decides more than sizes (``Job.shapeless``): one sequence or more, and the windows reached."""
    lone = (candidates.micro_batch_size == 1) & replace(job, micro_batch_size=1).lone_sequence
    windows = np.array(sorted(job.architecture.windows), dtype=np.int64)
    return [lone.astype(np.int64), np.searchsorted(windows, candidates.seq_len, side="right")]


def _chunks(job: Job, candidates: Candidates) -> tuple[Ints, ...]:
    """Tokens of a chunk of the loss, of the KL term, of a tiled MLP, and of the chunked loss's two blocks, for each
    layout."""
    none = np.zeros(len(candidates), dtype=np.int64)
    batches, lengths = candidates.micro_batch_size, candidates.seq_len
    tiles = tile_rows(batches, lengths, job.architecture) if job.tile_rows else none  # type: ignore[arg-type]
    if job.loss == "hf" and job.retain.kl is None:
        return none, none, tiles, none, none  # type: ignore[return-value]
    different, which = np.unique(batches * lengths, return_inverse=True)
    rows = [fused_loss_rows(job.loss, int(each), job.architecture) for each in different]
    kl = [kl_chunk_tokens(job.retain, int(each)) for each in different]
    on_cpu = job.device == "cpu"
    blocks = np.array([chunk_rows(job.loss, int(each), job.architecture) if on_cpu else (0, 0) for each in different])
    return np.array(rows)[which], np.array(kl)[which], tiles, blocks[which, 0], blocks[which, 1]  # type: ignore[return-value]


def _job_of(job: Job, candidates: Candidates, chunks: tuple[Ints, ...], row: int) -> Job:
    rows, tokens, tiles, first, second = chunks
    return replace(
        job,
        stage=int(candidates.stage[row]),
        layout=Layout(dp=int(candidates.dp[row])),
        checkpointing=bool(candidates.checkpointing[row]),
        grad_accum_steps=min(int(candidates.grad_accum_steps[row]), _TOLD_APART),
        micro_batch_size=int(candidates.micro_batch_size[row]),
        seq_len=int(candidates.seq_len[row]),
        fused_loss_rows=int(rows[row]),
        kl_chunk_tokens=int(tokens[row]),
        tile_rows=int(tiles[row]),
        chunk_rows=(int(first[row]), int(second[row])),
    ).shapeless


def _peak_sizes(shapeless: Job) -> tuple[Size, ...]:
    """The sizes that can be the peak of any rank."""
    return undominated(size for rank in ranks_that_differ(shapeless) for size in walk(shapeless, rank, False).peaks)


def _highest(sizes: tuple[Size, ...], basis: Any) -> Ints:
    highest: Ints = np.asarray(evaluate(sizes[0], basis))
    for size in sizes[1:]:
        np.maximum(highest, evaluate(size, basis), out=highest)
    return highest
