"""Traces written by hand, replayed."""

import pytest

from vramplan.memory.birth import Birth
from vramplan.memory.term import Place
from vramplan.simulate.replay import replay
from vramplan.simulate.trace import PhaseSpan, Trace
from vramplan.spec.alloc_conf import AllocConf
from vramplan.units import MIB


@pytest.fixture
def trace():
    """60 MiB born and dead, 5 MiB on the host, 80 MiB that stay; the second phase begins before the 80 MiB."""
    made = Trace(births=[Birth(op="aten.empty", phase="engine_init"), Birth(op="aten.mm", phase="step1")])
    first = made.bear(60 * MIB, 0)
    made.bear(5 * MIB, 0, Place.HOST)
    made.bury(first)
    made.bear(80 * MIB, 1)
    made.phases = [PhaseSpan("engine_init", 0, 3), PhaseSpan("step1.micro1.forward", 3, 4)]
    return made


def test_the_curves_hold_a_value_for_every_instant(trace):
    found = replay(trace, AllocConf())
    assert (found.allocated // MIB).tolist() == [0, 60, 60, 0, 80]
    assert (found.reserved // MIB).tolist() == [0, 60, 60, 60, 140]
    assert (found.failure, found.alloc_retries) == (None, 0)
    assert found.reserved_peak_bytes(0, 3) == 60 * MIB
    assert found.reserved_peak_bytes(3, 4) == 140 * MIB


def test_the_engines_empty_cache(trace):
    trace.cache_emptied_at.append(3)
    assert (replay(trace, AllocConf()).reserved // MIB).tolist() == [0, 60, 60, 60, 80]


def test_a_limit_frees_the_cache_first(trace):
    found = replay(trace, AllocConf(), 100 * MIB)
    assert ((found.reserved // MIB).tolist(), found.alloc_retries, found.failure) == ([0, 60, 60, 60, 80], 1, None)


def test_the_first_failure_is_named(trace):
    found = replay(trace, AllocConf(), 79 * MIB)
    assert found.failure is not None
    assert (found.failure.phase, found.failure.num_bytes) == ("step1.micro1.forward", 80 * MIB)
    assert (found.failure.allocated_bytes, found.failure.reserved_bytes) == (0, 0)
    assert found.failure.birth.op == "aten.mm"
