"""Layers that are not run stand for what they keep: running every layer gives the same bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.small_configs import SMALL
from vramplan.facts.dtype import Dtype
from vramplan.facts.families import architecture_from_config
from vramplan.memory import gathered
from vramplan.memory import profile as profiles
from vramplan.memory.gathers import GatherLimits
from vramplan.spec.trainable import FullMethod

CONFIGS = {family: {"model_type": family, **fields} for family, fields in reversed(SMALL)}
LIMITS = GatherLimits(
    prefetch_bucket_numel=20_000,
    max_live_numel=30_000,
    max_reuse_numel=30_000,
    persistence_numel=500,
    model_persistence_numel=10**9,
)
"""Far smaller than the model, as they are beside a large one: few layers are whole at a time."""


def highest(run):
    """Of both steps the highest bytes of forward and backward, what is left after each, and the bytes as each gradient
    comes; where weights stay whole, of one micro-batch."""
    if run.gathers is None:
        profiles_of_steps = (profiles.Runner(run).micro_batch(),)
    else:
        found = gathered.gathered_profiles.__wrapped__(run, micros=1)
        profiles_of_steps = (found.first, found.after_step)
    ends = [(each.forward_end.total, each.backward_end.total) for each in profiles_of_steps]
    peaks = [
        (max(point.total for point in each.forward), max(point.total for point in each.backward))
        for each in profiles_of_steps
    ]
    gradients = [[(gradient.name, gradient.at.total) for gradient in each.gradients] for each in profiles_of_steps]
    return ends, peaks, gradients


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "falcon", "gemma2", "llama"])
def test_layers_between_under_zero3(family, checkpointing, monkeypatch):
    fields = {"num_hidden_layers": 10, "layer_types": None, "mlp_only_layers": []}
    architecture = architecture_from_config({**CONFIGS[family], **fields})
    run = profiles.ModelRun(
        architecture,
        FullMethod(),
        Dtype.BF16,
        None,
        "cuda",
        "sdpa",
        checkpointing,
        keep_outputs=True,
        gathers=LIMITS,
    )
    as_if_all_ran(run, monkeypatch)


@pytest.mark.parametrize("autocast", [None, Dtype.BF16])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "gemma2", "llama"])
def test_layers_between_of_whole_weights(family, checkpointing, autocast, monkeypatch):
    architecture = architecture_from_config({**CONFIGS[family], "num_hidden_layers": 10, "layer_types": None})
    dtype = Dtype.FP32 if autocast else Dtype.BF16
    run = profiles.ModelRun(
        architecture, FullMethod(), dtype, autocast, "cuda", "sdpa", checkpointing, keep_outputs=True
    )
    as_if_all_ran(run, monkeypatch)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_between_keep_second_parts(checkpointing, monkeypatch):
    """hpZ, and parts that come from the host."""
    architecture = architecture_from_config({**CONFIGS["llama"], "num_hidden_layers": 10})
    limits = replace(LIMITS, degree=4, from_host=True, secondary=2, ranks=4)
    run = profiles.ModelRun(
        architecture, FullMethod(), Dtype.BF16, None, "cuda", "sdpa", checkpointing, keep_outputs=True, gathers=limits
    )
    as_if_all_ran(run, monkeypatch)


def as_if_all_ran(run, monkeypatch):
    shortened = highest(run)
    monkeypatch.setattr(profiles, "layers_shown", lambda keys, *near: frozenset(range(len(keys))))
    assert highest(run) == shortened
