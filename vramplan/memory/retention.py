"""Bytes that methods against forgetting keep: starting weights, Fisher diagonal, a frozen copy. What passes with a
micro-batch is on the tape (``blocks/against_forgetting.py``)."""

from __future__ import annotations

from vramplan.facts.dtype import Dtype
from vramplan.facts.expansion import new_block_positions
from vramplan.memory import labels
from vramplan.memory.job import Job
from vramplan.memory.moments import Bytes, Parts, merged
from vramplan.memory.size import Size
from vramplan.spec.layout import shard
from vramplan.spec.trainable import FullMethod, LoraMethod


def kept_bytes(job: Job) -> Bytes:
    """What methods keep on one rank from before the first step to the end (``state_bytes`` of their hooks)."""
    anchors, fisher = (
        (labels.HOST_ANCHORS, labels.HOST_FISHER) if job.keeps_on_host else (labels.ANCHORS, labels.FISHER)
    )
    kept: dict[str, Size | int] = {}
    shares = _trained_shares(job) if job.springs else []
    if shares:
        kept[anchors] = sum(share * width for share, width in shares)
    if "ewc" in job.springs:
        kept[fisher] = sum(share for share, _ in shares) * Dtype.FP32.nbytes
    return merged(kept, reference_bytes(job))


def reference_bytes(job: Job) -> Parts:
    """The frozen copy that KL needs where no adapters can be switched off, of the model without new blocks; split under
    ZeRO-3."""
    if job.retain.kl is None or isinstance(job.method, LoraMethod):
        return {}
    degree = job.degree if job.stage == 3 else 1
    numel = sum(shard(param.numel, degree) for param in job.parameters if not _is_new(job, param.name))
    return {labels.HOST_REFERENCE if job.keeps_on_host else labels.REFERENCE: numel * job.dtype.nbytes}


def _is_new(job: Job, name: str) -> bool:
    """Whether a parameter is of a block that the base does not have."""
    method, architecture = job.method, job.architecture
    if not isinstance(method, FullMethod) or not method.new_blocks:
        return False
    new = new_block_positions(architecture.num_layers - method.new_blocks, method.new_blocks)
    prefix = f"{architecture.layer_prefix}."
    return name.startswith(prefix) and int(name[len(prefix) :].partition(".")[0]) in new


def _trained_shares(job: Job) -> list[tuple[int, int]]:
    """(elements of this rank, bytes of one) of each trained parameter: every method's state is split over all ranks."""
    width = (job.adapter_dtype or job.dtype).nbytes
    trained = (param for param in job.parameters if param.trained)
    return [(shard(param.numel, job.degree), width) for param in trained]
