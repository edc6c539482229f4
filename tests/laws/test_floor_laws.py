"""The bound by which a search passes over candidates is no more than any estimate, whatever the run."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from vramplan.facts.devices import resolve_node
from vramplan.facts.resolve import resolve_architecture
from vramplan.memory.estimate import estimate
from vramplan.memory.floor import floor_bytes
from vramplan.memory.from_run import job_from_run

from support.matrix import FACTORS, Case, why_not

CASES = st.fixed_dictionaries({name: st.sampled_from(list(values)) for name, values in FACTORS.items()})


@given(CASES.map(Case.of).filter(lambda case: not why_not(case)), st.integers(1, 64), st.sampled_from([64, 512, 4096]))
@settings(max_examples=60, deadline=None)
def test_the_floor_is_no_more_than_any_estimate(case: Case, micro_batch_size: int, seq_len: int):
    run = case.run().model_copy(update={"micro_batch_size": micro_batch_size, "seq_len": seq_len})
    node, architecture = resolve_node(run.hardware), resolve_architecture(run)
    floor = floor_bytes(job_from_run(run, node, architecture))
    assert 0 < floor <= estimate(run, node, architecture, rank=0).allocated_peak_bytes
