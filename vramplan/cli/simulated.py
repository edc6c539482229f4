"""simulate_comparison: the simulator's figure beside the estimator's and the measured one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from vramplan.errors import VramplanError
from vramplan.measure.compare import Comparison, RecordComparison
from vramplan.measure.record import Record, UnreadRecord, steps_were_skipped, weights_were_halved
from vramplan.measure.record_spec import run_from_record_spec
from vramplan.simulate.request import SimulationRequest, record_request, simulate_jobs
from vramplan.simulate.result import SimulationResult


def simulate_comparison(
    comparison: Comparison,
    records: Sequence[Record | UnreadRecord],
    on_result: Callable[[str], None] = lambda key: None,
) -> Comparison:
    """The comparison with every record simulated that can be; ``records`` in its order. Takes seconds a record."""
    requests = [_request(record, str(number)) for number, record in enumerate(records) if isinstance(record, Record)]
    simulated: dict[str, SimulationResult] = {}
    stopped = "its spec is not understood"
    try:
        for key, result in simulate_jobs(requests, parallel=min(4, os.cpu_count() or 1)):
            simulated[key] = result
            on_result(records[int(key)].id)
    except VramplanError as error:
        stopped = str(error)
    found = (
        _with_simulation(each, simulated.get(str(number)), stopped) for number, each in enumerate(comparison.records)
    )
    return replace(comparison, records=tuple(found), with_simulation=True)


def _request(record: Record, key: str) -> SimulationRequest:
    """A record's run on the kind of device that it was measured on."""
    run, _ = run_from_record_spec(record.spec)
    request = record_request(
        run,
        key=key,
        steps=record.spec.steps,
        skip_steps=steps_were_skipped(record),
        halved=weights_were_halved(record),
        masked=record.spec.masked,
        trained=record.env.get("backend") != "fake",
    )
    return replace(request, device_type="cpu" if record.env.get("device_type", "cpu") == "cpu" else "cuda")


def _with_simulation(each: RecordComparison, result: SimulationResult | None, stopped: str) -> RecordComparison:
    if result is None or result.error is not None:
        return replace(each, simulated_reason=stopped if result is None else str(result.error))
    return replace(each, simulated_bytes=result.train_allocated_peak_bytes)
