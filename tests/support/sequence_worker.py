"""One of several ranks that train the same steps with whole sequences and with stretches of them.

``python -m support.sequence_worker ROOT MODEL NAME=JSON ...``; RANK and so on as a launcher sets them. JSON holds
fields of a spec over those of ``BASE``, ``sp`` among them: how many ranks share a sequence. What is seen of each run
(losses, norms of gradients, the loss of an evaluation) goes to ``ROOT/NAME.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.comm import init_distributed

from vramplan.data.batch import Batch
from vramplan.data.sample import Sample
from vramplan.emit.deepspeed import ds_config
from vramplan.spec.load import merge, run_from_mapping
from vramplan.spec.run import RunSpec
from vramplan.train.engine import TrainEngine
from vramplan.train.evaluate import evaluate
from vramplan.train.model import load_model

GLOBAL_BATCH, LENGTH, LR, STEPS = 8, 32, 1e-2, 3
BASE: dict[str, Any] = {
    "precision": "fp32",
    "seq_len": LENGTH,
    "micro_batch_size": 2,
    "global_batch_size": GLOBAL_BATCH,
    "activation_checkpointing": "none",
    "optimizer": {"kind": "adamw_torch", "lr": LR},
    "zero": {
        "stage": 2,
        "reduce_bucket_size": 5_000,
        "stage3_param_persistence_threshold": 100,
        "offload_optimizer": "none",
        "offload_param": "none",
    },
}


def run_of(model: str, given: dict[str, Any]) -> RunSpec:
    sp, world_size = given.pop("sp", 1), dist.get_world_size()
    dp = world_size // sp
    fixed = {"model": model, "layout": {"dp": dp, "sp": sp}, "grad_accum_steps": GLOBAL_BATCH // 2 // dp}
    return run_from_mapping(merge(merge(BASE, fixed), given), "the test's spec")


def make_engine(run: RunSpec) -> TrainEngine:
    _forget_groups()
    config = ds_config(run, dist.get_world_size())
    loaded = load_model(run, Path(run.model), config)
    engine = TrainEngine(run, loaded.module, config, torch.device("cpu"))
    engine.kept_alive = loaded  # type: ignore[attr-defined]
    return engine


def _forget_groups() -> None:
    """A trainer's process has one engine; here they follow each other."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.utils import groups
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    parallel_state_sp._release_sequence_parallel_groups()
    groups.mpu = groups.mesh_device = None
    ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention_forward


def batch_of(rows: torch.Tensor, weighted: bool) -> Batch:
    """Every third token is no target; the last row is shorter than the others."""
    labels = rows.masked_fill(torch.arange(LENGTH) % 3 == 1, -100)
    labels[-1, LENGTH - 11 :] = -100
    weights = torch.linspace(0.5, 2.0, LENGTH).repeat(len(rows), 1) * (labels != -100) if weighted else None
    return Batch(rows, labels, None, weights=weights)


def step(engine: TrainEngine, number: int, weighted: bool) -> float:
    """One optimizer step on a batch that depends on ``number`` alone; its loss."""
    generator = torch.Generator().manual_seed(number)
    rows = torch.randint(5, 500, (GLOBAL_BATCH, LENGTH), generator=generator)
    whole = [batch_of(each, weighted) for each in rows.split(2)]
    total_weight = sum(float((each.predicted() != -100).sum()) for each in whole)
    mine = whole[engine.dp_rank :: engine.dp_degree]
    total = torch.zeros((), dtype=torch.float64)
    for micro, batch in enumerate(mine):
        loss = engine.forward(engine.own_stretch(batch), total_weight, is_last=micro + 1 == len(mine))
        engine.backward(loss)
        total += loss.detach()
    engine.step(LR)
    return engine.sum_over_ranks(total)[0]


def held_out() -> list[Sample]:
    """Seven samples of different lengths, which no number of ranks divides."""
    import numpy as np

    random = np.random.RandomState(0)
    lengths = [9, 32, 17, 25, 8, 30, 12]
    return [Sample(f"row {length}", random.randint(5, 500, length), np.ones(length, dtype=bool)) for length in lengths]


def main() -> None:
    root, model, *runs = sys.argv[1:]
    init_distributed(dist_backend="gloo", verbose=False)
    for text in runs:
        name, _, fields = text.partition("=")
        given = json.loads(fields)
        weighted = given.pop("weighted", False)
        engine = make_engine(run_of(given.pop("model", model), given))
        if engine.penalties is not None:
            engine.penalties.anchor()
        losses, norms = [], []
        for number in range(STEPS):
            losses.append(step(engine, number, weighted))
            norms.append(engine.grad_norm())
        found = {"losses": losses, "norms": norms, "evaluated": evaluate(engine, held_out(), 0, 3).loss}
        if engine.rank == 0:
            Path(root, f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
        engine.deepspeed.destroy()


if __name__ == "__main__":
    main()
