"""Model FLOPs utilisation: what share of the devices' peak the model's own arithmetic takes (MFU, Chowdhery et al.
2022, "PaLM", arXiv 2204.02311, appendix B). What is computed again (checkpointing) and padding do not count."""

from __future__ import annotations

from dataclasses import dataclass

from vramplan.cost.work import token_work, training_flops
from vramplan.facts.architecture import Architecture
from vramplan.facts.device import Node
from vramplan.spec.run import RunSpec


@dataclass(frozen=True, slots=True)
class Utilisation:
    """``flops_per_token``: of one token's training; ``peak_flops``: FLOP/s of all ranks together."""

    flops_per_token: float
    peak_flops: float

    def share(self, tokens_per_s: float) -> float:
        """Of the peak at a speed of all ranks together: 0.4 is 40 %."""
        return tokens_per_s * self.flops_per_token / self.peak_flops


def utilisation(run: RunSpec, node: Node, architecture: Architecture) -> Utilisation | None:
    """Of a plan on its devices; None where the peak of a device is not published."""
    peak = node.device.fp32_flops if run.precision == "fp32" else node.device.bf16_flops
    if peak is None:
        return None
    work = token_work(run, architecture)
    matmul = training_flops(work, full=run.method.kind == "full", checkpointing=False).matmul
    flops = matmul + 3 * work.attention_flops  # backward takes twice the forward; scores computed again do not count
    num_ranks = run.layout.world_size if run.layout is not None else node.world_size
    return Utilisation(flops, peak * num_ranks)
