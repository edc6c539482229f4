"""A snapshot in shared memory outlives every process of a run, is what the run goes on from, and ends with the run."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from vramplan.facts.resolve import resolve_architecture
from vramplan.measure.record import read_records
from vramplan.measure.run_dir import RunDir, read_events
from vramplan.measure.snapshots import snapshots_of
from vramplan.memory.estimate import estimate
from vramplan.memory.labels import HOST_SNAPSHOT
from vramplan.search.plan import Plan

from support.training import events_of, processes_about, start, train, write_spec

pytestmark = pytest.mark.ranks

PATIENCE_S = 600.0
TWO_MICRO_BATCHES = [
    "micro1.forward",
    "micro1.backward",
    "micro2.forward",
    "micro2.backward",
    "micro2.optimizer_step",
]
FILE_OVERHEAD_BYTES = 100_000
"""Of pickles, our own JSON and the manifest, whatever the model's size."""


def wait_until(condition, patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def num_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@pytest.mark.slow
def test_a_run_goes_on_from_its_snapshot_when_all_its_processes_were_killed(tiny_model, tmp_path):
    training = {"max_steps": 100_000, "save_every": 100_000, "snapshot_every": 2}
    spec, run_dir = write_spec(tmp_path / "spec.yaml", tiny_model, 2, training=training), RunDir(tmp_path / "run")
    memory = snapshots_of(run_dir)
    process = start(spec, "-o", run_dir.root, "--probe")
    try:
        wait_until(lambda: events_of(run_dir.root, "snapshot") or process.poll() is not None)
        assert process.poll() is None, process.stdout.read()
        process.kill()
        process.wait()
        wait_until(lambda: processes_about(str(run_dir.root)) == [])
    finally:
        for pid in processes_about(str(run_dir.root)):
            os.kill(pid, signal.SIGKILL)
    (snapshot,) = memory.glob("step-*")
    check_predicted(run_dir, snapshot)
    check_probe(RunDir(run_dir.root / "probe"))
    done_before = int(snapshot.name.removeprefix("step-"))
    done = train(run_dir.root, "--resume", "--max-steps", str(done_before + 2))
    assert done.returncode == 0, done.stderr
    assert f"goes on after step {done_before}, from {snapshot}" in done.stdout
    assert not memory.exists()
    samples: dict[int, set[str]] = {}
    for event in read_events(run_dir.metrics):
        if event["event"] == "step":
            samples.setdefault(event["step"], set()).add(event["samples"])
    assert sorted(samples) == list(range(1, max(samples) + 1))
    assert all(len(each) == 1 for each in samples.values())


def check_predicted(run_dir: RunDir, snapshot: Path) -> None:
    """The ledger's line is two of what lies there."""
    plan = Plan.load(run_dir.plan)
    known = estimate(plan.run, plan.node, resolve_architecture(plan.run))
    (predicted,) = (each.num_bytes for each in known.host_terms if each.name == HOST_SNAPSHOT)
    found = num_bytes(snapshot)
    assert predicted * plan.node.gpus_per_node / 2 == pytest.approx(found, rel=0.01, abs=FILE_OVERHEAD_BYTES)
    without = plan.run.training.model_copy(update={"snapshot_every": None})
    bare = estimate(plan.run.model_copy(update={"training": without}), plan.node, resolve_architecture(plan.run))
    assert bare.capacity_bytes - known.capacity_bytes == predicted  # on the CPU it is the ranks' own memory


def check_probe(probe_dir: RunDir) -> None:
    """The worst batch was run before, with an evaluation and a save, and nothing but the bytes is left of it."""
    (record,) = read_records(probe_dir.record)
    phases = [reading.phase for reading in record.measured.phases]
    assert phases[:2] == ["model_load", "engine_init"]
    assert phases[2:] == [
        *(f"step{step}.{phase}" for step in (1, 2) for phase in TWO_MICRO_BATCHES),
        "evaluation",
        "save",
    ]
    assert not probe_dir.checkpoints.exists()
    predicted = {each.phase: each.peak_bytes for each in Plan.load(probe_dir.plan).prediction.phases}
    for reading in record.measured.phases[2:-2]:
        assert predicted[reading.phase] == pytest.approx(reading.allocated_peak_bytes, rel=0.01), reading.phase
