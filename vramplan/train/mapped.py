"""Weights that lie in a mapped file: what keeps one of them keeps the whole file.

On the CPU transformers leaves weights that are trained in the file's own format where safetensors mapped them: each is
a stretch of one storage as long as the file, which goes with the last of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vramplan.spec.run import RunSpec


def free_mapped_files(run: RunSpec, module: torch.nn.Module, groups: Sequence[Any]) -> int:
    """Copies the weights that DeepSpeed leaves in a file where it takes others out of it; gives the bytes copied.

    Stages 1 and 2, and 16-bit training without ZeRO, flatten each group into a tensor of its own
    (zero/stage_1_and_2.py:505, fp16/fused_optimizer.py:80), but frozen parameters stay where they are, and so does one
    that is alone in its group, whose flat tensor is itself (torch/_utils.py, ``_flatten_dense_tensors``). What is left
    whole is not copied: a frozen model under adapters, fp32 without ZeRO. QLoRA has packed most of the file into
    4 bits, and what is not packed would keep all of it. Stage 3 cuts every parameter itself.

    ``groups``: what the optimizer is given, parameters or groups of them.
    """
    packs = run.method.kind == "qlora"
    if run.zero.stage == 3 or not (packs or run.zero.stage or run.precision in ("bf16", "fp16")):
        return 0
    grouped = [each["params"] if isinstance(each, dict) else [each] for each in groups]
    if not all(isinstance(each, dict) for each in groups):
        grouped = [[param for params in grouped for param in params]]
    flattened = {id(param) for params in grouped if len(params) > 1 for param in params}
    mapped = [param for param in module.parameters() if _is_mapped(param)]
    left = [param for param in mapped if id(param) not in flattened]
    if len(left) == len(mapped) and not packs:
        return 0
    for param in left:
        param.data = param.data.clone()
    return sum(param.numel() * param.element_size() for param in left)


def _is_mapped(param: torch.nn.Parameter) -> bool:
    """A storage of torch's own allocator can be resized; a stretch of a file's cannot."""
    return param.device.type == "cpu" and not param.untyped_storage().resizable()
