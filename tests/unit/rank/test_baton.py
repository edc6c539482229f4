"""Locks of torch's compiles whose owner was killed."""

from __future__ import annotations

import os
import signal
import time

import pytest
from torch.utils import cpp_extension

from vramplan.rank.baton import ABANDONED_AFTER_S, outlive_killed_compilers


@pytest.fixture
def baton(monkeypatch):
    monkeypatch.setattr(cpp_extension, "FileBaton", cpp_extension.FileBaton)
    outlive_killed_compilers()
    return cpp_extension.FileBaton


def killed_while_compiling(baton, path):
    """A process takes the lock and is killed."""
    pid = os.fork()
    if not pid:
        baton(path).try_acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert os.path.exists(path)


def test_the_lock_of_a_killed_compiler_is_taken_over(baton, tmp_path):
    path = str(tmp_path / "lock")
    killed_while_compiling(baton, path)
    mine = baton(path)
    assert mine.try_acquire()
    assert not baton(path).try_acquire(), "its owner lives"
    mine.release()
    assert baton(path).try_acquire()


def test_who_waits_for_a_compiler_that_is_killed_is_told(baton, tmp_path):
    path = str(tmp_path / "lock")
    killed_while_compiling(baton, path)
    with pytest.raises(RuntimeError, match=f"compiled {tmp_path.name} was ended"):
        baton(path).wait()


def test_the_lock_of_plain_torch_is_waited_for_as_long_as_something_is_written(baton, tmp_path):
    lock = tmp_path / "lock"
    lock.touch()
    assert not baton(str(lock)).try_acquire()
    long_ago = time.time() - ABANDONED_AFTER_S - 60
    os.utime(lock, (long_ago, long_ago))
    (tmp_path / "adam.o").touch()
    assert not baton(str(lock)).try_acquire(), "it still compiles"
    for path in tmp_path.iterdir():
        os.utime(path, (long_ago, long_ago))
    assert baton(str(lock)).try_acquire()
