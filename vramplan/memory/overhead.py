"""What the driver counts beyond tensors, as terms of the ledger and as bands; every figure is of one data file."""

from __future__ import annotations

from dataclasses import dataclass

from vramplan.facts.device import Node
from vramplan.facts.overhead import Cost, Fragmentation, Overheads, overheads
from vramplan.memory.ledger import Band
from vramplan.memory.term import Basis, Category, Term
from vramplan.spec.layout import Layout

WORKSPACE = "cuBLAS workspace"
FRAGMENTATION = "allocator fragmentation"
WORKSPACES = (WORKSPACE, "cuDNN workspace")
HELD_BY_THE_ALLOCATOR = (*WORKSPACES, FRAGMENTATION)
"""Terms that torch's caching allocator counts (aten/src/ATen/cuda/CublasHandlePool.cpp takes its workspaces there)."""


@dataclass(frozen=True, slots=True)
class Overhead:
    """Terms beyond tensors, and what the two readings that depend on history can be."""

    terms: tuple[Term, ...] = ()
    reserved_band: Band | None = None
    used_band: Band | None = None


def overhead(node: Node, layout: Layout, alloc_conf: str, allocated_bytes: int) -> Overhead:
    """What one rank on a GPU holds beyond ``allocated_bytes`` of tensors; nothing on the CPU."""
    if node.device.kind == "cpu":
        return Overhead()
    facts, capability = overheads(node.overhead_file), node.device.compute_capability
    context, groups = facts.context(capability), num_communicators(layout)
    kept = facts.fragmentation_expandable if expands_segments(alloc_conf) else facts.fragmentation
    terms = [
        _term("device context", context.num_bytes, context),
        _workspace(facts, capability),
        _term(WORKSPACES[1], facts.cudnn.num_bytes, facts.cudnn),
        _term(FRAGMENTATION, allocated_bytes * kept.needed_per_mille // 1000, kept),
        _term("communicators", groups * facts.communicator.num_bytes, facts.communicator),
    ]
    held = allocated_bytes + terms[1].num_bytes + terms[2].num_bytes
    reserved = _band(held, kept, node.capacity_bytes)
    beside = [context, *[facts.communicator] * groups]
    low = reserved.low_bytes + sum(cost.low_bytes for cost in beside)
    high = reserved.high_bytes + sum(cost.high_bytes for cost in beside)
    used = Band(low, max(low, min(high, node.device.memory_bytes)))
    return Overhead(tuple(term for term in terms if term.num_bytes), reserved, used)


def num_communicators(layout: Layout) -> int:
    """NCCL communicators of a rank: the world's, one more for the ranks of a sequence, one for those of a model's
    shares, and then one for those that ZeRO cuts states over (deepspeed/utils/groups.py, ``_init_tp_mesh_device``)."""
    if layout.world_size == 1:
        return 0
    return 1 + (layout.sp > 1) + (layout.tp > 1) * (1 + (layout.dp > 1))


def expands_segments(alloc_conf: str) -> bool:
    """Whether ``PYTORCH_CUDA_ALLOC_CONF`` asks for segments that grow."""
    return "expandable_segments:true" in alloc_conf.lower().replace(" ", "")


def _band(held: int, kept: Fragmentation, capacity: int) -> Band:
    low = held + held * kept.low_per_mille // 1000
    high = held + held * kept.high_per_mille // 1000
    return Band(low, max(low, min(high, capacity)))


def _workspace(facts: Overheads, capability: tuple[int, int] | None) -> Term:
    each = facts.workspace(capability)
    note = f"{facts.num_handles} handles: {facts.handles_source}; {each.source}"
    return Term(WORKSPACE, facts.num_handles * each.num_bytes, Category.OVERHEAD, Basis.FITTED, note)


def _term(name: str, num_bytes: int, figure: Cost | Fragmentation) -> Term:
    return Term(name, num_bytes, Category.OVERHEAD, Basis(figure.basis), figure.source)
