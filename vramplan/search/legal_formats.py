"""Formats and modules that DeepSpeed or transformers refuse or break on: rules of ``legality.py``."""

from __future__ import annotations

from vramplan.errors import VramplanError
from vramplan.facts.architecture import Architecture
from vramplan.facts.device import Node
from vramplan.facts.resolve import resolve_architecture
from vramplan.memory.granularity import leaves
from vramplan.spec.run import RunSpec


def sums_in_fp32(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    """``grad_accum_dtype`` without ZeRO."""
    if run.grad_accum_dtype is None or run.precision not in ("bf16", "fp16") or run.zero.stage != 0:
        return None
    return f"grad_accum_dtype fp32 beside {run.precision} weights needs ZeRO stage 1, 2 or 3"


def bf16_master_weights(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    """bf16 master weights without ZeRO, with moments or an optimizer that they do not go with."""
    if not run.bf16_master_weights_and_grads:
        return None
    if run.zero.stage == 0:
        return "bf16_master_weights_and_grads needs ZeRO stage 1, 2 or 3: stage 0 keeps fp32 master weights"
    offloads = run.zero.offload_optimizer in ("cpu", "nvme")
    if not run.bf16_optimizer_states and not offloads:
        return (
            "bf16_master_weights_and_grads with fp32 moments needs offload_optimizer cpu: set bf16_optimizer_states "
            "true, or offload"
        )
    if offloads and run.optimizer.kind not in ("adamw", "muon"):
        return "bf16_master_weights_and_grads with offload needs DeepSpeed's CPUAdam: set optimizer adamw"
    return None


def other_leaves(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    """Seen in the real engine: attention, which is called by keywords, gives its weights' gradients before they are
    there ("Cannot reduce scatter gradients whose size is not same as the params"); the whole model ends with "unknown
    parameter type"."""
    threshold = run.zero.stage3_module_granularity_threshold
    if run.zero.stage != 3 or run.method.kind != "full" or leaves(architecture, threshold) != "other":
        return None
    return (
        f"zero.stage3_module_granularity_threshold {threshold} takes other modules whole than decoder layers, on which "
        "DeepSpeed's backward fails: set another, or 0"
    )


_WRITTEN_OUT = ("fp8", "mxfp8", "mxfp4")
"""Packings that transformers undoes as it reads a file, where it is asked to (``dequantize=True``)."""


def stored_in_few_bits(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    """Checkpoints whose weights are packed, in a way that is not undone as they are read."""
    packing, is_qlora = architecture.stored_quantization, run.method.kind == "qlora"
    if not packing or (packing in _WRITTEN_OUT and not is_qlora) or (packing == "bitsandbytes" and is_qlora):
        return None
    if packing == "bitsandbytes":
        return f"{run.model} is stored in 4 bits (bitsandbytes): set method qlora, or name the model it is made of"
    if packing in _WRITTEN_OUT:
        return f"{run.model} is stored in {packing}, which is not packed anew: name a copy written out in bf16"
    return f"{run.model} is stored packed ({packing}), which is not trained: name the model that it was made of"


def why_not_trained(run: RunSpec) -> str:
    """Why ``vramplan train`` does not run it, though its bytes are counted; empty where it does."""
    if run.not_trained:
        return run.not_trained
    try:
        packing = resolve_architecture(run).stored_quantization
    except VramplanError:  # what it is does not matter here
        return ""
    if packing not in _WRITTEN_OUT:
        return ""
    return (
        f"model: {run.model} is stored in {packing}; its bytes are those of weights that are written out, which the "
        "trainer does not do: write them out in bf16 (transformers' dequantize=True) and name that directory"
    )
