"""A disk that is full before a run starts is one sentence, not ranks that die without being able to say why."""

from __future__ import annotations

import resource
from types import SimpleNamespace

import pytest

from vramplan.cli.train import _prepare
from vramplan.errors import SpecError
from vramplan.measure.run_dir import RunDir

TWO_RANKS = SimpleNamespace(save=lambda path: path.touch(), node=SimpleNamespace(world_size=2))


@pytest.fixture
def little_room():
    """Real: the kernel takes no more bytes into a file."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, most))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


@pytest.mark.usefixtures("little_room")
@pytest.mark.parametrize(("resume", "mend"), [(True, "make room"), (False, "make room, or choose another -o")])
def test_a_start_that_has_no_room_is_refused(tmp_path, resume, mend):
    with pytest.raises(SpecError) as caught:
        _prepare(RunDir(tmp_path), TWO_RANKS, resume)
    assert str(caught.value) == f"{tmp_path}: cannot be written (File too large); {mend}"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]


def test_what_was_tried_is_gone_before_the_run_starts(tmp_path):
    _prepare(RunDir(tmp_path), TWO_RANKS, False)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]
