"""The blocks of a mixture of experts: router, routed experts, and the whole with its shared expert."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vramplan.facts.blocks import GatedMLP, Linear, ParamTensor, Role


@dataclass(frozen=True, slots=True)
class Router:
    """Scores every expert for every token: ``num_experts x in_features``.

    ``is_linear``: a ``torch.nn.Linear`` (Llama-4), which adapters and quantizers see; else a bare parameter.
    """

    name: str
    in_features: int
    num_experts: int
    bias: bool = False
    is_linear: bool = False

    def tensors(self) -> Iterator[ParamTensor]:
        yield ParamTensor(f"{self.name}.weight", (self.num_experts, self.in_features), Role.ROUTER)
        if self.bias:
            yield ParamTensor(f"{self.name}.bias", (self.num_experts,), Role.ROUTER)

    def linears(self) -> Iterator[Linear]:
        if self.is_linear:
            yield Linear(self.name, self.in_features, self.num_experts, self.bias, Role.ROUTER)


@dataclass(frozen=True, slots=True)
class Experts:
    """All routed experts of a layer as two three-dimensional parameters, gate and up fused (transformers 5).

    No ``torch.nn.Linear``: adapters and quantizers that walk modules do not see them. ``transposed``: stored
    ``(experts, in, out)`` (gpt-oss, Llama-4) instead of ``(experts, out, in)``.
    """

    name: str
    num_experts: int
    hidden_size: int
    intermediate: int
    bias: bool = False
    transposed: bool = False
    seen_as_untransposed: bool = False
    """Whether their module does not say that they are transposed, so that PEFT takes in for out (Llama-4)."""

    def tensors(self) -> Iterator[ParamTensor]:
        for suffix, fan_in, fan_out in (
            ("gate_up_proj", self.hidden_size, 2 * self.intermediate),
            ("down_proj", self.intermediate, self.hidden_size),
        ):
            matrix = (fan_in, fan_out) if self.transposed else (fan_out, fan_in)
            yield ParamTensor(f"{self.name}.{suffix}", (self.num_experts, *matrix), Role.EXPERTS)
            if self.bias:
                yield ParamTensor(f"{self.name}.{suffix}_bias", (self.num_experts, fan_out), Role.EXPERTS)

    def linears(self) -> Iterator[Linear]:
        yield from ()


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """Routed experts, ``experts_per_token`` of them for each token, and perhaps a shared expert for all tokens.

    ``parts`` in registration order: the router, the experts, the shared expert, and the linear that weighs it
    (Qwen2-MoE).
    """

    experts_per_token: int
    activation: str
    parts: tuple[Router | Experts | GatedMLP | Linear, ...]
    scoring: str = "softmax"
    """How the router makes weights of its scores:

    ``softmax``      fp32 softmax over all experts, the best of them, in the scores' format again (Qwen)
    ``softmax_fp32`` the same, and the weights stay in fp32 (Mixtral)
    ``best``         the best scores, and softmax over them alone (gpt-oss)
    ``softmax_greedy``    fp32 scores and softmax, the best of them, scaled (DeepSeek-V2)
    ``softmax_of_groups`` the same, but out of the groups with the best experts (DeepSeek-V2)
    ``sigmoid_of_all``    every expert gets every token, times the sigmoid of its score or 0 (Llama-4)
    ``sigmoid_of_groups`` sigmoids of fp32 scores, out of the groups with the best pairs of experts (DeepSeek-V3)
    """
    jitter: bool = False
    """The block's input is multiplied in place by random factors (Mixtral's ``router_jitter_noise``)."""
    normalises: bool = True
    """A token's weights are divided by their sum."""
    num_groups: int = 1
    """Groups of experts that a router chooses among first."""
    groups_per_token: int = 1
    """How many of them a token's experts are taken from."""

    @property
    def scores_in_fp32(self) -> bool:
        """Whether the router casts its input and its weight to fp32 (DeepSeek)."""
        return self.scoring in ("softmax_greedy", "softmax_of_groups", "sigmoid_of_groups")

    @property
    def router(self) -> Router:
        return next(part for part in self.parts if isinstance(part, Router))

    @property
    def experts(self) -> Experts:
        return next(part for part in self.parts if isinstance(part, Experts))

    @property
    def shared(self) -> GatedMLP | None:
        return next((part for part in self.parts if isinstance(part, GatedMLP)), None)

    @property
    def shared_gate(self) -> Linear | None:
        return next((part for part in self.parts if isinstance(part, Linear)), None)

    @property
    def num_experts(self) -> int:
        return self.experts.num_experts

    def tensors(self) -> Iterator[ParamTensor]:
        for part in self.parts:
            yield from part.tensors()

    def linears(self) -> Iterator[Linear]:
        for part in self.parts:
            if isinstance(part, Linear):
                yield part
            else:
                yield from part.linears()
