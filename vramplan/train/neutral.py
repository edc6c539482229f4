"""The training state in a form that belongs to no layout: of each parameter fp32 weight and moments, whole, by name.

A directory of safetensors, one file a parameter, and ``index.json`` with shapes, the optimizer's step, fp16's loss
scale and a CRC-32 of every tensor. The scheduler and the position in the data are functions of the run's step
(``schedule.py``, ``data/sampler.py``), dropout of (seed, step, micro-batch, rank) (``seeds.py``), so nothing else is
state. It is written and read one parameter at a time: a host needs room for the largest, four times.
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vramplan.errors import CheckpointError
from vramplan.measure.run_dir import write_json
from vramplan.train.disk import why_not_written
from vramplan.train.engine import TrainEngine
from vramplan.train.fragments import (
    COUNTING,
    Fragment,
    Holdings,
    holdings,
    moments_of,
    refresh_weights,
    set_loss_scale_state,
)
from vramplan.train.progress import tell
from vramplan.train.shards import ShardedState

INDEX = "index.json"


def write_neutral(source: ShardedState, directory: Path) -> None:
    """Writes the neutral form of a checkpoint; every rank calls and writes its share of the parameters.

    Raises:
        CheckpointError: the disk does not take it, or the checkpoint lacks a part; the same on every rank.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    dist.barrier()
    entries, failure = dict[str, Any](), None
    by_size = sorted(source.shapes, key=lambda name: -torch.Size(source.shapes[name]).numel())
    try:
        for number in range(rank, len(by_size), world_size):
            entries[by_size[number]] = _write_parameter(source, by_size[number], directory, f"{number:06d}")
    except CheckpointError as error:
        failure = str(error)
    except Exception as error:  # safetensors raises no OSError
        reason = why_not_written(error, directory)
        if reason is None:
            raise
        failure = f"the converted state cannot be written to {directory} ({reason})"
    _agree(failure)
    shares: list[Any] = [None] * world_size
    dist.all_gather_object(shares, entries)
    if rank == 0:
        tensors = {name: entry for share in shares for name, entry in share.items()}
        write_json(directory / INDEX, {"step": source.step, "loss_scale": source.loss_scale, "tensors": tensors})
    dist.barrier()


def load_neutral(engine: TrainEngine, directory: Path) -> None:
    """Puts a neutral form into an engine, whichever stage it has; every rank calls and takes what it holds.

    Raises:
        CheckpointError: a tensor is not what was written, or belongs to another model; the same on every rank.
    """
    index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    held, tensors = holdings(engine), index["tensors"]
    _agree(_difference(held, tensors) or _damage(directory, tensors))
    moments = moments_of(engine.run.optimizer) or ()
    for master in held.masters:
        _make_moments(held.optimizer, master, moments)
        if engine.run.optimizer.kind in COUNTING:
            held.optimizer.state[master]["step"] = _step_as_kept(held.optimizer, master, index["step"])
    for name, fragment in held.fragments.items():
        _load_fragment(held, fragment, directory / tensors[name]["file"], moments)
        tell()
    for group in held.optimizer.param_groups:
        if "step" in group:  # DeepSpeed's FusedAdam counts there too
            group["step"] = index["step"]
    set_loss_scale_state(engine, index["loss_scale"])
    refresh_weights(engine)


def _write_parameter(source: ShardedState, name: str, directory: Path, stem: str) -> dict[str, Any]:
    from safetensors.torch import save_file

    tensors = source.read(name)
    file_name = f"{stem}.safetensors"
    save_file(tensors, directory / file_name, metadata={"name": name})
    tell()
    return {
        "file": file_name,
        "shape": list(source.shapes[name]),
        "crc32": {key: _checksum(tensor) for key, tensor in tensors.items()},
    }


def _difference(held: Holdings, tensors: dict[str, Any]) -> str | None:
    for name in sorted(held.shapes.keys() ^ tensors.keys()):
        return f"{name} is trained {'by this plan' if name in held.shapes else 'in the checkpoint'} only"
    for name, shape in held.shapes.items():
        if list(shape) != tensors[name]["shape"]:
            return f"{name} has shape {list(shape)}, in the checkpoint {tensors[name]['shape']}"
    return None


def _damage(directory: Path, tensors: dict[str, Any]) -> str | None:
    """What is wrong with this rank's share of the files; None where all is as it was written."""
    from safetensors import SafetensorError, safe_open

    for name in sorted(tensors)[dist.get_rank() :: dist.get_world_size()]:
        entry = tensors[name]
        tell()
        try:
            with safe_open(directory / entry["file"], framework="pt") as file:
                wrong = [key for key, expected in entry["crc32"].items() if _checksum(file.get_tensor(key)) != expected]
        except (OSError, SafetensorError) as error:
            return f"{entry['file']} of the converted state cannot be read ({error})"
        if wrong:
            return f"{wrong[0]} of {name} in the converted state does not have the content that was written"
    return None


def _agree(failure: str | None) -> None:
    """Raises the same CheckpointError on every rank where any of them has a failure to tell."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, failure)
    first = next((each for each in found if each is not None), None)
    if first is not None:
        raise CheckpointError(first)


def _make_moments(optimizer: Any, master: torch.Tensor, moments: tuple[str, ...]) -> None:
    """The optimizer's state of a master as its own first step would make it."""
    state = optimizer.state[master]
    for key in moments:
        if key not in state:
            state[key] = torch.zeros_like(master.detach())


def _step_as_kept(optimizer: Any, master: torch.Tensor, step: int) -> torch.Tensor | int:
    """torch's Adam counts in a tensor, which lies with the weights for its fused form (torch/optim/adam.py)."""
    if not isinstance(optimizer, torch.optim.Adam):
        return step
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return torch.tensor(float(step), dtype=torch.float32, device=master.device if fused else "cpu")


def _load_fragment(held: Holdings, fragment: Fragment, path: Path, moments: tuple[str, ...]) -> None:
    from safetensors import safe_open

    master = held.masters[fragment.flat]
    targets = {"weight": master.detach()} | {key: held.optimizer.state[master][key] for key in moments}
    with safe_open(path, framework="pt") as file:
        for key, target in targets.items():
            part = file.get_tensor(key).view(-1)[fragment.start : fragment.start + fragment.numel]
            target.view(-1)[fragment.offset : fragment.offset + fragment.numel] = part.to(target.device)


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
