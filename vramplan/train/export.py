"""What is left of a run: adapters that PEFT loads, or a model that ``from_pretrained`` loads; safetensors only."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vramplan.errors import CheckpointError
from vramplan.measure.run_dir import RunDir
from vramplan.spec.trainable import LoraMethod
from vramplan.train.disk import why_not_written
from vramplan.train.engine import TrainEngine
from vramplan.train.progress import tell


def export(engine: TrainEngine, run_dir: RunDir, tokenizer: Any, base_name: str) -> Path:
    """Writes what was trained, with the tokenizer; every rank calls, rank 0 writes. Gives the directory.

    Raises:
        CheckpointError: it cannot be written.
    """
    adapters = isinstance(engine.run.method, LoraMethod)
    target = run_dir.adapter if adapters else run_dir.model
    weights = _gather(engine, only_trained=adapters)
    if engine.rank == 0:
        with replaced_directory(target) as temporary:
            if adapters:
                _save_adapters(engine.module, temporary, weights, base_name)
            else:
                engine.module.save_pretrained(temporary, state_dict=weights)
            tokenizer.save_pretrained(temporary)
    dist.barrier()
    return target


@contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """A directory to write into, which takes ``target``'s place when it is complete.

    Raises:
        CheckpointError: the disk does not take it; what ``target`` held stays.
    """
    temporary = target.with_name(f".{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except Exception as error:  # safetensors raises no OSError
        reason = why_not_written(error, target.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        if reason is None:
            raise
        raise CheckpointError(
            f"{target} cannot be written ({reason}): make room, then --resume writes it from the last checkpoint"
        ) from error
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def _save_adapters(module: Any, directory: Path, weights: dict[str, torch.Tensor], base_name: str) -> None:
    for config in module.peft_config.values():
        config.base_model_name_or_path = base_name
    # the embedding is not trained; "auto" would ask the hub for the base model's config to find that out
    module.save_pretrained(directory, state_dict=weights, save_embedding_layers=False)


def _gather(engine: TrainEngine, *, only_trained: bool) -> dict[str, torch.Tensor]:
    """Whole weights by name, on rank 0's host; one is gathered at a time. Other ranks get nothing."""
    weights = {}
    for name, param in engine.module.named_parameters():
        if param.requires_grad or not only_trained:
            with _whole(param, engine.run.zero.stage):
                if engine.rank == 0:
                    weights[name] = param.detach().to("cpu", copy=True)
            tell()
    if only_trained:  # PEFT looks for a copy that the head shares with the token table under both names
        first = {param: name for name, param in engine.module.named_parameters()}
        every = engine.module.named_parameters(remove_duplicate=False)
        weights |= {name: weights[first[param]] for name, param in every if first[param] in weights}
    return weights


@contextmanager
def _whole(param: torch.nn.Parameter, stage: int | None) -> Iterator[None]:
    if stage != 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([param]):
        yield
