"""What the callback says where it cannot know whether a run fits."""

from __future__ import annotations

from types import SimpleNamespace

from vramplan.recovery import FitCallback
from vramplan.spec.run import RunSpec


def test_a_family_that_is_not_known_is_told_and_trained(monkeypatch, capsys):
    run = RunSpec(model="x", model_config_fields={"model_type": "nosuch"}, hardware={"gpu": "cpu"})
    monkeypatch.setattr("vramplan.recovery.trainer.run_of_trainer", lambda *_: run)
    callback = FitCallback(seq_len=8)
    callback.on_train_begin(SimpleNamespace(), None, None, model=None)
    assert callback.fit is None
    assert "is not known: unknown model family 'nosuch'" in callback.note
    assert callback.note in capsys.readouterr().out
