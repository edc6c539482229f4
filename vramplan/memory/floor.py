"""The least that a rank has at its highest, from one micro-batch with whole weights: much of what a search need not try
is told by it, without a walk of the engine, of which ZeRO-3's takes most of a search's time.

A law (tests/laws/test_floor_laws.py) holds it to be no more than any estimate.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from vramplan.facts.architecture import Architecture
from vramplan.facts.dtype import Dtype
from vramplan.memory.job import Job
from vramplan.memory.model_run import ModelRun
from vramplan.memory.parameters import parameters
from vramplan.memory.profile import profile
from vramplan.memory.size import Size, evaluate, undominated
from vramplan.spec.trainable import Method

_TWO_MOMENTS = ("adamw", "adamw_torch", "adamw_torch_fused")
"""Optimizers that keep two fp32 values an element beside the master weights, whatever the stage."""


def floor_bytes(job: Job) -> int:
    """Bytes allocated on any rank at the highest moment, or fewer: what stays from the second step on, and what grows
    with the batch in its forward, which every stage keeps alike; where the engine cuts a model that was loaded whole
    (weights in 4 bits under ZeRO-3), no less than that model."""
    if job.quantized and job.stage == 3 and not job.offload_param:
        return max(_whole_weights(job), _stepping(job))
    return _stepping(job)


def _stepping(job: Job) -> int:
    # where weights are whole and adapters as narrow as they can be, the least is kept for backward
    whole = replace(job, stage=0, offload_optimizer=False, offload_param=False).model_run
    return _states(job) + max(evaluate(size, job.basis) for size in _growing(whole))


@lru_cache(maxsize=256)
def _growing(run: ModelRun) -> tuple[Size, ...]:
    """Instants of forward and of the loss's backward without what no batch changes, which stages gather and cut."""
    found = profile(run)
    points = [*found.forward, *(point for point in found.backward if point.where == "loss")]
    return undominated((0, *point.total[1:]) for point in points)


def _states(job: Job) -> int:
    """Weights, and the fp32 master weights and moments of AdamW, of one rank."""
    trained = _numels(job.architecture, job.method, job.adapted_parameters).trained
    weights, ranks = _whole_weights(job), job.degree
    if job.stage == 3:
        weights = 0 if job.offload_param else weights // ranks
    if job.offload_optimizer or job.optimizer not in _TWO_MOMENTS or job.engine == "torch":
        return weights
    master = job.master_dtype.nbytes if job.stage or job.dtype is not Dtype.FP32 else 0
    return weights + trained * (master + 2 * job.moment_dtype.nbytes) // (ranks if job.stage else 1)


def _whole_weights(job: Job) -> int:
    """Bytes of all weights; those in 4 bits without what undoes it."""
    numels = _numels(job.architecture, job.method, job.adapted_parameters)
    packed = numels.packable // 2 if job.quantized else numels.packable * job.dtype.nbytes
    return (numels.trained + numels.kept) * job.dtype.nbytes + packed


class _Numels(NamedTuple):
    """Elements that are trained; that are frozen and, if bitsandbytes may, packed; and that are frozen all the same."""

    trained: int
    packable: int
    kept: int


@lru_cache(maxsize=64)
def _numels(architecture: Architecture, method: Method, adapted: frozenset[str]) -> _Numels:
    params = parameters(architecture, method, adapted)
    frozen = [param for param in params if not param.trained]
    packable = sum(param.numel for param in frozen if param.packable)
    total = sum(param.numel for param in frozen)
    return _Numels(sum(param.numel for param in params) - total, packable, total - packable)
