"""Optimizers that DeepSpeed cannot build by name, built here and handed over, and those of plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch

from vramplan.emit.deepspeed import CLIENT_OPTIMIZERS
from vramplan.errors import SpecError
from vramplan.spec.rates import rate_groups
from vramplan.spec.run import RunSpec

_BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw": "PagedAdamW32bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
}


def trained_groups(run: RunSpec, module: Any) -> list[Any]:
    """What the optimizer is given: the trained parameters, in groups where rates differ."""
    trained = [(name, param) for name, param in module.named_parameters() if param.requires_grad]
    if run.retain.layer_lr_decay == 1.0:
        return [param for _, param in trained]
    num_layers = module.config.get_text_config().num_hidden_layers
    return rate_groups(trained, num_layers, run.retain.layer_lr_decay)


def client_optimizer(run: RunSpec, params: list[Any]) -> torch.optim.Optimizer | None:
    """The optimizer to hand to ``deepspeed.initialize``; None where its config names it.

    ``params``: parameters, or groups of them as torch's optimizers take.
    """
    kind = run.optimizer.kind
    if kind not in CLIENT_OPTIMIZERS:
        return None
    options = run.optimizer
    if kind == "adamw_torch_fused":
        return torch.optim.AdamW(
            params,
            lr=run.peak_lr,
            betas=options.betas,
            eps=options.eps,
            weight_decay=options.weight_decay,
            fused=True,
        )
    try:
        import bitsandbytes.optim as quantized
    except ImportError as error:
        raise SpecError(f"optimizer.kind: {kind} needs bitsandbytes; install it, or use adamw") from error
    optimizer: torch.optim.Optimizer = getattr(quantized, _BITSANDBYTES[kind])(
        params, lr=run.peak_lr, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay
    )
    return optimizer


def plain_optimizer(run: RunSpec, params: list[Any]) -> torch.optim.Optimizer:
    """The optimizer that transformers' Trainer makes for the run's kind (trainer_optimizer.py)."""
    options, kind = run.optimizer, run.optimizer.kind
    common: dict[str, Any] = {"lr": run.peak_lr, "weight_decay": options.weight_decay}
    if kind == "sgd":
        return torch.optim.SGD(params, momentum=options.momentum, **common)
    if kind == "adafactor":
        from transformers.optimization import Adafactor

        adafactor: torch.optim.Optimizer = Adafactor(params, scale_parameter=False, relative_step=False, **common)
        return adafactor
    if kind == "lion":
        import bitsandbytes.optim as quantized

        lion: torch.optim.Optimizer = quantized.Lion32bit(params, **common)
        return lion
    if kind in _BITSANDBYTES:
        made = client_optimizer(run, params)
        assert made is not None
        return made
    fused = kind == "adamw_torch_fused"
    return torch.optim.AdamW(params, betas=options.betas, eps=options.eps, fused=fused or None, **common)
