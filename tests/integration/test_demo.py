"""The demo as `make demo` runs it: the README's commands that train, on the embedded model and data."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    environment = {**os.environ, "VENV": sys.prefix}
    done = subprocess.run(
        [ROOT / "scripts/demo", out], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out, done.stdout


def test_no_reduction_buffer_is_left(demo):  # 66 MiB a rank, which would stay in host memory until a restart
    out, _ = demo
    ports = re.findall(r"--master_port=(\d+)", (out / "run/logs/launcher.log").read_text())
    assert ports
    left = [path.name for path in Path("/dev/shm").glob("deepspeed_allreduce_buffer_*")]
    assert not [name for name in left if any(f"_{port}_" in name for port in ports)]  # other runs have others


def test_the_loss_falls(demo):
    out, _ = demo
    rows = [json.loads(line) for line in (out / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row and "lr" in row]
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_predicted_is_measured(demo):
    out, printed = demo
    done = subprocess.run(
        [Path(sys.executable).parent / "vramplan", "compare", out / "run/record.jsonl", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    (record,) = json.loads(done.stdout)["records"]
    assert record["covered"]
    assert abs(record["error_frac"]) < 0.01
    assert "answered:" in printed
