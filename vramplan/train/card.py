"""The model card of what was trained: the run's own facts, in the form that the hub reads (YAML, then Markdown)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from vramplan.measure.run_dir import RunDir, read_events
from vramplan.spec.data import HELD_OUT
from vramplan.spec.run import RunSpec
from vramplan.spec.trainable import LoraMethod
from vramplan.version import __version__


def write_model_card(run: RunSpec, run_dir: RunDir, directory: Path, base_name: str, *, merged: bool = False) -> None:
    """Writes ``README.md`` beside the weights, over the template that PEFT puts there."""
    text = model_card(run, read_events(run_dir.metrics), base_name, merged=merged)
    (directory / "README.md").write_text(text, encoding="utf-8")


def model_card(run: RunSpec, events: list[dict[str, Any]], base_name: str, *, merged: bool = False) -> str:
    """The card's text from a run's spec and events; ``merged``: of adapters that are in the weights."""
    is_dora = isinstance(run.method, LoraMethod) and run.method.use_dora
    tags = ["vramplan", run.method.kind, *(["dora"] if is_dora else [])]
    front = {"base_model": base_name, "tags": tags, "pipeline_tag": "text-generation"}
    if run.method.kind != "full":
        front["library_name"] = "transformers" if merged else "peft"
    asked, method = _asked(run), f"{run.method.kind} with DoRA" if is_dora else run.method.kind
    steps = [event["step"] for event in events if event["event"] == "step"]
    exported = next((event["step"] for event in reversed(events) if event["event"] == "best"), None)
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {base_name.rstrip('/').split('/')[-1]}, fine-tuned ({method}{', merged' if merged else ''})",
        _steps(run, steps[-1] if steps else 0, exported),
        _evaluations(events, exported),
        _tasks(events),
        f"## What was asked\n\n```yaml\n{yaml.safe_dump(asked, sort_keys=False)}```",
        _versions(events),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _asked(run: RunSpec) -> dict[str, Any]:
    """What differs from the defaults, as a spec; of methods all, for what they are by default is what one looks for."""
    asked = run.model_dump(mode="json", exclude_defaults=True, exclude={"hardware", "model_config_fields", "layout"})
    retained = run.retain.model_dump(mode="json", include=set(asked.get("retain", ())))
    return asked | {"method": run.method.model_dump(mode="json")} | ({"retain": retained} if retained else {})


def _steps(run: RunSpec, done: int, exported: int | None) -> str:
    said = f"Trained with vramplan {__version__} for {done} optimizer step{'' if done == 1 else 's'}."
    if exported is not None and exported != done:
        said += f" The weights are those after step {exported}, the best on {run.training.best_on}."
    if run.retain.interpolate:
        said += f" {run.retain.interpolate:.0%} of the base weights were laid into them after the evaluations below."
    return said


def _evaluations(events: list[dict[str, Any]], exported: int | None) -> str:
    """A table of every held-out set: perplexity before training, where any was evaluated then, and at the evaluation of
    the weights that are exported (the last, where ``exported`` is None)."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event["event"] == "evaluation":
            rows.setdefault(event.get("set", HELD_OUT), []).append(event)
    if not rows:
        return ""
    before = {name: found[0]["perplexity"] for name, found in rows.items() if found[0]["step"] == 0}
    columns = ["held-out set", *(["perplexity before training"] if before else []), "these weights' perplexity"]
    lines = ["## Evaluation", "", _row(columns), _row(["---"] * len(columns))]
    for name, found in rows.items():
        last = next((each for each in found if each["step"] == exported), found[-1])
        base = [f"{before[name]:.3f}" if name in before else "-"] if before else []
        lines.append(_row([name, *base, f"{last['perplexity']:.3f}"]))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _tasks(events: list[dict[str, Any]]) -> str:
    """A table of lm_eval's scores of the trained model, the last of each task."""
    found = {event["task"]: event for event in events if event["event"] == "lm_eval"}
    if not found:
        return ""
    *_, last = found.values()
    lines = [f"## Tasks (lm_eval {last['version']})", "", "| task | examples | metric | score | standard error |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for name, event in found.items():
        for metric, score in event["scores"].items():
            error = event["stderrs"].get(metric)
            shown = "" if error is None else f"{error:.4f}"
            lines.append(f"| {name} | {event['num_examples'] or ''} | {metric} | {score:.4f} | {shown} |")
    return "\n".join(lines)


def _versions(events: list[dict[str, Any]]) -> str:
    started = [event for event in events if event["event"] == "start"]
    if not started:
        return ""
    versions = started[-1]["versions"]
    return "## Versions\n\n" + ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
