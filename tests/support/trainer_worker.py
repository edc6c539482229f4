"""transformers' real Trainer on a tiny model on the CPU, with the drop-ins of ``vramplan.recovery``.

``python -m support.trainer_worker ROOT TASK ...``; each task writes ``ROOT/TASK.json``.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from vramplan.errors import NoPlanError
from vramplan.recovery import FitCallback, find_executable_batch_size
from vramplan.train.out_of_memory import data_bytes

LENGTH, VOCAB, STEPS = 128, 16_384, 3
START_BATCH, SMALLER_BATCH = 16, 4
LOGITS_BYTES = 4 * LENGTH * VOCAB
"""Of one sequence, in fp32."""
ROOM_BYTES = int(2.2 * START_BATCH * LOGITS_BYTES)
"""Less than logits, fp32 copy, log-softmax and gradients of 16 sequences take, more than those of 4."""


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def trainer(root: Path, batch_size: int, accumulation: int, *callbacks: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(root / "out"),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        logging_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    return Trainer(model=model(), args=arguments, train_dataset=Rows(), callbacks=list(callbacks))


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def batch(root: Path) -> dict[str, Any]:
    """With room for fewer than 16 sequences; what was tried, and the losses."""
    tried = []

    @find_executable_batch_size(starting_batch_size=START_BATCH)
    def train(batch_size: int, gradient_accumulation_steps: int) -> list[float]:
        tried.append((batch_size, gradient_accumulation_steps))
        run = trainer(root, batch_size, gradient_accumulation_steps)
        run.train()
        return losses(run)

    limit = data_bytes() + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    try:
        found = train()
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return {"tried": tried, "losses": found}


def reference(root: Path) -> dict[str, Any]:
    """Without a limit, with the whole batch at once."""
    run = trainer(root, START_BATCH, 1)
    run.train()
    return {"losses": losses(run)}


def fit(root: Path) -> dict[str, Any]:
    """A run that fits: predicted beside measured."""
    callback = FitCallback(seq_len=LENGTH)
    run = trainer(root, SMALLER_BATCH, 2, callback)
    run.train()
    return {
        "note": callback.note,
        "fits": callback.fit is not None and callback.fit.fits,
        "comparison": callback.comparison,
        "written": json.loads((root / "out" / "vramplan_fit.json").read_text()),
        "losses": losses(run),
    }


def misfit(root: Path) -> dict[str, Any]:
    """One that cannot fit: sequences of 16 million tokens."""
    run = trainer(root, SMALLER_BATCH, 1, FitCallback(seq_len=2**24))
    run.model.config.max_position_embeddings = 2**25
    try:
        run.train()
    except NoPlanError as error:
        return {"error": str(error), "steps": run.state.global_step}
    return {"steps": run.state.global_step}


def unknown(root: Path) -> dict[str, Any]:
    """One that the arithmetic does not cover trains, and that is said."""
    callback = FitCallback(seq_len=LENGTH)
    run = trainer(root, SMALLER_BATCH, 1, callback)
    run.model.model.layers[0].requires_grad_(False)
    run.train()
    return {"note": callback.note, "steps": run.state.global_step, "comparison": callback.comparison}


if __name__ == "__main__":
    where = Path(sys.argv[1])
    for task in sys.argv[2:]:
        (where / f"{task}.json").write_text(json.dumps(globals()[task](where)))
    sys.stdout.flush()
    os._exit(0)
