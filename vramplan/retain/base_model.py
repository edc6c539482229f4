"""The hook of KL: the base model's logits, from the model itself with its adapters off, or from a frozen copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class BaseModel:
    """``reference``: a frozen copy (a module or an engine of its own), or None where adapters can be switched off.
    ``autocast``: whether a module is run under bf16 autocast, as an engine does by itself."""

    def __init__(self, engine: Any, reference: Any | None = None, *, autocast: bool = False) -> None:
        self._engine, self._reference = engine, reference
        self._autocast = autocast and not hasattr(reference, "module")
        if reference is not None:
            reference.eval()
            getattr(reference, "module", reference).requires_grad_(False)

    def logits(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Logits (batch, length, vocabulary) without gradient and dropout."""
        with torch.no_grad():
            if self._reference is not None:
                with torch.autocast(inputs["input_ids"].device.type, torch.bfloat16, enabled=self._autocast):
                    found: torch.Tensor = self._reference(**inputs).logits
                return found
            with _adapters_off(self._engine):
                result: torch.Tensor = self._engine(**inputs).logits
                return result

    def state_bytes(self) -> int:
        """Bytes of the frozen copy on this rank; of a weight that ZeRO-3 split its part."""
        if self._reference is None:
            return 0
        params = getattr(self._reference, "module", self._reference).parameters()
        return sum(_kept(param).numel() * param.element_size() for param in params)


def _kept(param: Any) -> torch.Tensor:
    kept: torch.Tensor = getattr(param, "ds_tensor", param)
    return kept


@contextmanager
def _adapters_off(engine: Any) -> Iterator[None]:
    was_training = engine.module.training
    engine.eval()
    try:
        with engine.module.disable_adapter():
            yield
    finally:
        engine.train(was_training)
