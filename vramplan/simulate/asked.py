"""From what a user asks to what is simulated: open fields decided, the device's capacity and overhead looked up."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vramplan.errors import ConfigError, LegalityError, NoPlanError, SpecError, UnknownNameError
from vramplan.facts.device import Device, Node
from vramplan.facts.devices import resolve_node
from vramplan.facts.resolve import resolve_architecture, resolve_config
from vramplan.memory.estimate import UncoveredError, estimate
from vramplan.memory.ledger import Estimate
from vramplan.memory.overhead import overhead
from vramplan.memory.term import Term
from vramplan.search.choose import check_sequence_length, search
from vramplan.search.legality import illegality, with_usual_attention
from vramplan.search.space import Candidate, batch_splits, layout_of
from vramplan.simulate.request import Conditions, DeviceType, SimulationRequest
from vramplan.spec.layout import Layout
from vramplan.spec.run import RunSpec
from vramplan.units import parse_bytes


@dataclass(frozen=True, slots=True)
class ClosedRun:
    """A run with nothing left open, and where it is to be simulated."""

    asked: RunSpec
    run: RunSpec
    node: Node
    estimate: Estimate | None
    """None where the arithmetic does not cover the run."""
    uncovered: str = ""
    """Why there is no estimate."""

    def request(self, conditions: Conditions | None = None, key: str = "") -> SimulationRequest:
        """What simulates it on its node."""
        return request_on(self.run, self.node, conditions, key)


def node_to_simulate(run: RunSpec, cap: str | None = None) -> Node:
    """The node of the run's ``hardware``; with a ``cap`` and no GPU named or present, GPUs of that capacity.

    Raises:
        SpecError: the cap is no size.
    """
    if cap is None:
        return resolve_node(run.hardware)
    try:
        num_bytes = parse_bytes(cap)
    except ValueError as error:
        raise SpecError(f"--cap: {error}") from error
    if num_bytes < 1:
        raise SpecError(f"--cap is {cap!r}; it must be more than 0 bytes")
    hardware = run.hardware
    ranks = run.layout.world_size if run.layout is not None else 1
    if hardware.gpu is None:
        device = Device(f"GPU of {cap}", "cuda", num_bytes, num_bytes, note="only its capacity is known")
        return Node(device, hardware.gpus_per_node or ranks // hardware.nodes, hardware.nodes)
    return replace(resolve_node(hardware), memory_cap_bytes=num_bytes)


def close_run(asked: RunSpec, node: Node) -> ClosedRun:
    """What the planner would choose; where the arithmetic does not cover the run, one sequence at a time.

    There the rest is left as lean as DeepSpeed makes it without offload: ZeRO-3 (0 on one rank), full checkpointing.

    Raises:
        LegalityError: a run that leaves nothing open is one that DeepSpeed refuses.
        SpecError: what is asked cannot be; the text names the field.
    """
    given, asked = asked, asked.model_copy(update={"model_config_fields": dict(resolve_config(asked))})
    try:
        architecture = resolve_architecture(given)
        check_sequence_length(asked, architecture)
        asked = with_usual_attention(asked, architecture)
        if _is_closed(asked):
            refused = illegality(asked, node, architecture)
            if refused is not None:
                raise LegalityError(f"{refused.reason} ({refused.source})")
            return ClosedRun(asked, asked, node, estimate(asked, node, architecture))
        answer = search(asked, node, architecture)
        return ClosedRun(asked, answer.best.run, node, answer.estimate)
    except NoPlanError:
        raise
    except (UncoveredError, UnknownNameError, ConfigError) as error:
        return ClosedRun(asked, _closed_leanly(asked, node), node, None, str(error))


def request_on(
    run: RunSpec, node: Node, conditions: Conditions | None = None, key: str = "", extra_bytes: int = 0
) -> SimulationRequest:
    """A closed run on a node, with what the driver counts beside the allocator taken off its capacity."""
    device_type: DeviceType = "cpu" if node.device.kind == "cpu" else "cuda"
    beside = sum(term.num_bytes for term in driver_terms(run, node)) + extra_bytes
    return SimulationRequest(run, device_type, node.capacity_bytes, beside, conditions or Conditions(), key=key)


def driver_terms(run: RunSpec, node: Node) -> tuple[Term, ...]:
    """Context, communicators and workspaces; fragmentation is the replay's to say."""
    layout = run.layout or Layout(dp=node.world_size)
    return overhead(node, layout, run.alloc_conf, 0).terms


def _is_closed(run: RunSpec) -> bool:
    decided = (
        run.layout,
        run.micro_batch_size,
        run.grad_accum_steps,
        run.activation_checkpointing,
        run.zero.stage,
        run.zero.offload_optimizer,
        run.zero.offload_param,
    )
    return None not in decided


def _closed_leanly(run: RunSpec, node: Node) -> RunSpec:
    layout = layout_of(run, node)
    micro, accum = batch_splits(run, layout.dp)[0]
    stage = run.zero.stage
    lean = Candidate(
        micro_batch_size=micro,
        grad_accum_steps=accum,
        zero_stage=stage if stage is not None else (3 if layout.zero_degree > 1 else 0),
        offload_optimizer=run.zero.offload_optimizer or "none",
        offload_param=run.zero.offload_param or "none",
        activation_checkpointing=run.activation_checkpointing or "full",
    )
    return lean.close(run, node)
