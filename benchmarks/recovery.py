"""Runs that meet faults: does each go on by itself, exactly, within its bound, and leave no process behind?

``python benchmarks/recovery.py`` makes every run of the grid (fault x ZeRO stage x method) that ``recovery.jsonl`` does
not hold yet, adds a line for each, and writes the table ``recovery.md``. Faults are real: limits of the kernel on one
rank's memory or files, signals, damaged files (``tests/support/faults/sitecustomize.py``).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from vramplan.measure.run_dir import RunDir, read_events  # noqa: E402

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
GRID: tuple[tuple[Case, int, str], ...] = (
    *((case, stage, "full") for stage in (2, 0, 3, 1) for case in OF_MEMORY),
    *((case, stage, method) for method, stage in (("full", 2), ("lora", 3)) for case in OF_PROCESSES),
    *((case, 2, "lora") for case in OF_MEMORY),
    *((case, stage, method) for method, stage in (("full", 3), ("lora", 1)) for case in OF_PROCESSES),
)


@dataclass
class Outcome:
    """What a run showed."""

    case: str
    stage: int
    method: str
    exit_code: int
    recovered: bool
    as_it_must: bool
    """Whether it ended with a code that is right, in time, and left no process."""
    attempts: int
    causes: list[str]
    steps_repeated: int
    seconds_lost: float | None
    """From the newest checkpoint before each failure to the first step that had not been done yet, summed; None where
    that was not measured."""
    largest_loss_difference: float
    """To the uninterrupted run of the first plan, over all steps."""
    same_samples: bool
    changes: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    said: str = ""


def run_case(case: Case, stage: int, method: str, model: Path, reference: Path, directory: Path) -> Outcome:
    """Makes one run and compares it with the uninterrupted one."""
    spec, run_dir = _spec(directory, model, stage, method), directory / "run"
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
        case=case.name,
        stage=stage,
        method=method,
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


def _spec(directory: Path, model: Path, stage: int, method: str) -> Path:
    """Micro-batch 2 of 4, an evaluation and a checkpoint every third step."""
    directory.mkdir(parents=True, exist_ok=True)
    training = {"max_steps": STEPS, "save_every": 3, "eval_every": 3}
    how: Any = {"kind": "lora", "r": 64} if method == "lora" else method
    return write_spec(directory / "spec.yaml", model, stage, how, training=training)


def _run(case: Case, spec: Path, run_dir: Path, *options: str) -> tuple[int, str]:
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
    return process.returncode, said.strip()


def _when(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BOUND_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def _compared(run_dir: Path, reference: Path) -> tuple[float, bool]:
    own, other = losses(run_dir), losses(reference)
    difference = max((abs(own[step] - other[step]) for step in own), default=math.nan)
    expected = samples_of(reference)
    return difference, all(expected[step] == samples for step, samples in samples_of(run_dir).items())


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


def write_table(outcomes: Iterable[Outcome], path: Path) -> None:
    """One line a fault and method, with what it showed under every stage."""
    every = list(outcomes)
    lines = [
        "# Recovery from real faults",
        "",
        f"{len(every)} runs of `python benchmarks/recovery.py` on two CPU ranks, in several goes (it adds what is "
        f"missing) at commits that differ a little: {STEPS} steps, a checkpoint and an evaluation every third; the "
        "loss is compared step by step with that of the uninterrupted run of the first plan. "
        f"{sum(each.recovered for each in every)} came to their end, {sum(each.as_it_must for each in every)} ended as "
        "they must (exit code, time, no process left); "
        f"{sum(each.same_samples for each in every)} saw the very samples, step by step, of the uninterrupted run.",
        "",
        "A run that did not recover ended by itself with exit code 4 and its reason: no plan needs less memory there. "
        "Seconds lost are from the newest checkpoint (or the first event) to the first step that had not been done "
        "yet; most of them start processes and import libraries, on two cores that others used at the same time.",
        "",
        "| fault | method | ZeRO | recovered | launches | steps repeated | seconds lost | largest loss difference |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (case, method), group in _grouped(every).items():
        recovered = [each for each in group if each.recovered]
        lines.append(
            f"| {case} | {method} | {', '.join(str(each.stage) for each in group)} "
            f"| {len(recovered)} of {len(group)} | "
            f"{_span([each.attempts for each in group])} | {_span([each.steps_repeated for each in recovered])} | "
            f"{_median([each.seconds_lost for each in recovered if each.seconds_lost is not None])} | "
            f"{_largest([each.largest_loss_difference for each in recovered])} |"
        )
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")


def _grouped(outcomes: Iterable[Outcome]) -> dict[tuple[str, str], list[Outcome]]:
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for each in sorted(outcomes, key=lambda each: each.stage):
        groups.setdefault((each.case, each.method), []).append(each)
    order = [case.name for case in (*OF_MEMORY, *OF_PROCESSES)]
    return dict(sorted(groups.items(), key=lambda entry: (order.index(entry[0][0]), entry[0][1])))


def _span(values: list[int]) -> str:
    return "" if not values else str(values[0]) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.0f}" if values else ""


def _largest(values: list[float]) -> str:
    return ("0" if max(values) == 0 else f"{max(values):.1e}") if values else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "recovery.jsonl")
    parser.add_argument("--table", type=Path, default=HERE / "recovery.md")
    parser.add_argument("--only", default="", help="faults whose name holds this")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    arguments = parser.parse_args()
    done = {(each.case, each.stage, each.method): each for each in _read(arguments.results)}
    wanted = [cell for cell in GRID if arguments.only in cell[0].name and (cell[0].name, *cell[1:]) not in done]
    with tempfile.TemporaryDirectory(prefix="vramplan-recovery-") as text:
        root = Path(text)
        model = save_tiny_model(root / "model", **MODEL)
        references = _references(sorted({cell[1:] for cell in wanted}), model, root, arguments.jobs)

        def one(number: int) -> None:
            case, stage, method = wanted[number]
            directory = root / f"run{number}"
            outcome = run_case(case, stage, method, model, references[stage, method], directory)
            with arguments.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
            verdict = "as it must" if outcome.as_it_must else f"NOT AS IT MUST: {outcome.said}"
            ended = f"exit code {outcome.exit_code}, {outcome.causes}, {verdict}"
            print(f"{outcome.case}, ZeRO {stage}, {method}: {ended}", flush=True)
            shutil.rmtree(directory, ignore_errors=True)
            write_table(_read(arguments.results), arguments.table)

        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(one, range(len(wanted))))
    write_table(_read(arguments.results), arguments.table)


def _references(kinds: list[tuple[int, str]], model: Path, root: Path, jobs: int) -> dict[tuple[int, str], Path]:
    """Uninterrupted runs of each stage and method."""

    def make(kind: tuple[int, str]) -> Path:
        directory = root / f"reference-{kind[1]}{kind[0]}"
        code, said = _run(Case("", ()), _spec(directory, model, *kind), directory / "run")
        assert code == 0, said
        return directory / "run"

    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(kinds, pool.map(make, kinds), strict=True))


def _read(path: Path) -> list[Outcome]:
    if not path.exists():
        return []
    return [Outcome(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
