"""Which layouts of ranks the trainer runs."""

from __future__ import annotations

from vramplan.errors import LegalityError
from vramplan.facts.resolve import resolve_architecture
from vramplan.search.legal_formats import why_not_trained
from vramplan.search.legality import illegality
from vramplan.search.plan import Plan
from vramplan.spec.run import RunSpec


def check_layout(run: RunSpec) -> None:
    """Raises:
    LegalityError: the layout is more than data and sequence parallel, or formats are not the trainer's.
    """
    if refused := why_not_trained(run):
        raise LegalityError(refused)


def check_sequence_parallel(plan: Plan) -> None:
    """What the planner refuses is refused of a plan that was edited too: some of it would train, and wrongly.

    Raises:
        LegalityError: the run does not go with its ``layout.sp``.
    """
    run = plan.run
    if run.layout is None or run.layout.sp == 1:
        return
    found = illegality(run, plan.node, resolve_architecture(run))
    if found is not None:
        raise LegalityError(f"{found.reason} ({found.source})")
