"""Hundreds of ranks: DeepSpeed's loops over them, shortened, make the same blocks as the loops themselves."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import contextlib, json, sys
import vramplan.simulate.patches as patches
if sys.argv[1] == "loops":
    patches.few_views = contextlib.nullcontext
from vramplan.simulate.engine import trace_rank
from vramplan.simulate.request import AS_RECORDED
from vramplan.spec.load import run_from_mapping
run = run_from_mapping({
    "model": "tiny", "seq_len": 32, "micro_batch_size": 1, "grad_accum_steps": 1, "layout": {"dp": 24},
    "activation_checkpointing": "none", "precision": "bf16",
    "zero": {"stage": 3, "offload_optimizer": "none", "offload_param": "none",
             "stage3_param_persistence_threshold": 10, "reduce_bucket_size": 20000,
             "stage3_prefetch_bucket_size": 9000},
    "model_config_fields": {"model_type": "llama", "hidden_size": 52, "intermediate_size": 100, "vocab_size": 211,
        "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 26},
})
traced = trace_rank(run, run.layout, AS_RECORDED, "cpu")
assert traced.error is None, traced.error
trace = traced.trace
columns = [list(column) for column in (trace.num_bytes, trace.born_at, trace.died_at)]
print(json.dumps([columns, [(span.name, span.start, span.end) for span in trace.phases]]))
"""


def blocks(how):
    done = subprocess.run(
        [sys.executable, "-c", CODE, how],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_same_blocks_are_born_and_freed():
    assert blocks("shortened") == blocks("loops")
