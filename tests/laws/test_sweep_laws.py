"""The sweep over many layouts gives what the estimate of each gives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.small_configs import SMALL
from vramplan.errors import SpecError
from vramplan.facts.device import Device, Node
from vramplan.facts.families import architecture_from_config
from vramplan.memory.estimate import estimate
from vramplan.memory.from_run import job_from_run
from vramplan.memory.sweep import Candidates, allocated_peaks
from vramplan.spec.layout import Layout
from vramplan.spec.retain import RetainSpec
from vramplan.spec.run import RunSpec

CONFIGS = {family: {"model_type": family, **fields} for family, fields in SMALL}
NODE = Node(Device("some GPU", "cuda", 80 * 2**30, 80 * 2**30), 8)

layouts = st.tuples(
    st.sampled_from([0, 1, 2, 3]),
    st.sampled_from([1, 2, 3, 8]),
    st.sampled_from([0, 1]),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(2, 600),
)


def run_of(config, layout, kl):
    stage, dp, checkpointing, micro, accumulation, seq_len = layout
    return RunSpec(
        model="small",
        model_config_fields=config,
        micro_batch_size=micro,
        grad_accum_steps=accumulation,
        seq_len=seq_len,
        attention="eager",
        activation_checkpointing="full" if checkpointing else "none",
        zero={"stage": stage, "reduce_bucket_size": 3_000_000},
        layout=Layout(dp=dp),
        retain={"kl": {} if kl else None},
    )


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["llama", "gpt2", "mistral", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3"]),
    st.lists(layouts, min_size=1, max_size=8),
    st.booleans(),
)
def test_a_sweep_equals_its_estimates(family, rows, kl):
    config = CONFIGS[family]
    architecture = architecture_from_config(config)
    columns = [np.array(column, dtype=np.int64) for column in zip(*rows, strict=True)]
    job = job_from_run(run_of(config, rows[0], kl), NODE, architecture)
    expected = [estimate(run_of(config, row, kl), NODE, architecture).allocated_peak_bytes for row in rows]
    assert allocated_peaks(job, Candidates(*columns)).tolist() == expected


def test_columns_of_different_lengths_are_one_sentence():
    one, two = np.ones(1, dtype=np.int64), np.ones(2, dtype=np.int64)
    with pytest.raises(SpecError, match="one length"):
        Candidates(one, one, one, one, one, two)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_any_number_of_ranks_runs_the_model_alike(stage):
    """A sweep walks it once for all of them; springs are shared by the ranks, so there each number has its own."""
    config = CONFIGS["llama"]

    def model_run(dp, **retain):
        run = run_of(config, (stage, dp, 0, 2, 1, 64), False).model_copy(update={"retain": RetainSpec(**retain)})
        return job_from_run(run, NODE, architecture_from_config(config)).model_run

    assert model_run(8) == model_run(64)
    assert model_run(8, l2sp={}) != model_run(64, l2sp={})
