"""trace_rank: plays rank 0 of a job on fake tensors; the trace of its blocks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from torch._subclasses import FakeTensorMode

from vramplan.errors import SimulationError, VramplanError
from vramplan.rank.group import join_fake_group
from vramplan.rank.play import RankPlayer
from vramplan.simulate.accumulate import sole_use_counts
from vramplan.simulate.answers import ANSWERS
from vramplan.simulate.black_box import BlackBox
from vramplan.simulate.categories import categorise
from vramplan.simulate.cuda_attention import flash_in_class_tables, register_flash
from vramplan.simulate.events import Note
from vramplan.simulate.four_bit import four_bit_answers, four_bit_fakes
from vramplan.simulate.patches import patched
from vramplan.simulate.request import Conditions
from vramplan.simulate.scratch import CPU_SCRATCH, CUDA_SCRATCH
from vramplan.simulate.trace import Trace
from vramplan.simulate.tracker import Answer, Tracker
from vramplan.spec.layout import Layout
from vramplan.spec.run import RunSpec


@dataclass(slots=True)
class Traced:
    """A trace, and how far it came."""

    trace: Trace
    numel_total: int = 0
    numel_trainable: int = 0
    error: SimulationError | None = None
    """Why it stopped; the phases before are whole."""
    notes: list[Note] = field(default_factory=list)
    traced_layers: tuple[int, ...] = ()
    """Depths that were traced and from which this trace follows; empty: it was traced in full."""
    in_full_because: str = ""
    """Why it does not follow from fewer layers; empty where it does, or was not asked to."""


class _FakeMode(FakeTensorMode):
    """Fake tensors that never touch the device type, which has no kernels: values start on the host."""

    @property
    def avoid_device_init(self) -> bool:
        return True


def trace_rank(
    run: RunSpec, layout: Layout, conditions: Conditions, device_type: str, black_box: BlackBox | None = None
) -> Traced:
    """Plays the run on fake tensors of a ``cpu`` or a ``cuda`` device, in this process, which plays one world size
    and one device type in its life."""
    quantized = run.method.kind == "qlora" or run.optimizer.kind.endswith("8bit")
    tracker, device = _tracker_of(device_type, four_bit_answers() if quantized else {}, black_box)
    join_fake_group(layout.world_size)
    sole_use_counts()
    # a model that makes a mask of its own where none is passed (OPT) hides nothing by it
    conditions = replace(conditions, padded=conditions.padded and run.attention_mask)
    if run.attention == "flash_attention_2":
        run = run.model_copy(update={"attention": register_flash(padded=conditions.padded)})
    player = RankPlayer(
        run,
        layout,
        tracker.phase,
        device,
        steps=conditions.steps,
        managed=conditions.managed,
        padded=conditions.padded,
        halved_weights=conditions.halved_weights,
    )
    player.on_model = tracker.learn_model
    traced = Traced(tracker.trace, notes=tracker.notes)
    four_bit = four_bit_fakes() if quantized else nullcontext()
    model_type = str((run.model_config_fields or {}).get("model_type"))
    with _quiet(), flash_in_class_tables(model_type), _FakeMode(allow_non_fake_inputs=True), four_bit:
        with patched(tracker, conditions, device_type, packed=run.data.packing != "none"), tracker:
            try:
                player.play()
            except Exception as error:  # noqa: BLE001 - whatever the stack does not bear is named with its place
                traced.error = _explain(error, tracker)
            tracker.stop()
        categorise(tracker, player)
    traced.numel_total, traced.numel_trainable = player.played.numel_total, player.played.numel_trainable
    return traced


def _tracker_of(device_type: str, answers: Mapping[Any, Answer], black_box: BlackBox | None) -> tuple[Tracker, str]:
    """The tracker of a device type with further answers, and the device's name in torch."""
    answers = {**ANSWERS, **answers}
    if device_type == "cpu":
        return Tracker("cpu", CPU_SCRATCH, answers, black_box), "cpu"
    from vramplan.simulate.gpu import NAME, set_up_gpu

    module = set_up_gpu()
    tracker = Tracker(NAME, CUDA_SCRATCH, answers, black_box)
    module.on_stream = tracker.set_stream
    module.on_empty_cache = tracker.empty_cache
    module.on_pin = tracker.pin
    return tracker, f"{NAME}:0"


def _explain(error: Exception, tracker: Tracker) -> SimulationError:
    """One sentence: the phase, the module and the operator (torch's text names it); what a user can mend, as it is."""
    if isinstance(error, VramplanError):
        return SimulationError(str(error))
    where = tracker.failed_in or ("the model" if tracker.failed_phase == "model_load" else "DeepSpeed's engine")
    first = str(error).strip().splitlines() or [""]
    explained = SimulationError(
        f"{tracker.failed_phase}: {where} cannot be simulated: {type(error).__name__}: {first[0]}"
    )
    explained.__cause__ = error
    return explained


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        yield
