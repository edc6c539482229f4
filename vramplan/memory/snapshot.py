"""Bytes of snapshots in shared memory: host memory, though no process of the run holds it."""

from __future__ import annotations

from vramplan.facts.dtype import Dtype
from vramplan.memory import labels
from vramplan.memory.job import Job
from vramplan.memory.labels import term
from vramplan.memory.optimizers import optimizer_bytes
from vramplan.memory.term import Place, Term
from vramplan.spec.layout import shard

COPIES = 2
"""The last snapshot stays until the next one is whole."""


def snapshot_terms(job: Job, ranks_per_node: int) -> tuple[Term, ...]:
    """What snapshots take, as one rank's share of its node's."""
    return (term(labels.HOST_SNAPSHOT, COPIES * snapshot_bytes(job, ranks_per_node), Place.HOST),)


def snapshot_bytes(job: Job, ranks_per_node: int) -> int:
    """One snapshot (``train/checkpoint.py``): masters and moments as they are split; the weights, which DeepSpeed
    writes once where all ranks have them and not at all under ZeRO-3 (``_save_checkpoint``)."""
    trained = [param.numel for param in job.parameters if param.trained]
    weights = 0 if job.stage == 3 else shard(sum(trained) * job.dtype.nbytes, ranks_per_node)
    degree = job.degree if job.stage else ranks_per_node  # without ZeRO one rank writes for all
    has_master = job.stage > 0 or job.dtype is not Dtype.FP32
    shares = [shard(numel, degree) for numel in trained]
    master = sum(shares) * job.master_dtype.nbytes if has_master else 0
    optimizer = optimizer_bytes(job.optimizer, job.device).in_formats(job.moment_dtype, job.master_dtype)
    return weights + master + optimizer.state_bytes(*shares)
