"""Bytes while ZeRO-3 cuts tensors one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby

from vramplan.memory import labels
from vramplan.memory.between import Written
from vramplan.memory.job import Job
from vramplan.memory.moments import Stretch
from vramplan.memory.parameters import ADAPTER_DTYPE
from vramplan.spec.layout import shard
from vramplan.spec.trainable import LoraMethod

MERGED_FAMILIES = frozenset(["deepseek_v2", "deepseek_v3", "mixtral", "qwen2_moe", "qwen3_moe"])
"""Families whose files hold each routed expert by itself, which transformers merges as it reads them
(transformers/conversion_mapping.py, ``MergeModulelist``)."""


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


def highest_as_built(job: Job, built: list[tuple[str, int]], stays: Callable[[int], int]) -> tuple[str, int, int]:
    """The highest instant as ``zero.Init`` makes tensors of these names and elements: its name, bytes of what is cut
    and of what is not yet. Each module's own tensors are whole together, then cut one by one.

    ``stays``: elements that stay on the rank of a tensor of so many.
    """
    cut, width = 0, job.dtype.nbytes
    highest = (0, "", 0, 0)
    for _, group in groupby(built, key=_module):
        numels = [numel for _, numel in group]
        whole = 0
        for numel in numels:
            if job.weights_halved:  # built in the asked format, then cast
                both = whole * width + numel * (job.grad_dtype.nbytes + width)
                highest = _higher(highest, "a tensor cast", cut * width, both)
            whole += numel
        for numel in numels:
            cut += stays(numel)
            highest = _higher(highest, "a tensor before it is cut", cut * width, whole * width)
            whole -= numel
    return highest[1:]


def _module(tensor: tuple[str, int]) -> str:
    return tensor[0].rpartition(".")[0]


def _higher(highest: tuple[int, str, int, int], name: str, weights: int, loading: int) -> tuple[int, str, int, int]:
    """The first of the highest instants so far, as bytes, name, weights and what is loaded."""
    return (weights + loading, name, weights, loading) if weights + loading > highest[0] else highest


def see_read(stretch: Stretch, job: Job, cut: int, built: list[tuple[str, int]]) -> None:
    """What is alive as a model's files are read beside ``cut`` bytes of parts: each module's own tensors are gathered
    to be written to (transformers/integrations/deepspeed.py, ``_load_state_dict_into_zero3_model``), after routed
    experts that lie in the files one by one were all merged, on every rank in the host's memory
    (``_apply_weight_conversions_to_state_dict``). Files are mapped. On the CPU gloo has a buffer of its own besides."""
    modules = [sum(numel for _, numel in group) for _, group in groupby(built, key=_module)]
    merged, joining = merged_experts(job)
    if merged:
        stretch.see("experts merged", {labels.WEIGHTS: cut}, {labels.HOST_BUILT: merged + joining})
    whole = {labels.LOADING: max(modules) * job.dtype.nbytes}
    stretch.see("a module's tensors read", {labels.WEIGHTS: cut}, whole, {labels.HOST_BUILT: merged})


def merged_experts(job: Job) -> tuple[int, int]:
    """Bytes of all routed experts as they are merged, in the format of the files; and of the stacked gates and
    up-projections of the last layer, which are joined when all else is merged (``MergeModulelist``, ``Concatenate``).
    (0, 0) where the files hold them so, or no layer has any."""
    architecture = job.architecture
    if architecture.family not in MERGED_FAMILIES or not architecture.mixtures:
        return 0, 0
    width = (architecture.stored_dtype or job.dtype).nbytes
    blocks = [
        (block.experts.num_experts, block.experts.hidden_size, block.experts.intermediate)
        for block in architecture.mixtures
    ]
    total = sum(3 * count * hidden * inner for count, hidden, inner in blocks)
    count, hidden, inner = blocks[-1]
    return total * width, 2 * count * hidden * inner * width


def made_whole(job: Job) -> int:
    """Bytes of what PEFT adds whole to a model that ``zero.Init`` cut, until the engine cuts it: adapters, in fp32, and
    copies of modules that are saved."""
    if not isinstance(job.method, LoraMethod):
        return 0
    width, adapter_width = job.dtype.nbytes, max(job.dtype.nbytes, ADAPTER_DTYPE.nbytes)
    trained = (param for param in job.parameters if param.trained)
    return sum(param.numel * (adapter_width if param.adapter else width) for param in trained)


def highest_as_written(tensors: Iterable[int]) -> Written:
    """Tensors of so many bytes are gathered one after the other, and each is copied while it is whole."""
    largest = copied = 0
    highest = (0, 0)
    for each in tensors:
        copied, largest = copied + each, max(largest, each)
        highest = max(highest, (copied, each), key=sum)
    return Written(copied, largest, highest)


def tied_head_part(job: Job) -> int:
    """Bytes of a rank's part of a tied head: ``zero.Init`` cuts it as any weight, before it gives way to the embedding
    (not where weights are in 4 bits, which it does not make). 0 without one."""
    if not job.architecture.tied_embeddings or job.quantized:
        return 0
    return shard(job.architecture.head.weight_numel, job.degree) * job.dtype.nbytes
