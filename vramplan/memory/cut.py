"""Bytes while ZeRO-3 cuts tensors one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vramplan.memory.job import Job
from vramplan.memory.parameters import ADAPTER_DTYPE
from vramplan.spec.layout import shard


def highest_as_engine_starts(job: Job, frozen_bytes: int, stays: Callable[[int], int]) -> int:
    """Bytes alive at most as the engine takes a model that was not built in ``zero.Init``: adapters are cast to the
    weights' format one by one (runtime/engine.py, ``_cast_module_mixed_precision``), then every tensor is cut.

    ``stays``: elements that stay on the device of a tensor of so many; with offload of weights each part is made in the
    host's memory (partition_parameters.py, ``_partition_param``).
    """
    width, adapters = job.dtype.nbytes, [param.numel for param in job.parameters if param.trained]
    made = frozen_bytes + sum(adapters) * ADAPTER_DTYPE.nbytes
    cast = highest_while_cut(made, [(numel * ADAPTER_DTYPE.nbytes, numel * width) for numel in adapters])
    numels = [job.cut_numel(param) for param in job.parameters]
    cuts = [(numel * width, stays(numel) * width) for numel in numels]
    return max(cast, highest_while_cut(frozen_bytes + sum(adapters) * width, cuts))


def highest_while_cut(whole: int, cuts: Iterable[tuple[int, int]]) -> int:
    """Bytes alive at most while tensors that are ``whole`` together are cut, each given as what it takes and what stays
    of it, which is there before the tensor goes."""
    alive = highest = whole
    for tensor, stays in cuts:
        highest = max(highest, alive + stays)
        alive += stays - tensor
    return highest


def higher(highest: tuple[int, str, int, int], name: str, weights: int, loading: int) -> tuple[int, str, int, int]:
    """The first of the highest instants so far, as bytes, name, weights and what is loaded."""
    return (weights + loading, name, weights, loading) if weights + loading > highest[0] else highest


def tied_head_part(job: Job) -> int:
    """Bytes of a rank's part of a tied head: ``zero.Init`` cuts it as any weight, before it gives way to the embedding
    (not where weights are in 4 bits, which it does not make). 0 without one."""
    if not job.architecture.tied_embeddings or job.quantized:
        return 0
    return shard(job.architecture.head.weight_numel, job.degree) * job.dtype.nbytes
