"""One rank's whole run: data, model, engine, resume, steps, export, record."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vramplan.data.augment import add_embedding_noise
from vramplan.data.dataset import RunData, load_data, with_eval_sets
from vramplan.data.sample import Sample
from vramplan.emit.deepspeed import ds_config
from vramplan.facts.resolve import read_config
from vramplan.measure.run_dir import RunDir, write_json
from vramplan.measure.snapshots import has_saved_state, snapshots_of
from vramplan.search.plan import Plan
from vramplan.spec.check import check_run
from vramplan.spec.run import RunSpec
from vramplan.train.card import write_model_card
from vramplan.train.checkpoint import Resumed, resume
from vramplan.train.engine import TrainEngine, join_group
from vramplan.train.export import export
from vramplan.train.layout import check_sequence_parallel
from vramplan.train.loop import Loop
from vramplan.train.metrics import Memory, Metrics
from vramplan.train.model import check_fit_of_tokenizer, count_parameters, load_model, start_directory
from vramplan.train.phases import PROBED_STEPS, Phases
from vramplan.train.pinned import check_pinned_loss
from vramplan.train.pretrained import load_config, load_tokenizer, model_directory, public_name
from vramplan.train.probe_run import ProbeLoop, run_probe
from vramplan.train.record import Recorder, versions
from vramplan.train.retention import general_samples, reference_model, start_penalties
from vramplan.train.status import RankStatus
from vramplan.units import format_bytes


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is read before any memory is taken."""

    directory: Path
    config: dict[str, Any]
    """Fields of the model's ``config.json``."""
    tokenizer: Any
    data: RunData
    eval_sets: dict[str, list[Sample]]
    """``data.eval_sets``, encoded."""
    general: list[Sample]
    """What EWC's Fisher diagonal is estimated from."""


def train(
    plan: Plan, run_dir: RunDir, status: RankStatus, *, resuming: bool, probing: bool = False, retrying: bool = True
) -> None:
    """Runs a plan on this rank to its end, or its worst batch alone; every rank calls it.

    ``retrying``: out of memory is mended in this process where that is safe (``in_place.py``).

    Raises:
        VramplanError: what the user can mend, as one sentence.
    """
    _quieten_transformers()
    status.mark("data")
    run = plan.run
    check_sequence_parallel(plan)
    inputs = _read_inputs(plan)
    status.mark("join")
    device = join_group(run)
    if device.type == "cpu":
        # the CPU's allocator counts on this thread only, and transformers loads weights on others unless told not to
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    rank, phases = dist.get_rank(), Phases(status, device)
    start = start_directory(run, inputs.directory, run_dir, rank)
    metrics, memory = Metrics(run, run_dir, rank, device), Memory(device)
    status.remember_baseline()
    # transformers looks for the announcement as long as it lives
    engine, _announced = _engine(run, inputs, start, run_dir, phases, device)
    make_loop = ProbeLoop if probing else Loop
    pad_id = _pad_id(inputs.tokenizer)
    loop = make_loop(engine, inputs.data, run_dir, metrics, phases, memory, pad_id, inputs.eval_sets)
    fields = dict(read_config(start / "config.json"))
    if isinstance(loop, ProbeLoop):
        run_probe(loop, plan, fields)
    else:
        if not retrying:
            loop.forbid_retries()
        loop.saving.start(resuming)
        recorder = Recorder(plan, run_dir, fields, phases, count_parameters(engine.module))
        _train(loop, inputs, recorder, resuming)
    status.mark("end")


def _engine(
    run: RunSpec, inputs: Inputs, start: Path, run_dir: RunDir, phases: Phases, device: torch.device
) -> tuple[TrainEngine, object | None]:
    """The model of ``start`` in DeepSpeed's engine with what ``retain`` asks for, and ZeRO-3's announcement."""
    config = ds_config(run, dist.get_world_size())
    if dist.get_rank() == 0:
        write_json(run_dir.ds_config, config)
    with phases.phase("model_load"):
        loaded = load_model(run, start, config)
        if run.data.augment.neftune_alpha is not None:
            add_embedding_noise(loaded.module, run.data.augment.neftune_alpha)
    with phases.phase("engine_init"):
        gc.collect()  # a tied head's own weight, cut by ZeRO-3, is part of a cycle (``rank/play.py``)
        reference = reference_model(run, inputs.directory, config, device)
        engine = TrainEngine(run, loaded.module, config, device, reference)
    if engine.penalties is not None:
        with phases.phase("retention"):
            start_penalties(engine, inputs.general, _pad_id(inputs.tokenizer))
    return engine, loaded.zero3


def _train(loop: Loop, inputs: Inputs, recorder: Recorder, resuming: bool) -> None:
    """From where the run is to what is left of it: adapters or a model, its card and its record."""
    first_step = _resume(loop, recorder, resuming)
    loop.restore_losses(first_step)
    _announce(loop, inputs.data, first_step)
    seconds_per_step = _steps(loop, first_step, recorder)
    loop.return_to_best()
    base_name = public_name(loop.run, inputs.directory)
    with loop.phases.phase("export"):
        exported = export(loop.engine, loop.run_dir, inputs.tokenizer, base_name)
    recorder.refresh()
    if loop.engine.rank == 0:
        write_model_card(loop.run, loop.run_dir, exported, base_name)
    loop.metrics.event("end", step=loop.steps_done, exported=str(exported), seconds_per_step=seconds_per_step)
    loop.metrics.close()


def _read_inputs(plan: Plan) -> Inputs:
    run = plan.run
    check_run(run)
    directory = model_directory(run)
    tokenizer = load_tokenizer(directory, run)
    config = dict(read_config(directory / "config.json"))
    check_fit_of_tokenizer(run, load_config(directory, run), tokenizer)
    data, eval_sets = with_eval_sets(load_data(run, tokenizer), run, tokenizer)
    return Inputs(directory, config, tokenizer, data, eval_sets, general_samples(run, tokenizer))


def _resume(loop: Loop, recorder: Recorder, resuming: bool) -> int:
    """The step to go on from (0 at the start)."""
    found: Resumed | None = None
    if resuming and has_saved_state(loop.run_dir):  # else there is nothing to measure either
        with loop.phases.phase("resume"):
            found = resume(loop.engine, loop.run_dir.checkpoints, loop.state(0), snapshots_of(loop.run_dir))
            if found is not None:
                check_pinned_loss(found, loop.pinned_loss(), loop.run.precision)
        loop.phases.evaluated("resume", loop.engine.take_largest_evaluated())
    if found is None:
        if resuming:
            loop.metrics.event("note", text="no checkpoint yet: the run starts from the beginning")
        return 0
    for text in found.notes:
        loop.metrics.event("note", text=text)
    loop.metrics.event("resumed", step=found.step, path=str(found.path))
    loop.phases.stop_measuring()  # the record is of a run's first steps
    recorder.add_resume()
    loop.watch.reread(loop.run_dir.metrics, found.step)
    return found.step


def _announce(loop: Loop, data: RunData, first_step: int) -> None:
    total, trained = count_parameters(loop.engine.module)
    for text in data.notes:
        loop.metrics.event("note", text=text)
    kept = loop.engine.retention_bytes()
    if kept:
        loop.metrics.event("note", text=f"methods against forgetting keep {format_bytes(kept)} on this rank")
    loop.metrics.event(
        "start",
        step=first_step,
        total_steps=loop.total_steps,
        num_train=len(data.train),
        num_held_out=len(data.held_out),
        numel_total=total,
        numel_trainable=trained,
        versions=versions(),
    )


def _steps(loop: Loop, first_step: int, recorder: Recorder) -> float:
    """Runs the remaining steps; the mean seconds of those that were not measured (or of all, if all were)."""
    seconds: list[float] = []
    if first_step == 0:
        loop.before_training()
    for step in range(first_step, loop.total_steps):
        seconds.append(loop.step(step).seconds)
        done = step + 1
        if loop.phases.measures_steps and done == min(PROBED_STEPS, loop.total_steps):
            _finish_measuring(loop, recorder, seconds)
        loop.between_steps(done)
        recorder.refresh()
        if loop.stopped:
            break
    unmeasured = seconds[PROBED_STEPS:] if first_step == 0 else seconds
    counted = unmeasured or seconds
    return sum(counted) / max(1, len(counted))


def _finish_measuring(loop: Loop, recorder: Recorder, seconds: list[float]) -> None:
    loop.phases.stop_measuring_steps()
    loop.memory.learn(recorder.write(seconds[-1]))
    loop.metrics.event("measured", step=len(seconds), memory_peak=loop.memory.peak)


def _pad_id(tokenizer: Any) -> int:
    return int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else 0


def _quieten_transformers() -> None:
    """Progress bars of every rank would be all that a log holds."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
