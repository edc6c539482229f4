"""The Python surface: what the subcommands ``fit``, ``plan`` and ``compare`` answer, as objects that print well.

A run is a :class:`~vramplan.spec.run.RunSpec`, a mapping like one in YAML, the path of a YAML file, or the name of a
model; keywords are laid over it. A node is worked out from the run's ``hardware`` where it is not given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vramplan.facts.device import Node
from vramplan.facts.devices import resolve_node
from vramplan.facts.resolve import resolve_architecture
from vramplan.measure.compare import Comparison, compare_file, comparisons_of
from vramplan.measure.record import Record
from vramplan.memory.ledger import Estimate
from vramplan.report.display import register
from vramplan.report.plan_dir import installed_versions
from vramplan.search.fit import Fit, fit_run
from vramplan.search.plan import Plan, asked_fields
from vramplan.search.planner import make_plan
from vramplan.spec.load import merge, run_from_mapping
from vramplan.spec.run import RunSpec

register()

Run = RunSpec | Mapping[str, Any] | str | Path


def estimate(run: Run, node: Node | None = None, **fields: Any) -> Estimate:
    """The ledger of a run: every term, every moment, and the peak. What the run leaves open is searched.

    Raises:
        VramplanError: the run cannot be; one sentence says what to change.
    """
    return fit(run, node, **fields).estimate


def fit(run: Run, node: Node | None = None, **fields: Any) -> Fit:
    """Whether a run fits, the ledger that says so, and what would make it fit.

    Raises:
        VramplanError: the run cannot be; one sentence says what to change.
    """
    asked = _run(run, fields)
    return fit_run(asked, node or resolve_node(asked.hardware), resolve_architecture(asked))


def plan(run: Run, node: Node | None = None, **fields: Any) -> Plan:
    """The layout that trains fastest among those that fit, with why better-looking ones were refused.

    Raises:
        NoPlanError: none fits; the text says which number to change.
        VramplanError: the run cannot be; one sentence says what to change.
    """
    asked = _run(run, fields)
    made = make_plan(asked, node or resolve_node(asked.hardware), resolve_architecture(asked))
    return replace(made, versions=installed_versions())


def compare(records: Path | str | Iterable[Record]) -> Comparison:
    """Predicted beside measured memory, for the records of a JSONL file or for given ones.

    Raises:
        SpecError: the file cannot be read or a line of it is no record.
    """
    return compare_file(records) if isinstance(records, str | Path) else comparisons_of(records)


def _run(run: Run, fields: Mapping[str, Any]) -> RunSpec:
    if isinstance(run, RunSpec):
        if not fields:
            return run
        return run_from_mapping(merge(run.model_dump(exclude_unset=True), fields))
    if isinstance(run, Mapping):
        return run_from_mapping(merge(run, fields))
    asked, source = asked_fields(run)
    return run_from_mapping(merge(asked, fields), source)
