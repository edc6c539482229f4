"""What a run is trained on, asked of a process that may import the training stack."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from vramplan.errors import DataError, RunFailedError
from vramplan.spec.run import RunSpec
from vramplan.spec.select import SelectSpec


def describe_data(run: RunSpec, num_examples: int = 0) -> dict[str, Any]:
    """Sources, lengths, padding and examples (``vramplan/data/view.py``).

    Raises:
        DataError: the data, the tokenizer or the model cannot be read.
        RunFailedError: the process ended otherwise.
    """
    return _ask("vramplan.train.look", ["--examples", str(num_examples)], run.model_dump_json())


def select(spec: SelectSpec, output: Path) -> dict[str, Any]:
    """Chooses text of a pool (``vramplan/data/select.py``); the report.

    Raises:
        DataError: a source cannot be read, or nothing passes.
        RunFailedError: the process ended otherwise.
    """
    return _ask("vramplan.data.select", [str(output)], spec.model_dump_json())


def _ask(module: str, arguments: list[str], question: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", module, *arguments], input=question, capture_output=True, text=True, check=False
    )
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except json.JSONDecodeError as error:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RunFailedError(f"reading the data failed: {last}") from error
    if "error" in answer:
        raise DataError(answer["error"])
    return answer


def planned_for_data(run: RunSpec) -> tuple[RunSpec, str | None]:
    """The run with ``seq_len`` cut to the longest sequence that comes, where ``data.plan_for`` asks for it, and a
    sentence that says so.

    Raises:
        DataError: as ``describe_data``.
    """
    if run.data.plan_for == "seq_len":
        return run, None
    found = describe_data(run)
    lengths = found["lengths"]
    sentence = (
        f"data: {lengths['num_sequences']:,} sequences, the longest of {lengths['longest']:,} tokens; planned for "
        f"{lengths['planned_seq_len']:,} of seq_len {run.seq_len:,}; {found['padding_frac']:.1%} of the tokens of an "
        "epoch are padding"
    )
    return run.model_copy(update={"seq_len": lengths["planned_seq_len"]}), sentence
