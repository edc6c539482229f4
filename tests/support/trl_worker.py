"""TRL's real SFTTrainer on a tiny model on the CPU, with ``FitCallback``: ``python -m support.trl_worker ROOT``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from vramplan.recovery import FitCallback

from support.tiny_model import save_tiny_model

LENGTH, STEPS = 128, 3


def trainer(root: Path, callback: FitCallback) -> SFTTrainer:
    directory = root / "model"
    if not directory.exists():
        save_tiny_model(directory, vocab_size=16_384, hidden_size=64, intermediate_size=96)
    rows = [{"input_ids": [5 + (index * 7 + place) % 500 for place in range(LENGTH)]} for index in range(32)]
    arguments = SFTConfig(
        output_dir=str(root / "out"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        max_length=LENGTH,
        learning_rate=1e-3,
        optim="adamw_torch",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(directory),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(directory),
        callbacks=[callback],
    )


def main() -> None:
    root = Path(sys.argv[1])
    callback = FitCallback()
    run = trainer(root, callback)
    run.train()
    found = {
        "note": callback.note,
        "comparison": callback.comparison,
        "steps": run.state.global_step,
    }
    (root / "trl.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
