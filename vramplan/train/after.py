"""After training, in a process of its own: reloads what was saved, as any user would, to answer or to merge.

``python -m vramplan.train.after RUN_DIR [--sample QUESTION] [--merge]``
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from vramplan.measure.run_dir import RunDir, append_event
from vramplan.rank.model import weight_dtype
from vramplan.retain.interpolate import interpolated
from vramplan.search.plan import Plan
from vramplan.spec.run import RunSpec
from vramplan.spec.trainable import LoraMethod
from vramplan.train.card import write_model_card
from vramplan.train.export import replaced_directory
from vramplan.train.pretrained import load_tokenizer, model_directory, public_name


def main() -> int:
    """Does what the arguments ask, and appends an event for each."""
    parser = argparse.ArgumentParser(prog="python -m vramplan.train.after", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--sample", help="a question to answer")
    parser.add_argument("--merge", action="store_true", help="merge the adapters into the weights")
    parser.add_argument(
        "--interpolate", action="store_true", help="lay retain.interpolate of the base into the weights"
    )
    arguments = parser.parse_args()
    run_dir = RunDir(arguments.run_dir)
    run = Plan.load(run_dir.plan).run
    if run.retain.interpolate and arguments.interpolate:
        append_event(run_dir.metrics, "note", text=interpolate(run, run_dir))
    if arguments.sample:
        _sample(run, run_dir, arguments.sample)
    if arguments.merge:
        append_event(run_dir.metrics, "merged", path=str(merge(run, run_dir)))
    return 0


def reload(run: RunSpec, run_dir: RunDir, device_map: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) as they were saved: the base model with PEFT's adapters on it, or the trained model; on the
    host, or laid out as ``device_map`` says (transformers' key)."""
    if not isinstance(run.method, LoraMethod):
        return _load(run, run_dir.model, device_map), load_tokenizer(run_dir.model, run)
    from peft import PeftModel

    base = _load(run, model_directory(run), device_map)
    return PeftModel.from_pretrained(base, str(run_dir.adapter)), load_tokenizer(run_dir.adapter, run)


def answer(model: Any, tokenizer: Any, question: str, max_tokens: int) -> str:
    """The most likely answer to a question, at most ``max_tokens`` long."""
    prompt: Any = tokenizer(question, return_tensors="pt")
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    with torch.no_grad():
        generated = model.generate(
            **prompt, max_new_tokens=max_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    return str(tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def merge(run: RunSpec, run_dir: RunDir) -> Path:
    """Writes the base model with the adapters added to its weights; gives the directory."""
    model, tokenizer = reload(run, run_dir)
    merged = model.merge_and_unload()
    with replaced_directory(run_dir.model) as temporary:
        merged.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_model_card(run, run_dir, temporary, public_name(run, model_directory(run)), merged=True)
    return run_dir.model


@torch.no_grad()
def interpolate(run: RunSpec, run_dir: RunDir) -> str:
    """Moves what was saved towards the base model and saves it in its place; says so.

    Of adapters it is the up-projection that shrinks: the base plus ``(1 - share)`` of the update. What was trained
    whole beside them moves towards the original that PEFT keeps.
    """
    share = run.retain.interpolate
    model, tokenizer = reload(run, run_dir)
    adapters = isinstance(run.method, LoraMethod)
    start = run_dir.root / "expanded" if run.new_blocks else model_directory(run)
    base = {} if adapters else dict(_load(run, start).named_parameters())
    for name, param in model.named_parameters():
        if not adapters:
            param.copy_(interpolated(param, base[name], share))
        elif ".lora_B." in name or ".lora_embedding_B." in name:
            param.copy_(interpolated(param, torch.zeros_like(param), share))
        elif ".modules_to_save." in name:
            param.copy_(interpolated(param, original_of(model, name), share))
    target = run_dir.adapter if adapters else run_dir.model
    card = (target / "README.md").read_text(encoding="utf-8")
    with replaced_directory(target) as temporary:
        model.save_pretrained(temporary, **({"save_embedding_layers": False} if adapters else {}))
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return f"{share:.0%} of the base weights laid into {target}"


def original_of(model: Any, name: str) -> torch.Tensor:
    """The weight of which a copy was trained under that name (peft/utils/other.py, ``ModulesToSaveWrapper``)."""
    module, _, own = name.partition(".modules_to_save.")
    original: torch.Tensor = model.get_parameter(f"{module}.original_module.{own.partition('.')[2]}")
    return original


def _sample(run: RunSpec, run_dir: RunDir, question: str) -> None:
    started = time.perf_counter()
    model, tokenizer = reload(run, run_dir)
    text = answer(model.eval(), tokenizer, question, run.training.sample_tokens)
    append_event(run_dir.metrics, "sample", question=question, answer=text, seconds=time.perf_counter() - started)


def _load(run: RunSpec, directory: Path, device_map: str | None = None) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=weight_dtype(run),
        device_map=device_map,
        use_safetensors=None if run.training.allow_pickle else True,
        trust_remote_code=run.training.trust_remote_code,
    )


if __name__ == "__main__":
    sys.exit(main())
