"""Signals that come twice, or while processes are started or ended, leave no process behind."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from vramplan.supervise import supervisor
from vramplan.supervise.child import Child
from vramplan.supervise.interrupts import Interrupted, interrupts_raise, interrupts_wait
from vramplan.supervise.supervisor import started

from support.training import processes_about

NUMBERS = [signal.SIGINT, signal.SIGTERM]
SLEEPS = "import time; time.sleep(600)"


@pytest.fixture
def no_process_left(tmp_path):
    yield
    left = processes_about(str(tmp_path))
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


@pytest.mark.parametrize("number", NUMBERS)
def test_signals_raise_inside_and_are_as_before_outside(number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted), interrupts_raise():
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("second", NUMBERS)
def test_what_the_first_signal_sets_off_is_not_cut_short_by_the_next(second):
    done = []

    def meet_both():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(second)
            done.append("ended")

    with pytest.raises(Interrupted), interrupts_raise():
        meet_both()
    assert done == ["ended"]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_can_wait(number):
    done = []

    def wait_and_go_on():
        with interrupts_wait():
            signal.raise_signal(number)
            done.append("inside")
        done.append("after")

    with pytest.raises(Interrupted), interrupts_raise():
        wait_and_go_on()
    assert done == ["inside"]


@pytest.mark.usefixtures("no_process_left")
def test_a_signal_while_a_process_is_started_ends_it(monkeypatch, tmp_path):
    class Slow(Child):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            signal.raise_signal(signal.SIGTERM)  # it runs, and nobody knows it yet

    monkeypatch.setattr(supervisor, "Child", Slow)
    command = [sys.executable, "-c", SLEEPS, str(tmp_path)]
    with pytest.raises(Interrupted), interrupts_raise(), started(command, {}, tmp_path / "log"):
        raise AssertionError("was not interrupted")


@pytest.mark.usefixtures("no_process_left")
def test_a_signal_while_a_process_is_ended_does_not_leave_it(monkeypatch, tmp_path):
    class Interrupting(Child):
        def end(self, grace_s=0.2):
            signal.raise_signal(signal.SIGTERM)  # the first, of which nobody has heard yet
            super().end(grace_s)

    monkeypatch.setattr(supervisor, "Child", Interrupting)
    command = [sys.executable, "-c", SLEEPS, str(tmp_path)]
    with pytest.raises(Interrupted), interrupts_raise(), started(command, {}, tmp_path / "log"):
        pass
