"""Peaks of very many layouts at once: each kind of layout is walked once, then numpy evaluates its batches.

A law (tests/laws) holds every peak equal to the one that ``estimate`` gives for the same layout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vramplan.errors import SpecError
from vramplan.memory.job import Job, chunk_rows, fused_loss_rows, kl_chunk_tokens, tile_rows
from vramplan.memory.partition import ranks_that_differ
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
    kinds = np.stack(
        [
            candidates.stage,
            candidates.dp,
            candidates.checkpointing,
            np.minimum(candidates.grad_accum_steps, _TOLD_APART),
            *_shapes(job, candidates),
        ],
        axis=1,
    )
    weights = np.concatenate([[1], np.cumprod(kinds.max(axis=0)[:-1] + 1)])
    _, first, which = np.unique(kinds @ weights, return_index=True, return_inverse=True)
    order = np.argsort(which, kind="stable")
    bounds = np.searchsorted(which[order], np.arange(len(first) + 1))
    peaks = np.empty(len(candidates), dtype=np.int64)
    for kind, row in enumerate(first):
        members = order[bounds[kind] : bounds[kind + 1]]
        sizes = _peak_sizes(_job_of(job, candidates, int(row)))
        basis = basis_at(candidates.micro_batch_size[members], candidates.seq_len[members])  # type: ignore[arg-type]
        peaks[members] = _highest(sizes, basis)
    return peaks


def _shapes(job: Job, candidates: Candidates) -> list[Ints]:
    """What of the batch decides more than sizes (``Job.shapeless``): one sequence or more, the windows reached, and
    the chunks of a fused loss and of the KL term."""
    lone = (candidates.micro_batch_size == 1) & replace(job, micro_batch_size=1).lone_sequence
    windows = np.array(sorted(job.architecture.windows), dtype=np.int64)
    reached = np.searchsorted(windows, candidates.seq_len, side="right")
    return [lone.astype(np.int64), reached, *_chunks(job, candidates)]


def _chunks(job: Job, candidates: Candidates) -> tuple[Ints, ...]:
    """Tokens of a chunk of the loss, of the KL term, of a tiled MLP, and of the chunked loss's two blocks, for each
    layout."""
    num_tokens = candidates.micro_batch_size * candidates.seq_len
    different, which = np.unique(num_tokens, return_inverse=True)
    rows = [fused_loss_rows(job.loss, int(each), job.architecture) for each in different]
    kl = [kl_chunk_tokens(job.retain, int(each)) for each in different]
    batches, lengths = candidates.micro_batch_size, candidates.seq_len
    tiles = [
        tile_rows(int(batch), int(length), job.architecture) if job.tile_rows else 0
        for batch, length in zip(batches, lengths, strict=True)
    ]
    on_cpu = job.device == "cpu"
    blocks = np.array([chunk_rows(job.loss, int(each), job.architecture) if on_cpu else (0, 0) for each in different])
    columns = np.array(rows)[which], np.array(kl)[which], np.array(tiles, dtype=np.int64)
    return *columns, blocks[which, 0], blocks[which, 1]


def _job_of(job: Job, candidates: Candidates, row: int) -> Job:
    rows, tokens, tiles, first, second = _chunks(job, candidates)
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
