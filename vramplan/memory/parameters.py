"""The parameter tensors of a model as it is trained: which are trained, which are adapters, which 4 bits can hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Literal

from vramplan.facts.architecture import Architecture, Linear, MixtureOfExperts
from vramplan.facts.blocks import ParamTensor
from vramplan.facts.dtype import Dtype
from vramplan.memory.muon import takes_muon
from vramplan.spec.rates import rate_share
from vramplan.spec.targets import fused_adapters, saved_modules
from vramplan.spec.trainable import FullMethod, LoraMethod, Method

ADAPTER_DTYPE = Dtype.FP32
"""PEFT keeps adapters in fp32 (``autocast_adapter_dtype``) until DeepSpeed casts the module."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One unique parameter tensor of the model as it is trained, in registration order."""

    name: str
    numel: int
    trained: bool
    in_linear: bool
    """Whether it belongs to a linear; of trained ones, to a module of the class ``nn.Linear`` itself, whose parameters
    travel in autocast's format (runtime/torch_autocast.py, ``init_autocast_params``)."""
    adapter: bool = False
    packable: bool = False
    """Whether it is a weight that bitsandbytes keeps in 4 bits if asked: of linears, but for the head's and those that
    a class of their own multiplies (transformers/quantizers/base.py, ``get_keys_to_not_convert``)."""
    factored_numel: int = 0
    """Elements of a row and a column of each of its matrices; of a vector all."""
    shape: tuple[int, ...] = ()
    """Rows and columns last; empty for adapters on parameters, whose factors PEFT lays together."""


Groups = tuple[tuple[tuple[str, int], ...], ...]
"""The optimizer's groups of parameters ``(name, numel)``, in its order."""
Matrices = Literal["together", "apart", "largest first"]
"""Whether the matrices that Muon updates are groups of their own (runtime/engine.py, ``_muon_param_groups``), and by
their shapes (original_muon.py, ``MuonWithAuxAdam``)."""


def factored_numel(shape: tuple[int, ...]) -> int:
    """What an optimizer keeps that factors matrices (Adafactor), one element each."""
    if len(shape) < 2:
        return prod(shape)
    return prod(shape[:-1]) + prod(shape[:-2]) * shape[-1]


@lru_cache(maxsize=256)
def parameters(
    architecture: Architecture, method: Method, adapted: frozenset[str] = frozenset()
) -> tuple[Parameter, ...]:
    """Every unique parameter of the model, adapters where PEFT puts them: after their own base layer's."""
    return tuple(_parameters(architecture, method, adapted))


@lru_cache(maxsize=256)
def trained_tensors(architecture: Architecture, method: Method, adapted: frozenset[str]) -> tuple[tuple[str, int], ...]:
    """Name and elements of every parameter that is trained."""
    return tuple((param.name, param.numel) for param in parameters(architecture, method, adapted) if param.trained)


@lru_cache(maxsize=256)
def parameter_groups(
    architecture: Architecture, method: Method, adapted: frozenset[str], decay: float, matrices: Matrices = "together"
) -> Groups:
    """Trained parameters by the share of the learning rate that they have, the highest first; one group where all have
    the same (``decay`` 1). Where matrices are apart, each falls into its matrices and the rest."""
    groups = _by_rate(architecture, method, adapted, decay)
    if matrices == "together":
        return groups
    shapes, halves = matrix_shapes(architecture, method, adapted), []
    for group in groups:
        own = [each for each in group if each[0] in shapes]
        if matrices == "largest first":
            own.sort(key=lambda each: shapes[each[0]], reverse=True)
        halves += [own, [each for each in group if each[0] not in shapes]]
    return tuple(tuple(half) for half in halves if half)


def _by_rate(architecture: Architecture, method: Method, adapted: frozenset[str], decay: float) -> Groups:
    trained = trained_tensors(architecture, method, adapted)
    if decay == 1.0:
        return (trained,)
    by_share: dict[float, list[tuple[str, int]]] = {}
    for name, numel in trained:
        by_share.setdefault(rate_share(name, architecture.num_layers, decay), []).append((name, numel))
    return tuple(tuple(group) for _, group in sorted(by_share.items(), reverse=True))


@lru_cache(maxsize=256)
def matrix_shapes(architecture: Architecture, method: Method, adapted: frozenset[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of the trained parameters that Muon updates, by name, in registration order."""
    every = parameters(architecture, method, adapted)
    return {each.name: each.shape for each in every if each.trained and takes_muon(each.name, each.shape)}


@lru_cache(maxsize=256)
def counted_numels(
    architecture: Architecture, method: Method, adapted: frozenset[str], trained: bool
) -> tuple[tuple[int, int], ...]:
    """Elements of a parameter that is trained, or that is not, and how many parameters have as many."""
    params = parameters(architecture, method, adapted)
    return tuple(Counter(param.numel for param in params if param.trained is trained).items())


def _parameters(architecture: Architecture, method: Method, adapted: frozenset[str]) -> Iterator[Parameter]:
    linears = dict(architecture.named_linears())
    *_, last = architecture.named_tensors()  # the module of the last parameter stays whole, whatever it is
    packable = {f"{name}.weight" for name, linear in linears.items() if not linear.by_matmul} - {last.name}
    linears[architecture.head.name] = architecture.head
    if isinstance(method, FullMethod):
        nn_linears = {name for name, linear in linears.items() if linear.is_nn_linear}
        if architecture.tied_embeddings and architecture.head.is_nn_linear:
            nn_linears.add(architecture.embeddings[0].name)
        for tensor in architecture.named_tensors():
            trained = method.trains(tensor.name, architecture.num_layers)
            in_linear = tensor.name.rpartition(".")[0] in nn_linears
            factored = factored_numel(tensor.shape)
            yield Parameter(tensor.name, tensor.numel, trained, in_linear, factored_numel=factored, shape=tensor.shape)
        return
    fused = _fused_adapters(architecture, method, adapted) if adapted else {}
    saved = saved_modules(method, architecture)
    tables = _table_adapters(architecture, method)
    pending: tuple[str, list[Parameter]] | None = None
    for tensor in architecture.named_tensors():
        module = tensor.name.rpartition(".")[0]
        if pending is not None and pending[0] != module:
            yield from pending[1]
            pending = None
        if module in saved:
            yield from _original_and_copy(tensor, saved[module])
            continue
        yield Parameter(tensor.name, tensor.numel, False, module in linears, packable=tensor.name in packable)
        if module in linears and pending is None:
            pending = module, _adapters(architecture, method, module, linears[module])
        elif module in fused and pending is None:
            pending = module, fused[module]
        elif module in tables and pending is None:
            pending = module, tables[module]
    if pending is not None:
        yield from pending[1]
    if architecture.tied_embeddings:  # a tied head has no weight of its own, but it can have an adapter
        yield from _adapters(architecture, method, architecture.head.name, architecture.head)


def _original_and_copy(tensor: ParamTensor, in_linear: bool) -> Iterator[Parameter]:
    """Of a module that is saved whole PEFT keeps the original, which nothing reads, and trains a copy
    (peft/utils/other.py, ``ModulesToSaveWrapper``); the copy has the tensor's name, for it is what runs."""
    module, _, own = tensor.name.rpartition(".")
    yield Parameter(f"{module}.original_module.{own}", tensor.numel, False, in_linear)
    factored = factored_numel(tensor.shape)
    yield Parameter(tensor.name, tensor.numel, True, in_linear, factored_numel=factored, shape=tensor.shape)


def _fused_adapters(
    architecture: Architecture, method: LoraMethod, adapted: frozenset[str]
) -> dict[str, list[Parameter]]:
    """The adapters of routers and experts by the full name of the module that they are in."""
    made: dict[str, list[Parameter]] = {}
    for index, layer in enumerate(architecture.layers):
        block, prefix = layer.feed_forward, f"{architecture.layer_prefix}.{index}."
        for each in fused_adapters(block, adapted, method.r) if isinstance(block, MixtureOfExperts) else ():
            made.setdefault(f"{prefix}{each.parameter.rpartition('.')[0]}", []).extend(
                Parameter(f"{prefix}{name}", numel, True, True, adapter=True)
                for name, numel in ((each.down, each.down_numel), (each.up, each.up_numel))
            )
    return made


def _adapters(architecture: Architecture, method: LoraMethod, module: str, linear: Linear) -> list[Parameter]:
    is_head = module == architecture.head.name
    if (is_head and method.target_modules == "all-linear") or not method.adapts(module):
        return []
    made = [
        _factor(f"{module}.lora_A.weight", method.r, linear.in_features),
        _factor(f"{module}.lora_B.weight", linear.out_features, method.r),
    ]
    if method.use_dora:
        made.append(_magnitude(module, linear.out_features))
    return made


def _table_adapters(architecture: Architecture, method: LoraMethod) -> dict[str, list[Parameter]]:
    """The adapters of embeddings by the name of the table: parameters of no linear."""
    made: dict[str, list[Parameter]] = {}
    for table in architecture.embeddings:
        if not method.adapts_table(table.name):
            continue
        made[table.name] = [
            replace(_factor(f"{table.name}.lora_embedding_A", method.r, table.num_embeddings), in_linear=False),
            replace(_factor(f"{table.name}.lora_embedding_B", table.width, method.r), in_linear=False),
            *([_magnitude(table.name, table.width)] if method.use_dora else []),
        ]
    return made


def _magnitude(module: str, width: int) -> Parameter:
    name = f"{module}.lora_magnitude_vector.weight"
    return Parameter(name, width, True, False, adapter=True, factored_numel=width, shape=(width,))


def _factor(name: str, rows: int, columns: int) -> Parameter:
    shape = (rows, columns)
    return Parameter(name, rows * columns, True, True, adapter=True, factored_numel=rows + columns, shape=shape)
