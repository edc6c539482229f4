"""Bytes of methods against forgetting: starting weights, Fisher diagonal, a frozen copy, the KL term's tensors."""

from __future__ import annotations

from vramplan.facts.dtype import Dtype
from vramplan.memory import labels
from vramplan.memory.job import Job
from vramplan.memory.moments import Bytes, Parts, merged
from vramplan.memory.size import Size, add, const, per_token, scale
from vramplan.memory.term import Phase
from vramplan.spec.layout import shard
from vramplan.spec.trainable import LoraMethod

_KL_TEMPORARIES = 5
"""fp32 tensors of a chunk: two log-softmaxes, the base's probabilities, their difference, its product."""
_PULL_TEMPORARIES = 5
"""fp32 tensors of one parameter's slice while its penalty is added (``retain/anchored.py``)."""


def kept_bytes(job: Job) -> Bytes:
    """What methods keep on one rank from before the first step to the end (``state_bytes`` of their hooks)."""
    kept: dict[str, Size | int] = {}
    shares = _trained_shares(job) if job.retain.ewc is not None or job.retain.l2sp is not None else []
    if shares:
        kept[labels.ANCHORS] = sum(share * width for share, width in shares)
    if job.retain.ewc is not None:
        kept[labels.FISHER] = sum(share for share, _ in shares) * Dtype.FP32.nbytes
    return merged(kept, reference_bytes(job))


def reference_bytes(job: Job) -> Parts:
    """The frozen copy that KL needs where no adapters can be switched off; split under ZeRO-3."""
    if job.retain.kl is None or isinstance(job.method, LoraMethod):
        return {}
    sizes = (param.numel for param in job.parameters)
    degree = job.degree if job.stage == 3 else 1
    return {labels.REFERENCE: sum(shard(numel, degree) for numel in sizes) * job.dtype.nbytes}


def passing_bytes(job: Job, phase: Phase) -> Parts:
    """What is alive only within a phase: the base's logits in forward, the KL's gradient and a penalty in backward."""
    passing: dict[str, Size | int] = {}
    if job.retain.kl is not None and phase in (Phase.FORWARD, Phase.BACKWARD):
        passing[labels.KL] = logits_bytes(job)
    if phase is Phase.BACKWARD and (job.retain.ewc is not None or job.retain.l2sp is not None):
        largest = max((share for share, _ in _trained_shares(job)), default=0)
        passing[labels.PULL] = _PULL_TEMPORARIES * Dtype.FP32.nbytes * largest
    return passing


def kl_instant_bytes(job: Job) -> Parts:
    """While the KL term is computed: logits and its gradient, beside the base's logits, and a chunk in fp32."""
    if job.retain.kl is None:
        return {}
    chunk = _KL_TEMPORARIES * job.kl_chunk_tokens * job.architecture.vocab_size * Dtype.FP32.nbytes
    return {labels.KL: add(scale(logits_bytes(job), 2), const(chunk))}


def logits_bytes(job: Job) -> Size:
    """One tensor of logits of a micro-batch."""
    width = (job.autocast or job.dtype).nbytes
    return per_token(job.architecture.vocab_size * width)


def _trained_shares(job: Job) -> list[tuple[int, int]]:
    """(elements of this rank, bytes of one) of each trained parameter: every method's state is split over all ranks."""
    width = (job.adapter_dtype or job.dtype).nbytes
    trained = (param for param in job.parameters if param.trained)
    return [(shard(param.numel, job.degree), width) for param in trained]
