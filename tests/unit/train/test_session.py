"""What a rank does before its first step."""

from __future__ import annotations

from types import SimpleNamespace

from vramplan.measure.run_dir import RunDir
from vramplan.train.session import _resume


def test_where_nothing_was_saved_nothing_is_measured_as_a_resume(tmp_path):
    """The record would hold a resume that took nothing, beside the bytes of one that reads a checkpoint."""
    said = []
    metrics = SimpleNamespace(event=lambda kind, **fields: said.append((kind, fields)))
    loop = SimpleNamespace(run_dir=RunDir(tmp_path), metrics=metrics)  # no phases: none may be opened
    assert _resume(loop, None, True) == 0
    assert said == [("note", {"text": "no checkpoint yet: the run starts from the beginning"})]
