"""Runs that meet faults: does each go on by itself, exactly, within its bound, and leave no process behind?

``python benchmarks/recovery.py`` makes every run of the grid (fault x ZeRO stage x method x ranks) that
``recovery.jsonl`` does not hold yet of the code as it is, adds a line for each, and writes the table ``recovery.md``;
cut off, it goes on where it was. Faults are real: limits of the kernel on one rank's memory or files, signals, damaged
files (``tests/support/faults/sitecustomize.py``).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from recovery_results import Kind, Outcome, Reference, Results, difference  # noqa: E402

from vramplan.measure.run_dir import RunDir, read_events  # noqa: E402

from support.cgroups import NoGroup, memory_group  # noqa: E402
from support.faulty import attempts_of, environment, fault, kill, samples_of, stop  # noqa: E402
from support.tiny_model import save_tiny_model  # noqa: E402
from support.training import command, events_of, losses, processes_about, write_spec  # noqa: E402

BOUND_S = 900.0
STEPS = 8
MEGA = 10**6
MODEL = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8}
"""1.7 million parameters: tensors of some 100 KB and logits of 4 MB, which a limit can tell apart."""


@dataclass(frozen=True)
class Case:
    """A fault, and how a run must end that meets it."""

    name: str
    faults: tuple[dict[str, Any], ...]
    ends: tuple[int, ...] = (0,)
    """Exit codes that are right: 4 where no plan needs less there."""
    options: tuple[str, ...] = ()
    then_resume: bool = False
    """Whether a person has to start it again (a full disk, an interrupt), which the run then does."""
    interrupt: bool = False

    def on(self, ranks: int) -> Case:
        """The same for so many ranks: what hits the last of two hits the last of four."""
        moved = tuple({**each, "rank": each["rank"] and ranks - 1} for each in self.faults)
        return replace(self, faults=moved)

    @property
    def needs_group(self) -> bool:
        return any(each["do"] == "group" for each in self.faults)


OPTIMIZER_STEP_1 = r"step1\.micro\d+\.optimizer_step"
OPTIMIZER_STEP_5 = r"step5\.micro\d+\.optimizer_step"
OF_MEMORY = (
    Case("memory: load", (fault(1, "model_load", "data", more=MEGA),), ends=(0, 4)),
    Case("memory: init", (fault(0, "engine_init", "data", more=MEGA // 2),), ends=(0, 4)),
    Case("memory: forward", (fault(1, r"step2\.micro1\.forward", "data", more=MEGA),)),
    Case("memory: backward", (fault(0, r"step6\.micro1\.backward", "data", more=MEGA),)),
    Case("memory: first step", (fault(1, OPTIMIZER_STEP_1, "data", more=MEGA // 2),), ends=(0, 4)),
    Case("memory: later step", (fault(0, OPTIMIZER_STEP_5, "data", more=0),), ends=(0, 4)),
    Case("memory: evaluation", (fault(1, "evaluation", "data", more=MEGA),)),
    Case("memory: save", (fault(0, "save", "data", more=0),), ends=(0, 4)),
    Case("memory: resume", (kill(0, r"step5\.micro1\.forward"), fault(1, "resume", "data", more=MEGA)), ends=(0, 4)),
)
BY_THE_KERNEL = Case(
    "killed by the kernel for memory", (fault(1, r"step5\.micro1\.forward", "group", path="", more=2 * MEGA),)
)
OF_PROCESSES = (
    Case("SIGKILL in a step", (kill(1, r"step5\.micro\d\.backward"),)),
    Case("SIGKILL while saving", (kill(0, "save"),)),
    Case("a stopped rank", (stop(1, r"step6\.micro1\.forward"),), options=("--hang-after", "10")),
    Case("SIGTERM to the supervisor", (), interrupt=True, then_resume=True, ends=(130,)),
    Case("a full disk", (fault(1, "save", "file_size", bytes=100_000),), ends=(2,), then_resume=True),
    Case("a checkpoint cut in half", (fault(0, r"step8\.micro1\.forward", "cut"),)),
    Case("half a marker", (fault(1, r"step4\.micro1\.forward", "half_marker"),)),
    Case("two limits in one run", (
        fault(1, r"step2\.micro1\.forward", "data", more=MEGA),
        fault(0, r"step6\.micro1\.forward", "data", more=MEGA),
    )),
)  # fmt: skip
Cell = tuple[Case, int, str, int]
"""A fault under a ZeRO stage, with a method, on a number of ranks."""
NAMED = {case.name: case for case in (*OF_MEMORY, BY_THE_KERNEL, *OF_PROCESSES)}
ON_FOUR_RANKS = (
    ("memory: forward", 2, "full"),
    ("memory: evaluation", 1, "full"),
    ("memory: backward", 3, "full"),
    ("SIGKILL in a step", 3, "lora"),
    ("a checkpoint cut in half", 2, "full"),
    ("killed by the kernel for memory", 2, "full"),
)
GRID: tuple[Cell, ...] = (
    *((case, stage, "full", 2) for stage in (2, 0, 3, 1) for case in OF_MEMORY),
    *((case, stage, method, 2) for method, stage in (("full", 2), ("lora", 3)) for case in OF_PROCESSES),
    *((case, 2, "lora", 2) for case in OF_MEMORY),
    *((case, stage, method, 2) for method, stage in (("full", 3), ("lora", 1)) for case in OF_PROCESSES),
    *((BY_THE_KERNEL, stage, method, 2) for stage, method in ((2, "full"), (3, "lora"))),
    *((NAMED[name].on(4), stage, method, 4) for name, stage, method in ON_FOUR_RANKS),
)


def run_case(cell: Cell, model: Path, reference: Reference, directory: Path) -> Outcome:
    """Makes one run and compares it with the uninterrupted one."""
    case, *kind = cell
    spec, run_dir = _spec(directory, model, *kind), directory / "run"
    began = time.monotonic()
    code, said = _run(case, spec, run_dir)
    in_time = time.monotonic() - began < BOUND_S
    ended = code
    if case.then_resume and code in case.ends:
        code, _ = _run(Case("", ()), run_dir, run_dir, "--resume")
    left = processes_about(str(run_dir))
    difference, same = _compared(run_dir, reference)
    attempts = attempts_of(run_dir)
    return Outcome(
        case.name,
        *kind,
        exit_code=ended,
        recovered=code == 0,
        as_it_must=ended in case.ends and in_time and not left and (code == 0 or ended == 4),
        attempts=len(attempts),
        causes=[each.cause for each in attempts],
        steps_repeated=_repeated(run_dir),
        seconds_lost=None if case.then_resume else _seconds_lost(run_dir),
        largest_loss_difference=difference,
        same_samples=same,
        changes=[dict(each.changes) for each in attempts if each.changes],
        seconds=time.monotonic() - began,
        said=said,
    )


def _spec(directory: Path, model: Path, stage: int, method: str, ranks: int) -> Path:
    """Micro-batch 2 of a global batch of 8, an evaluation and a checkpoint every third step.

    Adapters at a tenth of the rate: at 1e-2 the gradients of these are so small in places that Adam makes steps of
    their rounding errors, and a step's loss in fp32 is 8e-4 off what it is in fp64, in which a real fault could hide.
    """
    directory.mkdir(parents=True, exist_ok=True)
    training = {"max_steps": STEPS, "save_every": 3, "eval_every": 3}
    how: Any = {"kind": "lora", "r": 64} if method == "lora" else method
    return write_spec(
        directory / "spec.yaml",
        model,
        stage,
        how,
        training=training,
        grad_accum_steps=4 // ranks,
        optimizer={"kind": "adamw_torch", "lr": 1e-3 if method == "lora" else 1e-2},
        hardware={"gpu": "cpu", "gpus_per_node": ranks},
    )


def _run(case: Case, spec: Path, run_dir: Path, *options: str) -> tuple[int, str]:
    with ExitStack() as open_group:
        if case.needs_group:
            group = open_group.enter_context(memory_group(f"vramplan-{os.getpid()}-{run_dir.parent.name}"))
            case = replace(case, faults=tuple({**each, "path": str(group)} for each in case.faults))
        return _launched(case, spec, run_dir, *options)


def _launched(case: Case, spec: Path, run_dir: Path, *options: str) -> tuple[int, str]:
    process = subprocess.Popen(
        command(spec, "-o", run_dir, *case.options, *options),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(list(case.faults), run_dir.parent / "faults"),
    )
    if case.interrupt:
        _when(lambda: len(losses(run_dir)) >= 4 or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
    try:
        _, said = process.communicate(timeout=BOUND_S)
    except subprocess.TimeoutExpired:
        process.kill()
        for pid in processes_about(str(run_dir)):
            os.kill(pid, signal.SIGKILL)
        return -1, "did not end within its bound"
    return process.returncode, said.strip().replace(str(run_dir.parent), "RUNS")  # as any machine would say it


def _when(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BOUND_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def _compared(run_dir: Path, reference: Reference) -> tuple[float, bool]:
    same = all(reference.samples[step] == samples for step, samples in samples_of(run_dir).items())
    return difference(losses(run_dir), reference.losses), same


def _repeated(run_dir: Path) -> int:
    steps = [event["step"] for event in events_of(run_dir, "step")]
    return len(steps) - len(set(steps))


def _seconds_lost(run_dir: Path) -> float:
    """Of every failure that was recovered from: from the last thing that counts to the first new step."""
    events = read_events(RunDir(run_dir).metrics)
    lost, kept, waiting = 0.0, events[0]["time"] if events else 0.0, False
    furthest = 0
    for event in events:
        if event["event"] == "checkpoint" and not waiting:
            kept = event["time"]
        if event["event"] == "recovery":
            waiting = True
        if event["event"] == "step" and event["step"] > furthest:
            furthest = event["step"]
            if waiting:
                lost, waiting = lost + event["time"] - kept, False
    return lost


class Progress:
    """Says of every run what it did, how many are done and how long it has taken."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._began, self._lock = total, 0, time.monotonic(), threading.Lock()

    def say(self, what: str) -> None:
        with self._lock:
            self._done += 1
            minutes = (time.monotonic() - self._began) / 60
            print(f"[{self._done} of {self._total}, {minutes:.1f} min] {what}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "recovery.jsonl")
    parser.add_argument("--table", type=Path, default=HERE / "recovery.md")
    parser.add_argument("--only", default="", help="cells whose name (fault, ZeRO stage, method, ranks) holds this")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    arguments = parser.parse_args()
    results = Results(arguments.results, arguments.table, list(NAMED))
    wanted = [cell for cell in GRID if arguments.only in _name(cell) and (cell[0].name, *cell[1:]) not in results.done]
    kinds = sorted({cell[1:] for cell in wanted} - results.references.keys())
    progress = Progress(len(kinds) + len(wanted))
    with tempfile.TemporaryDirectory(prefix="vramplan-recovery-") as text, ThreadPoolExecutor(arguments.jobs) as pool:
        root = Path(text)
        model = save_tiny_model(root / "model", **MODEL)
        for reference in pool.map(lambda kind: _make_reference(kind, model, root, progress), kinds):
            results.add(reference)

        def one(number: int) -> None:
            cell, directory = wanted[number], root / f"run{number}"
            try:
                outcome = run_case(cell, model, results.references[cell[1:]], directory)
            except NoGroup as error:
                progress.say(f"{_name(cell)}: left out: {error}")
                return
            results.add(outcome)
            verdict = "as it must" if outcome.as_it_must else f"NOT AS IT MUST: {outcome.said}"
            ended = f"exit code {outcome.exit_code}, {outcome.causes}, {verdict}, {outcome.seconds:.0f} s"
            progress.say(f"{_name(cell)}: {ended}, loss within {outcome.largest_loss_difference:.1e}")
            shutil.rmtree(directory, ignore_errors=True)

        list(pool.map(one, range(len(wanted))))
    results.write_table()


def _name(cell: Cell) -> str:
    case, stage, method, ranks = cell
    return f"{case.name}, ZeRO {stage}, {method}, {ranks} ranks"


def _make_reference(kind: Kind, model: Path, root: Path, progress: Progress) -> Reference:
    directory = root / f"reference{kind[0]}-{kind[1]}-{kind[2]}"
    began = time.monotonic()
    code, said = _run(Case("", ()), _spec(directory, model, *kind), directory / "run")
    assert code == 0, said
    run_dir = directory / "run"
    progress.say(f"uninterrupted, ZeRO {kind[0]}, {kind[1]}, {kind[2]} ranks: {time.monotonic() - began:.0f} s")
    return Reference(*kind, losses(run_dir), samples_of(run_dir))


if __name__ == "__main__":
    main()
