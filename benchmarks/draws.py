"""Random jobs over everything that decides bytes, in the form of records, to measure and compare.

python benchmarks/draws.py -o runs/draws.jsonl --count 40 --seed 1      # jobs
vramplan bench run runs/draws.jsonl -o runs/drawn.jsonl                 # measured for real, on the CPU
vramplan compare runs/drawn.jsonl --phases                              # beside the estimate

Models are the catalogue's, real widths with few layers; where that is too large for ``--most``, the vocabulary and
then the number of experts are cut. Every family takes its turn. What DeepSpeed refuses is not drawn; what the estimator
does not cover is, and ``compare`` names it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vramplan.errors import ConfigError, VramplanError
from vramplan.facts.catalogue import ModelEntry, all_models
from vramplan.facts.device import Device, Node
from vramplan.facts.families import architecture_from_config
from vramplan.facts.resolve import resolve_architecture
from vramplan.measure.record import JobSpec
from vramplan.measure.record_spec import run_from_record_spec
from vramplan.memory.estimate import UncoveredError, estimate
from vramplan.search.legality import illegality
from vramplan.units import GIB, TIB

CPU = Device("CPU", "cpu", TIB, TIB)
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
NARROWED = (
    "hidden_size",
    "intermediate_size",
    "intermediate_size_mlp",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
)
TARGETS = ("all-linear", ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"], ".*_proj")
SMALL_BUCKETS = (2_000_000, 20_000_000)


def jobs(count: int, seed: int, most_bytes: int) -> Iterator[dict[str, Any]]:
    """``count`` jobs, families in turn; each can be run by DeepSpeed on the CPU."""
    draw = random.Random(seed)
    by_type: dict[str, list[ModelEntry]] = {}
    for entry in all_models():
        by_type.setdefault(entry.model_type, []).append(entry)
    types = [name for name in sorted(by_type) if _is_known(by_type[name][0])]
    made = 0
    while made < count:
        draw.shuffle(types)
        for name in types:
            tries = (_job(draw, draw.choice(by_type[name]), most_bytes, narrow=n > 30) for n in range(90))
            job = next(filter(None, tries), None)
            if job is None:
                print(f"{name}: nothing small enough was drawn", file=sys.stderr)
                continue
            made += 1
            yield {"id": f"D{seed}-{made:03d}", **job}
            if made == count:
                return


def _is_known(entry: ModelEntry) -> bool:
    try:
        architecture_from_config(entry.config)
    except ConfigError:  # a family that is not known
        return False
    return True


def _job(draw: random.Random, entry: ModelEntry, most_bytes: int, narrow: bool) -> dict[str, Any] | None:
    """One job of the model, or None where what was drawn cannot be run or is too large."""
    layers = draw.choice((1, 2, 2, 3))
    stage = draw.choice((0, 1, 2, 3))
    job = {
        "model": {"name": f"{entry.name}@{layers}L", "config": _shallow(draw, entry, layers, narrow)},
        "precision": draw.choice(("bf16", "bf16", "fp32", "bf16-autocast")),
        "micro_batch_size": draw.choice((1, 1, 2, 3)),
        "seq_len": draw.choice((48, 100, 128, 200, 255, 256, 384, 640)),
        "grad_accum_steps": draw.choice((1, 1, 2, 3)),
        "attention": draw.choice(("sdpa", "sdpa", "eager")),
        "attention_mask": draw.choice((False, False, True)),
        "activation_checkpointing": draw.choice(("none", "full")),
        "method": _method(draw),
        "optimizer": draw.choice(
            ("adamw", "adamw", "adamw", "adamw_torch", "adamw_torch_fused", "adamw_8bit", "sgd", "adafactor")
        ),
        "zero": {"stage": stage, **_zero_keys(draw, stage)},
        "world": {"dp": draw.choice((1, 2, 4, 8, 16)), "sp": draw.choice((1, 1, 1, 1, 2))},
        "steps": 2,
    }
    return job if _is_possible(job, most_bytes) else None


def _shallow(draw: random.Random, entry: ModelEntry, layers: int, narrow: bool) -> dict[str, Any]:
    """The model's fields with few layers, and where it is large a cut vocabulary and few experts; a quarter as wide if
    ``narrow``."""
    config = dict(entry.config)
    if "text_config" in config:
        config = {**config["text_config"], "model_type": f"{config['model_type']}_text"}
    if narrow:
        config |= {name: max(1, config[name] // 4) for name in NARROWED if config.get(name)}
    names = [name for name in LAYERS if name in config] or ["num_hidden_layers"]
    config.update(dict.fromkeys(names, layers))
    for name in ("layer_types", "no_rope_layers", "mlp_only_layers", "moe_layers"):
        if isinstance(config.get(name), list):
            config[name] = [each for each in config[name] if not isinstance(each, int) or each < 2][:layers]
    if config.get("vocab_size", 0) > 50_000:
        config["vocab_size"] = draw.choice((2_000, 8_192, 32_001))
        config |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    for name in EXPERTS:
        if config.get(name, 0) > 8:
            config[name] = 8
            config.update({key: 2 for key in ("n_group", "topk_group") if (config.get(key) or 0) > 1})
    if config.get("num_experts_per_tok", 0) > 4:
        config["num_experts_per_tok"] = 4
    return config


def _method(draw: random.Random) -> dict[str, Any]:
    kind = draw.choice(("full", "full", "full", "lora", "lora", "qlora"))
    if kind == "full":
        return {"kind": kind}
    method: dict[str, Any] = {"kind": kind, "r": draw.choice((4, 16, 64)), "target_modules": draw.choice(TARGETS)}
    if draw.random() < 0.3:
        method["dropout"] = 0.05
    if kind == "lora" and draw.random() < 0.2:
        method["use_dora"] = True
    return method


def _zero_keys(draw: random.Random, stage: int) -> dict[str, Any]:
    """DeepSpeed's keys for the stage, each now and then."""
    if stage == 0:
        return {}
    choices: dict[str, tuple[Any, ...]] = {
        "overlap_comm": (True, False),
        "contiguous_gradients": (False,),
        "reduce_scatter": (False,),
        "reduce_bucket_size": SMALL_BUCKETS,
        "allgather_bucket_size": SMALL_BUCKETS,
        "allgather_partitions": (False,),
        "use_multi_rank_bucket_allreduce": (False,),
        "parameter_alignment": (True,),
        "round_robin_gradients": (True,),
        "ignore_unused_parameters": (False,),
        "elastic_checkpoint": (True,),
        "load_from_fp32_weights": (False,),
        "offload_optimizer": ("cpu",),
    }
    if stage == 3:
        choices |= {
            "stage3_prefetch_bucket_size": (0, 1_000_000, 10_000_000),
            "stage3_param_persistence_threshold": (0, 10_000, 5_000_000),
            "stage3_model_persistence_threshold": (1_000_000,),
            "stage3_max_live_parameters": (0, 10_000_000, 50_000_000),
            "stage3_max_reuse_distance": (0, 10_000_000),
            "stage3_gather_16bit_weights_on_model_save": (True,),
            "stage3_allgather_sequential": (True,),
            "memory_efficient_linear": (False,),
            "sub_group_size": (1_000_000, 30_000_000),
            "offload_param": ("cpu",),
        }
    return {name: draw.choice(values) for name, values in choices.items() if draw.random() < 0.22}


def _is_possible(job: dict[str, Any], most_bytes: int) -> bool:
    """Whether DeepSpeed runs it, and it is small, as far as the estimator can tell."""
    try:
        spec = JobSpec.model_validate(job)
        run, layout = run_from_record_spec(spec)
        architecture = resolve_architecture(run)
        node = Node(CPU, gpus_per_node=layout.world_size)
        if illegality(run, node, architecture) is not None:
            return False
        if architecture.num_params * (16 if run.zero.stage == 0 else 8) > most_bytes:
            return False
        return estimate(run, node, architecture, rank=0, managed=True).train_allocated_peak_bytes <= most_bytes
    except UncoveredError:
        return True
    except (VramplanError, ValidationError):  # refused with a reason; anything else is a fault
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="file of jobs")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=float, default=3.0, help="GiB of a job's peak at most")
    options = parser.parse_args()
    drawn = list(jobs(options.count, options.seed, int(options.most * GIB)))
    options.output.write_text("".join(json.dumps(job) + "\n" for job in drawn), encoding="utf-8")
    print(Counter(job["model"]["config"]["model_type"] for job in drawn))


if __name__ == "__main__":
    main()
