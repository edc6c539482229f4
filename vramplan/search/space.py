"""The candidates of a search: every way to fill in what the user left open."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

from vramplan.errors import NoPlanError
from vramplan.facts.device import Node
from vramplan.spec.layout import Layout
from vramplan.spec.run import Checkpointing, Offload, RunSpec

Stage = Literal[0, 1, 2, 3]

OPEN_MICRO_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Micro-batches tried where no global batch bounds them; beyond 64 the step time per sequence no longer falls."""
_STAGES: tuple[Stage, ...] = (0, 1, 2, 3)
_CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "full")
_OFFLOADS: tuple[tuple[Offload, Offload], ...] = (("none", "none"), ("cpu", "none"), ("cpu", "cpu"))


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to fill in the open fields."""

    micro_batch_size: int
    grad_accum_steps: int
    zero_stage: Stage
    offload_optimizer: Offload
    offload_param: Offload
    activation_checkpointing: Checkpointing

    @classmethod
    def of(cls, run: RunSpec) -> Candidate:
        """How a closed run fills them in."""
        return cls(
            run.micro_batch_size or 1,
            run.grad_accum_steps or 1,
            run.zero.stage or 0,
            run.zero.offload_optimizer or "none",
            run.zero.offload_param or "none",
            run.activation_checkpointing or "none",
        )

    def label(self) -> str:
        """E.g. ``micro-batch 2 x 4, ZeRO 3, checkpointing full, optimizer on the CPU``."""
        moved = {("cpu", "none"): ", optimizer on the CPU", ("none", "cpu"): ", weights on the CPU"}
        offload = moved.get((self.offload_optimizer, self.offload_param), ", optimizer and weights on the CPU")
        if "nvme" in (self.offload_optimizer, self.offload_param):
            offload = f", optimizer on {self.offload_optimizer}, weights on {self.offload_param}"
        return (
            f"micro-batch {self.micro_batch_size} x {self.grad_accum_steps}, ZeRO {self.zero_stage}, "
            f"checkpointing {self.activation_checkpointing}"
            f"{'' if self.offload_optimizer == self.offload_param == 'none' else offload}"
        )

    def close(self, run: RunSpec, node: Node) -> RunSpec:
        """``run`` with every open field filled in."""
        layout = layout_of(run, node)
        zero = run.zero.model_copy(
            update={
                "stage": self.zero_stage,
                "offload_optimizer": self.offload_optimizer,
                "offload_param": self.offload_param,
                # DeepSpeed's default (runtime/zero/config.py, overlap_comm_valid)
                "overlap_comm": self.zero_stage == 3 if run.zero.overlap_comm is None else run.zero.overlap_comm,
            }
        )
        hardware = run.hardware.model_copy(update={"gpus_per_node": node.gpus_per_node, "nodes": node.num_nodes})
        return run.model_copy(
            update={
                "micro_batch_size": self.micro_batch_size,
                "grad_accum_steps": self.grad_accum_steps,
                "global_batch_size": self.micro_batch_size * self.grad_accum_steps * layout.dp,
                "activation_checkpointing": self.activation_checkpointing,
                "zero": zero,
                "layout": layout,
                "hardware": hardware,
                "optimizer": run.optimizer.model_copy(update={"lr": run.peak_lr}),
            }
        )


def layout_of(run: RunSpec, node: Node) -> Layout:
    """The run's layout, or data parallelism over all ranks.

    Raises:
        NoPlanError: the layout asked for does not make as many ranks as there are devices.
    """
    if run.layout is None:
        return Layout(dp=node.world_size)
    if run.layout.world_size != node.world_size:
        degrees = " x ".join(f"{name} {getattr(run.layout, name)}" for name in ("dp", "tp", "sp", "pp"))
        raise NoPlanError(
            f"layout makes {run.layout.world_size} ranks ({degrees}) but there are {node.world_size} devices"
            f"{_dp_hint(run.layout, node.world_size)}"
        )
    return run.layout


def candidates(run: RunSpec, node: Node) -> list[Candidate]:
    """Every way to fill in what ``run`` leaves open, in no order of merit.

    Offloads that a stage cannot use are left out, unless the user's own choice leaves nothing else.

    Raises:
        NoPlanError: no micro-batch and accumulation make the global batch; the text says which number to change.
    """
    batches = batch_splits(run, layout_of(run, node).dp)
    every_stage: tuple[Stage, ...] = (0,) if run.engine == "torch" else _STAGES
    stages: tuple[Stage, ...] = every_stage if run.zero.stage is None else (run.zero.stage,)
    checkpointings = _CHECKPOINTING if run.activation_checkpointing is None else (run.activation_checkpointing,)
    grid = product(batches, stages, _offloads(run, node), checkpointings)
    every = [Candidate(*batch, stage, *offload, checkpointing) for batch, stage, offload, checkpointing in grid]
    return [candidate for candidate in every if _stage_can_offload(candidate)] or every


def _stage_can_offload(candidate: Candidate) -> bool:
    """Whether DeepSpeed can move what the candidate moves; ``legality`` says why not."""
    on_disk = "nvme" in (candidate.offload_optimizer, candidate.offload_param)
    if (candidate.offload_param == "cpu" or on_disk) and candidate.zero_stage != 3:
        return False
    return candidate.offload_optimizer == "none" or candidate.zero_stage != 0


def batch_splits(run: RunSpec, dp: int) -> list[tuple[int, int]]:
    """Pairs (micro-batch size, accumulation steps) that make the batch asked for on ``dp`` data-parallel ranks."""
    micro, accum, total = run.micro_batch_size, run.grad_accum_steps, run.global_batch_size
    if total is None:
        sizes = OPEN_MICRO_BATCH_SIZES if micro is None else (micro,)
        return [(size, accum or 1) for size in sizes]
    if total % dp:
        raise NoPlanError(
            f"global_batch_size {total} cannot be shared by {dp} data-parallel ranks: {_nearest_multiples(total, dp)}"
        )
    per_rank = total // dp
    if micro is not None and accum is not None:
        if micro * accum != per_rank:
            raise NoPlanError(
                f"micro_batch_size {micro} x grad_accum_steps {accum} x {dp} ranks is {micro * accum * dp}, "
                f"not the global_batch_size {total}: set global_batch_size {micro * accum * dp}, or leave one open"
            )
        return [(micro, accum)]
    fixed_name, fixed = ("micro_batch_size", micro) if micro is not None else ("grad_accum_steps", accum)
    if fixed is None:
        return [(size, per_rank // size) for size in divisors(per_rank)]
    if per_rank % fixed:
        allowed = ", ".join(str(size) for size in divisors(per_rank))
        raise NoPlanError(
            f"{fixed_name} {fixed} does not divide the {per_rank} sequences that each of {dp} ranks has of "
            f"global_batch_size {total}: set {fixed_name} to one of {allowed}"
        )
    return [(fixed, per_rank // fixed) if micro is not None else (per_rank // fixed, fixed)]


def divisors(number: int) -> list[int]:
    """All divisors of ``number``, rising."""
    low = [size for size in range(1, int(number**0.5) + 1) if number % size == 0]
    return low + [number // size for size in reversed(low) if size * size != number]


def _offloads(run: RunSpec, node: Node) -> list[tuple[Offload, Offload]]:
    """Pairs (optimizer, weights) of places that the user's own choice allows."""
    # on a CPU the weights are in host memory already: moving them there is nothing to search for
    searched = _OFFLOADS[:1] if node.device.kind == "cpu" or run.engine == "torch" else _OFFLOADS
    optimizer, param = run.zero.offload_optimizer, run.zero.offload_param
    allowed = [pair for pair in searched if optimizer in (None, pair[0]) and param in (None, pair[1])]
    return allowed or [(optimizer or "none", param or "none")]


def _nearest_multiples(total: int, dp: int) -> str:
    below, above = total // dp * dp, (total // dp + 1) * dp
    options = f"{below} or {above}" if below else f"{above}"
    usable = [size for size in divisors(total) if size <= dp]
    return f"set global_batch_size to {options}, or use {usable[-1]} ranks"


def _dp_hint(layout: Layout, world_size: int) -> str:
    others = layout.tp * layout.sp * layout.pp
    if world_size % others:
        return f": {world_size} is no multiple of tp x sp x pp = {others}, so change one of them"
    return f": set layout.dp to {world_size // others}"
