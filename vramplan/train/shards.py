"""Reads the optimizer's state out of a sharded checkpoint, one parameter at a time, whoever wrote it.

Beside DeepSpeed's files lies what each rank held of which parameter (``write_holdings``), taken from the engine that
wrote them: its rules of cutting and padding need not be guessed again.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vramplan.errors import CheckpointError
from vramplan.measure.run_dir import write_json
from vramplan.train.engine import TrainEngine
from vramplan.train.fragments import Fragment, holdings, loss_scale_state

_HOLDINGS = "holdings-rank{:05d}.json"
_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def write_holdings(engine: TrainEngine, directory: Path) -> None:
    """Writes what this rank holds; without ZeRO, where all hold the same, rank 0 alone writes."""
    if not engine.run.zero.stage and engine.rank != 0:
        return
    held = holdings(engine)
    write_json(
        directory / _HOLDINGS.format(engine.rank),
        {
            "stage": engine.run.zero.stage or 0,
            "shapes": held.shapes,
            "fragments": {name: asdict(fragment) for name, fragment in held.fragments.items()},
            "loss_scale": loss_scale_state(engine),
        },
    )


class ShardedState:
    """The state of a checkpoint's optimizer. Files are mapped, not read: what is held at once is one parameter.

    Raises:
        CheckpointError: the checkpoint does not say what its ranks held.
    """

    def __init__(self, directory: Path, deepspeed_tag: str) -> None:
        found = sorted(directory.glob("holdings-rank*.json"))
        if not found:
            raise CheckpointError(f"{directory} does not say which rank held what, so it fits its own plan only")
        described = [json.loads(path.read_text(encoding="utf-8")) for path in found]
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(shape) for name, shape in sorted(described[0]["shapes"].items())
        }
        self.loss_scale: dict[str, Any] = described[0]["loss_scale"]
        stage, files = described[0]["stage"], directory / deepspeed_tag
        self._shards = [_Shard(files, rank, stage, each["fragments"]) for rank, each in enumerate(described)]

    @property
    def step(self) -> int:
        """Steps that the optimizer has applied (fewer than the run's where fp16 left some out)."""
        return max(shard.step for shard in self._shards)

    def read(self, name: str) -> dict[str, torch.Tensor]:
        """``weight`` and the moments of one parameter, whole, in fp32.

        Raises:
            CheckpointError: a part of it is nowhere.
        """
        shape, read, covered = self.shapes[name], dict[str, torch.Tensor](), 0
        for shard in self._shards:
            for key, fragment, part in shard.parts(name):
                whole = read.setdefault(key, torch.empty(shape, dtype=torch.float32))
                whole.view(-1)[fragment.start : fragment.start + fragment.numel] = part
                covered += fragment.numel if key == "weight" else 0
        if covered != torch.Size(shape).numel():
            raise CheckpointError(f"the checkpoint holds {covered} of {torch.Size(shape).numel()} elements of {name}")
        return read


class _Shard:
    """One rank's files."""

    def __init__(self, files: Path, rank: int, stage: int, fragments: dict[str, dict[str, int]]) -> None:
        self._fragments = {name: Fragment(**numbers) for name, numbers in fragments.items()}
        if stage:
            (path,) = files.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
            saved = _mapped(path)["optimizer_state_dict"]
        else:
            saved = _mapped(files / "mp_rank_00_model_states.pt")
        self._weights = _weights(saved, stage, self._fragments)
        inner = saved["optimizer"] if stage == 0 else saved
        inner = inner.get("base_optimizer_state", inner.get("optimizer_state_dict", inner))
        self._states: dict[int, dict[str, Any]] = inner["state"]
        counts = [state["step"] for state in (*self._states.values(), *inner["param_groups"]) if "step" in state]
        self.step = int(max(counts, default=0))

    def parts(self, name: str) -> list[tuple[str, Fragment, torch.Tensor]]:
        """(what, where in the parameter, its elements) of each tensor that is kept of a parameter here."""
        fragment = self._fragments.get(name)
        if fragment is None:
            return []
        state = self._states.get(fragment.flat, {})
        flats = {"weight": self._weights[fragment.flat]} | {key: state[key] for key in _MOMENTS if key in state}
        return [
            (key, fragment, flat.detach().reshape(-1)[fragment.offset : fragment.offset + fragment.numel])
            for key, flat in flats.items()
        ]


def _weights(saved: dict[str, Any], stage: int, fragments: dict[str, Fragment]) -> list[torch.Tensor]:
    """The fp32 weights as the optimizer numbers them."""
    if stage == 3:
        return list(saved["fp32_flat_groups"])
    if stage:
        return list(saved["single_partition_of_fp32_groups"])
    optimizer = saved["optimizer"]
    if "fp32_groups_flat" in optimizer:
        return list(optimizer["fp32_groups_flat"])
    if "fp32_groups" in optimizer:
        return [param for group in optimizer["fp32_groups"] for param in group]
    by_number = sorted((fragment.flat, name) for name, fragment in fragments.items())
    return [saved["module"][name] for _, name in by_number]


def _mapped(path: Path) -> Any:
    # DeepSpeed pickles its own classes with the tensors; the manifest says that the file is what the run wrote
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
