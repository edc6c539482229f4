"""trace_run: the trace of a run, taken in full, or followed exactly from traces of the model cut to a few depths."""

from __future__ import annotations

from collections.abc import Sequence

from vramplan.simulate.black_box import BlackBox
from vramplan.simulate.depths import DepthPlan, NotByDepth, at_depth, plan_depths
from vramplan.simulate.engine import Traced, trace_rank
from vramplan.simulate.events import Kinds, read_events, write_trace
from vramplan.simulate.repeats import Law, law_of
from vramplan.simulate.request import Conditions
from vramplan.spec.layout import Layout
from vramplan.spec.run import RunSpec

ATTEMPTS = 2
"""Sets of depths that are tried, the second a period deeper."""


def trace_run(
    run: RunSpec, layout: Layout, conditions: Conditions, device_type: str, black_box: BlackBox | None = None
) -> Traced:
    """As ``trace_rank``; a deep model's trace is followed from few layers where that is exact (``depths.py``).

    The law that two depths show has to give the trace of a third, event by event, and no number that the engine
    carries from layer to layer may have moved; else all layers are traced, and ``in_full_because`` says why.
    """
    if not conditions.by_depth:
        return trace_rank(run, layout, conditions, device_type, black_box)
    try:
        return _by_depth(run, layout, conditions, device_type, plan_depths(run, layout), black_box)
    except NotByDepth as why:
        reason = str(why)
    except Exception as error:  # noqa: BLE001 - whatever a cut model does not bear, the whole one may
        reason = f"its layers could not be compared: {type(error).__name__}: {error}"
    traced = trace_rank(run, layout, conditions, device_type, black_box)
    traced.in_full_because = reason
    return traced


def _by_depth(
    run: RunSpec,
    layout: Layout,
    conditions: Conditions,
    device_type: str,
    plan: DepthPlan,
    black_box: BlackBox | None,
) -> Traced:
    traces: dict[int, Traced] = {}
    for attempt in range(ATTEMPTS):
        if not plan.is_worth(attempt):
            break
        for depth in plan.depths(attempt):
            if depth not in traces:
                traces[depth] = _traced(at_depth(run, depth), layout, conditions, device_type, black_box)
        depths = plan.depths(attempt)
        traced = follow([traces[depth] for depth in depths], plan.periods_beyond(depths[0]))
        if traced is not None:
            traced.traced_layers = depths
            return traced
    raise NotByDepth(f"{sorted(traces)} layers do not follow one law")


def _traced(
    run: RunSpec, layout: Layout, conditions: Conditions, device_type: str, black_box: BlackBox | None
) -> Traced:
    traced = trace_rank(run, layout, conditions, device_type, black_box)
    if traced.error is not None:
        raise NotByDepth("a cut model's trace stops before its end")
    return traced


def follow(traced: Sequence[Traced], times: int) -> Traced | None:
    """From traces of three depths, each a period deeper than the last, that of the first and ``times`` periods.

    None where they do not follow one law.
    """
    kinds, events = read_events([one.trace for one in traced], [one.notes for one in traced])
    law = law_of(*events)
    total = _counted_on([one.numel_total for one in traced], times)
    trainable = _counted_on([one.numel_trainable for one in traced], times)
    if law is None or total is None or trainable is None or not _comes_round(law, kinds):
        return None
    return Traced(write_trace(law.after(times), kinds), total, trainable)


def _comes_round(law: Law, kinds: Kinds) -> bool:
    """Whether every number noted of the engine is the same from one repeat to the next."""
    for stretch in law.stretches:
        here = slice(stretch.at_longer, stretch.at_longer + stretch.length)
        offsets = law.longer.offsets[here] - law.longer.offsets[here.start]
        if law.growth(stretch)[offsets[kinds.are_notes(law.longer.kinds[here])]].any():
            return False
    return True


def _counted_on(numbers: Sequence[int], times: int) -> int | None:
    first, second, third = numbers
    return first + times * (second - first) if third - second == second - first else None
