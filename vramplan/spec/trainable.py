"""What of the model is trained."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from vramplan.spec.base import UserModel


class FullMethod(UserModel):
    """Every parameter is trained."""

    kind: Literal["full"] = "full"


class LoraMethod(UserModel):
    """Low-rank adapters on frozen weights (Hu et al. 2021, arXiv 2106.09685), as PEFT makes them."""

    kind: Literal["lora", "qlora"] = "lora"
    r: int = Field(default=16, ge=1)
    """Rank of the two factors of each adapter."""
    alpha: int | None = Field(default=None, ge=1)
    """Scale: the update is multiplied by alpha / r. None: 2 r."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Names (or name endings) of the modules that get an adapter; ``all-linear``: every linear but the head."""
    use_dora: bool = False
    """Weight-decomposed adapters (DoRA, arXiv 2402.09353)."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)."""

    @field_validator("target_modules")
    @classmethod
    def _compiles(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"{value!r} is no regular expression ({error})") from error
        return value

    def adapts(self, module_name: str) -> bool:
        """Whether PEFT puts an adapter on a linear of that full name (tuners_utils.py, check_target_module_exists).

        ``all-linear`` takes every linear but the output head, which is not asked about here; a list takes exact names
        and name endings; one string is a regular expression for the whole name.
        """
        targets = self.target_modules
        if targets == "all-linear":
            return True
        if isinstance(targets, str):
            return re.fullmatch(targets, module_name) is not None
        return any(module_name == name or module_name.endswith(f".{name}") for name in targets)

    @property
    def scale_alpha(self) -> int:
        """alpha as given, or PEFT users' habit of 2 r."""
        return self.alpha if self.alpha is not None else 2 * self.r


Method = Annotated[FullMethod | LoraMethod, Field(discriminator="kind")]
