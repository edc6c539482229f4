"""``vramplan train``: runs a plan on DeepSpeed, shows how it goes, and lays the measurement beside the prediction."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vramplan.errors import NoPlanError, SpecError, VramplanError
from vramplan.measure.run_dir import RunDir
from vramplan.search.plan import Plan, is_plan

if TYPE_CHECKING:
    from vramplan.spec.run import RunSpec
    from vramplan.supervise.recover import Terms

Listener = Callable[[dict[str, Any]], None]
"""Is given each event of ``metrics.jsonl``."""
_BYTES_TO_START = 1 << 19
"""Of each rank: 64 KiB in reserve (``train/disk.py``), its status, its and the launcher's output."""
_FILES_TO_START = 8

Source = Annotated[
    Path,
    typer.Argument(
        metavar="PLAN|SPEC|RUN_DIR",
        help="A plan.yaml, a spec (planned first), or the directory of a plan or of a run to resume.",
        show_default=False,
    ),
]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="Run directory (default: runs/MODEL-METHOD-TIME).")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")]
MaxSteps = Annotated[int | None, typer.Option(min=1, help="Optimizer steps, over the plan's.", show_default=False)]
Sample = Annotated[str | None, typer.Option(help="A question for the trained model at the end.", show_default=False)]
Assign = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any field of a spec, as KEY=VALUE; may be repeated.", show_default=False),
]
Verify = Annotated[
    bool | None,
    typer.Option(
        "--verify/--no-verify",
        help="Simulate the plan first (default: where its ranks have GPUs).",
        show_default=False,
    ),
]
Recover = Annotated[
    bool, typer.Option("--recover/--no-recover", help="After out-of-memory or a killed process, go on by itself.")
]
Probe = Annotated[
    bool, typer.Option("--probe", help="Run the longest batch, an evaluation and a save first; correct the plan.")
]
HangAfter = Annotated[
    float, typer.Option(min=5.0, metavar="SECONDS", help="End ranks that give no sign of life for so long.")
]
StuckAfter = Annotated[
    float,
    typer.Option(
        min=5.0,
        metavar="SECONDS",
        help="End ranks that live and go on with nothing for so long, in any phase: no batch, parameter or file is "
        "done, and none reads, writes or allocates 64 KiB in a second. What comes after training is ended where it "
        "does nothing for so long.",
    ),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        help="If no plan is left, change the training: seq_len, method or optimizer; may be repeated.",
        show_default=False,
    ),
]
Hostfile = Annotated[
    Path | None, typer.Option(help="Hosts of a run on several nodes, as DeepSpeed takes them.", show_default=False)
]


def train(
    source: Source,
    output: Output = None,
    resume: Resume = False,
    max_steps: MaxSteps = None,
    sample: Sample = None,
    assign: Assign = None,
    verify: Verify = None,
    recover: Recover = True,
    probe: Probe = False,
    hang_after: HangAfter = 60.0,
    stuck_after: StuckAfter = 600.0,
    allow: Allow = None,
    hostfile: Hostfile = None,
) -> None:
    """Launch the ranks, show loss, speed and memory, and write a run directory.

    The run directory holds metrics.jsonl, TensorBoard events, checkpoints, the measurement record and what was trained.
    """
    from vramplan.cli.output import show
    from vramplan.cost.utilisation import utilisation
    from vramplan.facts.resolve import resolve_architecture
    from vramplan.report.progress import TrainingView
    from vramplan.report.words import describe_layout
    from vramplan.supervise.recover import Terms
    from vramplan.supervise.supervisor import check_before_launch
    from vramplan.supervise.tasks import check_tasks
    from vramplan.supervise.watch import Patience

    patience = Patience(silent_after_s=hang_after, stuck_after_s=stuck_after)
    terms = Terms(hostfile, patience, _checked_allowances(allow or []))
    path = _plan_file(source)
    plan = _with_overrides(_plan_of(path, assign or []), max_steps, sample)
    run_dir = RunDir(output or _default_output(path, plan, resume))
    check_before_launch(plan)
    check_tasks(plan.run)
    if verify or (verify is None and not resume and plan.node.device.kind != "cpu"):
        show(_verified(plan))
    _prepare(run_dir, plan, resume)
    show(f"run directory: {run_dir.root}\nplan: {describe_layout(plan.run)}")
    with TrainingView(plan, utilisation=utilisation(plan.run, plan.node, resolve_architecture(plan.run))) as view:
        if probe:
            plan = _probed(plan, run_dir, view.on_event, terms)
        plan = _trained(plan, run_dir, view.on_event, terms, resuming=resume, recovering=recover)
        _afterwards(plan, run_dir, view.on_event, patience.stuck_after_s)
    _show_measured(plan, run_dir)


def _trained(
    plan: Plan, run_dir: RunDir, listener: Listener, terms: Terms, *, resuming: bool, recovering: bool
) -> Plan:
    """Runs the plan, and better ones where it fails for want of memory; gives the one that came to its end."""
    from vramplan.facts.resolve import resolve_architecture
    from vramplan.measure.snapshots import put_away
    from vramplan.supervise.recover import train_to_the_end
    from vramplan.supervise.supervisor import run_plan

    try:
        if recovering:
            architecture = resolve_architecture(plan.run)
            return train_to_the_end(plan, run_dir, architecture, listener, terms, resuming=resuming)
        run_plan(
            plan,
            run_dir,
            listener,
            resuming=resuming,
            retrying=False,
            hostfile=terms.hostfile,
            patience=terms.patience,
        )
        return plan
    finally:
        said = put_away(run_dir)
        if said is not None:
            listener({"event": "note", "text": said})


def _afterwards(plan: Plan, run_dir: RunDir, listener: Listener, stuck_after_s: float) -> None:
    """What the spec asks to be done with what was trained."""
    from vramplan.supervise.afterwards import answer_sample, interpolate_with_base, merge_adapters
    from vramplan.supervise.tasks import evaluate_tasks

    if plan.run.retain.interpolate:
        interpolate_with_base(run_dir, listener, stuck_after_s)
    if plan.run.training.merge_adapters and plan.run.method.kind != "full":
        merge_adapters(run_dir, listener, stuck_after_s)
    if plan.run.training.sample is not None:
        answer_sample(run_dir, plan.run.training.sample, listener, stuck_after_s)
    if plan.run.training.lm_eval is not None:
        evaluate_tasks(run_dir, listener, stuck_after_s)


def _checked_allowances(names: list[str]) -> frozenset[str]:
    from vramplan.supervise.offers import ALLOWABLE

    unknown = [name for name in names if name not in ALLOWABLE]
    if unknown:
        raise SpecError(f"--allow {unknown[0]}: is none of {', '.join(ALLOWABLE)}")
    return frozenset(names)


def _probed(plan: Plan, run_dir: RunDir, listener: Listener, terms: Terms) -> Plan:
    """The plan that a probe leaves standing, with what the probe took."""
    from vramplan.cli.output import show
    from vramplan.facts.resolve import resolve_architecture
    from vramplan.report.measured import render_measured
    from vramplan.supervise.probing import probe

    show("probe: the longest batch, an evaluation and a save")
    found = probe(plan, run_dir, resolve_architecture(plan.run), listener, terms)
    show(render_measured(found.plan.prediction.phases, found.readings))
    found.plan.save(run_dir.plan)
    return found.plan


def _verified(plan: Plan) -> str:
    """What a simulation says of the plan; raises NoPlanError where it says that the plan does not fit."""
    from vramplan.simulate.verify import verify_plan

    verified = verify_plan(plan)
    if verified.found.fits is False:
        raise NoPlanError(
            f"{verified.text}; plan again with `vramplan plan --verify`, or give --no-verify to train nevertheless"
        )
    return verified.text


def _plan_file(source: Path) -> Path:
    path = source / "plan.yaml" if source.is_dir() else source
    if not path.is_file():
        raise SpecError(f"{path}: there is no such plan or spec; make one with `vramplan plan MODEL -o DIR`")
    return path


def _plan_of(path: Path, assignments: list[str]) -> Plan:
    """The plan that a file holds, or that its spec, with ``assignments`` laid over it, leads to.

    Raises:
        SpecError: a plan is not changed, for its prediction would no longer be of it.
    """
    from vramplan.spec.load import merge, parse_assignments, read_yaml_mapping, run_from_mapping

    fields = read_yaml_mapping(path)
    if not is_plan(fields):
        return _make_plan(run_from_mapping(merge(fields, parse_assignments(assignments)), str(path)))
    if assignments:
        raise SpecError(
            f"{path} is a plan, and --set changes a spec: vramplan plan {path} --set ... -o DIR, then train"
        )
    return Plan.from_dict(fields, source=str(path))


def _make_plan(run: RunSpec) -> Plan:
    from dataclasses import replace

    from vramplan.facts.devices import resolve_node
    from vramplan.facts.resolve import resolve_architecture
    from vramplan.report.plan_dir import installed_versions
    from vramplan.search.planner import make_plan
    from vramplan.supervise.data_process import planned_for_data

    run, _ = planned_for_data(run)
    plan = make_plan(run, resolve_node(run.hardware), resolve_architecture(run))
    return replace(plan, versions=installed_versions())


def _with_overrides(plan: Plan, max_steps: int | None, sample: str | None) -> Plan:
    from dataclasses import replace

    given: dict[str, Any] = {"max_steps": max_steps, "sample": sample}
    changes = {name: value for name, value in given.items() if value is not None}
    training = plan.run.training.model_copy(update=changes)
    return replace(plan, run=plan.run.model_copy(update={"training": training}))


def _default_output(path: Path, plan: Plan, resume: bool) -> Path:
    if resume:
        if not RunDir(path.parent).metrics.exists():
            raise SpecError(f"--resume needs the run directory: vramplan train {path} -o RUN_DIR --resume")
        return path.parent
    model = plan.run.model.rstrip("/").split("/")[-1]
    return Path("runs") / f"{model}-{plan.run.method.kind}-{datetime.now():%Y%m%d-%H%M%S}"


def _prepare(run_dir: RunDir, plan: Plan, resume: bool) -> None:
    """Makes the run directory and puts the plan into it.

    Raises:
        SpecError: it holds another run already, or cannot be written; also where a full disk has no room for what
            ranks write before they can say so (their state, what they keep in reserve, their output).
    """
    from vramplan.supervise.recover import put_record_aside

    if run_dir.metrics.exists() and not resume:
        raise SpecError(f"{run_dir.root} already holds a run: give --resume to go on with it, or another -o")
    try:
        run_dir.root.mkdir(parents=True, exist_ok=True)
        if resume:
            put_record_aside(run_dir, plan)
        plan.save(run_dir.plan)
        _try_room(run_dir.root / f".room.{os.getpid()}", plan.node.world_size)
    except OSError as error:
        mend = "make room" if resume else "make room, or choose another -o"
        raise SpecError(f"{run_dir.root}: cannot be written ({error.strerror}); {mend}") from error


def _try_room(path: Path, num_ranks: int) -> None:
    """Takes as much as so many ranks write when they start, and gives it back: what the disk says is free may be more
    than a quota gives. In several files, as ranks write: a limit on one file's size (ulimit -f) is no want of room.

    Raises:
        OSError: it does not fit.
    """
    files = [path.with_name(f"{path.name}.{number}") for number in range(_FILES_TO_START)]
    try:
        for each in files:
            with each.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, num_ranks * _BYTES_TO_START // _FILES_TO_START)
    finally:
        for each in files:
            each.unlink(missing_ok=True)


def _show_measured(plan: Plan, run_dir: RunDir) -> None:
    from vramplan.cli.output import show
    from vramplan.measure.compare import estimate_record
    from vramplan.measure.record import read_records
    from vramplan.report.measured import render_measured

    if not run_dir.record.exists():  # the first attempt ended before its second step; a resumed one measures nothing
        others = " and ".join(str(path) for path in sorted(run_dir.root.glob("record-*.jsonl")))
        earlier = f"; what was under the plan before stands in {others} (vramplan compare)" if others else ""
        show(f"the first steps of this run were not measured{earlier}")
        return
    (record,) = read_records(run_dir.record)
    show("")
    try:
        came = estimate_record(record).phases
    except VramplanError:  # what was foreseen is shown; `compare` says why
        came = ()
    show(render_measured(plan.prediction.phases, record.measured.phases, came))
    show(f"\nrecord: {run_dir.record}  (vramplan compare {run_dir.record})")
