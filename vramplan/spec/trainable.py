"""What of the model is trained."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, field_validator

from vramplan.errors import SpecError
from vramplan.facts.expansion import new_block_positions
from vramplan.spec.base import UserModel


class FullMethod(UserModel):
    """The model's own parameters are trained: all of them, unless some are frozen."""

    kind: Literal["full"] = "full"
    freeze: tuple[str, ...] = ()
    """Regular expressions: a parameter stays as it is if one of them is found in its full name."""
    train_last_blocks: int | None = Field(default=None, ge=1)
    """Only the last this many blocks are trained; embeddings, final norm and head stay too. None: all blocks."""
    new_blocks: int = Field(default=0, ge=0)
    """Blocks to add, each a copy that at first changes nothing, of which alone are trained (LLaMA-Pro, Wu et al. 2024,
    arXiv 2401.02415)."""

    @field_validator("freeze")
    @classmethod
    def _compile(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            _check_pattern(pattern)
        return value

    @property
    def freezes(self) -> bool:
        """Whether anything stays as it is."""
        return bool(self.freeze or self.train_last_blocks or self.new_blocks)

    def trains(self, name: str, num_layers: int) -> bool:
        """Whether the parameter of that full name is trained in a model of ``num_layers`` blocks (new ones counted)."""
        if any(re.search(pattern, name) for pattern in self.freeze):
            return False
        block = block_of(name)
        if self.new_blocks:
            return block in new_block_positions(num_layers - self.new_blocks, self.new_blocks)
        if self.train_last_blocks is not None:
            return block is not None and block >= num_layers - self.train_last_blocks
        return True


def check_trains(method: FullMethod, names: Iterable[str], num_layers: int) -> None:
    """Raises:
    SpecError: of parameters of these full names, in a model of ``num_layers`` blocks (new ones counted), nothing is
        left to train, or what is asked to stay as it is is not there.
    """
    every = tuple(names)
    if method.train_last_blocks is not None and method.train_last_blocks > num_layers:
        raise SpecError(
            f"method.train_last_blocks {method.train_last_blocks} is more than the {num_layers} blocks: lower it"
        )
    patterns = list(method.freeze)
    if patterns and not any(re.search(pattern, name) for pattern in patterns for name in every):
        raise SpecError(
            f"method.freeze {patterns} is found in no parameter's name, such as {every[0]} or {every[-1]}: mend it, or "
            "leave it out"
        )
    if not any(method.trains(name, num_layers) for name in every):
        raise SpecError(f"method.freeze {patterns} leaves nothing to train: take a pattern out")


def block_of(name: str) -> int | None:
    """The decoder block that a parameter's full name lies in: the first number of the name, if it has one."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found.group(1)) if found else None


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression ({error})") from error


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
    target_parameters: tuple[str, ...] = ()
    """Endings of names of parameters that get an adapter as they are, besides: weights of routed experts and routers,
    such as ``experts.gate_up_proj`` (PEFT's key of that name)."""
    modules_to_save: tuple[str, ...] = ()
    """Names (or name endings) of the token table and the output head, such as ``embed_tokens`` and ``lm_head``, of
    which a copy is trained whole and saved with the adapters, as new tokens need (PEFT's key of that name). Where both
    are one matrix, either name trains it for both."""
    use_dora: bool = False
    """Weight-decomposed adapters (DoRA, arXiv 2402.09353); ``method: dora`` is short for lora with it."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)."""
    fp32_norms: bool = False
    """Norms are fp32 beside bf16 embeddings and head, as TRL leaves a 4-bit model (``peft_module_casting_to_bf16``
    after PEFT's ``prepare_model_for_kbit_training``); for engine torch, since DeepSpeed casts them with the model."""

    @field_validator("target_modules")
    @classmethod
    def _compiles(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(value, str):
            _check_pattern(value)
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

    def adapts_table(self, module_name: str) -> bool:
        """Whether PEFT puts an adapter on an embedding of that full name, which ``all-linear`` does not mean."""
        return self.target_modules != "all-linear" and self.adapts(module_name)

    def saves(self, module_name: str) -> bool:
        """Whether PEFT trains a whole copy of a module of that full name (utils/other.py,
        ``set_additional_trainable_modules``: by the ending of its name)."""
        return any(module_name == name or module_name.endswith(f".{name}") for name in self.modules_to_save)

    @property
    def scale_alpha(self) -> int:
        """alpha as given, or PEFT users' habit of 2 r."""
        return self.alpha if self.alpha is not None else 2 * self.r


Method = Annotated[FullMethod | LoraMethod, Field(discriminator="kind")]
