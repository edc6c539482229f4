"""The options that say what is asked of a run, shared by ``fit`` and ``plan``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_type_hints

from vramplan.errors import SpecError
from vramplan.search.plan import asked_fields
from vramplan.spec.load import expand_kinds, merge, nest, parse_assignments, run_from_mapping
from vramplan.spec.run import RunSpec

_OFFLOADS = {
    "none": {"offload_optimizer": "none", "offload_param": "none"},
    "optimizer": {"offload_optimizer": "cpu", "offload_param": "none"},
    "all": {"offload_optimizer": "cpu", "offload_param": "cpu"},
}


def _option(help_text: str, name: str | None = None, panel: str = "Run") -> Any:
    import typer  # where the options are shown or read in full: ``cli/plain.py`` needs none of it

    return typer.Option(*([name] if name else []), help=help_text, rich_help_panel=panel, show_default=False)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """One field an option; what is not given is left to the spec file, its defaults, or the search."""

    method: Annotated[str | None, _option("full, lora, dora or qlora (default: full)")] = None
    lora_r: Annotated[int | None, _option("Rank of the adapters (default: 16)")] = None
    precision: Annotated[str | None, _option("bf16, fp16, fp32 or bf16-autocast (default: bf16)")] = None
    seq_len: Annotated[int | None, _option("Tokens of one sequence (default: 2048)")] = None
    global_batch: Annotated[int | None, _option("Sequences of one optimizer step over all ranks")] = None
    micro_batch: Annotated[int | None, _option("Sequences of one rank's forward (default: searched)")] = None
    optimizer: Annotated[str | None, _option("adamw, adamw_torch, adamw_8bit, sgd, ... (default: adamw)")] = None
    attention: Annotated[str | None, _option("sdpa, eager or flash_attention_2 (default: sdpa, else eager)")] = None
    loss: Annotated[str | None, _option("hf; chunked: DeepSpeed's; liger: fused (default: hf)")] = None
    zero: Annotated[int | None, _option("ZeRO stage, 0 to 3 (default: searched)", panel="Layout")] = None
    offload: Annotated[str | None, _option("none, optimizer or all (default: searched)", panel="Layout")] = None
    checkpointing: Annotated[str | None, _option("none or full (default: searched)", panel="Layout")] = None
    gpu: Annotated[
        str | None, _option("A GPU of the catalogue, or cpu (default: this machine's)", panel="Hardware")
    ] = None
    gpus: Annotated[int | None, _option("GPUs (or CPU ranks) of each node", panel="Hardware")] = None
    nodes: Annotated[int | None, _option("Nodes of as many GPUs each (default: 1)", panel="Hardware")] = None
    memory_cap: Annotated[str | None, _option("Bytes that one rank may use, such as 24GiB", panel="Hardware")] = None
    host_memory: Annotated[str | None, _option("Memory of one node's host, such as 512GiB", panel="Hardware")] = None
    assign: Annotated[
        list[str] | None, _option("Any other field of the spec, as KEY=VALUE; may be repeated", "--set")
    ] = None


_PLACES = {
    "method": "method.kind",
    "lora_r": "method.r",
    "global_batch": "global_batch_size",
    "micro_batch": "micro_batch_size",
    "optimizer": "optimizer.kind",
    "zero": "zero.stage",
    "checkpointing": "activation_checkpointing",
    "gpu": "hardware.gpu",
    "gpus": "hardware.gpus_per_node",
    "nodes": "hardware.nodes",
    "memory_cap": "hardware.memory_cap",
    "host_memory": "hardware.host_memory",
}
"""Where options go whose names are not the spec's own."""


def asked_run(model: str, options: RunOptions) -> RunSpec:
    """The run that a model's name or a spec file asks for, with the options laid over it.

    Raises:
        SpecError: a file, key or value that cannot be; the text names it and the nearest that can.
    """
    asked, source = asked_fields(model)
    fields = merge(asked, _overrides(options))
    if options.lora_r is not None:
        fields["method"] = {"kind": "lora", **fields["method"]}  # a rank says that there are adapters
    return run_from_mapping(fields, source)


def with_run_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Gives ``function``, whose parameter ``options`` is a RunOptions, one command-line option for each field."""
    own = inspect.signature(function, eval_str=True)
    hints = get_type_hints(RunOptions, include_extras=True)
    shared = [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hints[each.name])
        for each in fields(RunOptions)
    ]

    @functools.wraps(function)
    def command(**given: Any) -> Any:
        options = RunOptions(**{each.name: given.pop(each.name) for each in fields(RunOptions)})
        return function(options=options, **given)

    kept = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in own.parameters.items()
        if name != "options"
    ]
    signature = own.replace(parameters=[*kept, *shared])
    command.__signature__ = signature  # type: ignore[attr-defined]  # what typer reads
    command.__annotations__ = {name: each.annotation for name, each in signature.parameters.items()}
    del command.__wrapped__  # typer would look through it
    return command


def _overrides(options: RunOptions) -> dict[str, Any]:
    """The given options as a nested mapping, as in a spec file."""
    laid: dict[str, Any] = {}
    assigned = parse_assignments(options.assign) if options.assign else {}
    for each in fields(RunOptions):
        value = getattr(options, each.name)
        if value is None or each.name == "assign":
            continue
        placed = {"zero": _offload(value)} if each.name == "offload" else nest(_PLACES.get(each.name, each.name), value)
        _check_agree(f"--{each.name.replace('_', '-')} {value}", placed, assigned)
        laid = merge(laid, placed)
    return merge(laid, assigned)


def _check_agree(option: str, placed: Mapping[str, Any], assigned: Mapping[str, Any]) -> None:
    """Raises SpecError where ``--set`` gives a field another value than an option does."""
    said = dict(_leaves(expand_kinds(assigned)))
    for key, value in _leaves(expand_kinds(placed)):
        if key in said and str(said[key]) != str(value):
            raise SpecError(f"{option} and --set {key}={said[key]} say different things: give one of them")


def _leaves(nested: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values."""
    for name, value in nested.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _offload(name: str) -> dict[str, str]:
    if name not in _OFFLOADS:
        raise SpecError(f"--offload is {name!r} but must be none, optimizer or all")
    return _OFFLOADS[name]
