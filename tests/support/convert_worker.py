"""One of several ranks that write checkpoints in one layout and read them in others.

``python -m support.convert_worker ROOT MODEL METHOD PRECISION TASK:LAYOUT[,LAYOUT] ...``; RANK and so on as a launcher
sets them. A layout is a ZeRO stage, with what is offloaded and by which optimizer (``_OFFLOAD``). Tasks: ``save``
trains two steps and saves; ``load`` resumes each saved checkpoint; after either, two more steps are made. ``damage``
spoils a converted state and writes down what is said of it. What is seen goes to files in ``ROOT``.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.comm import init_distributed
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from vramplan.data.batch import Batch
from vramplan.emit.deepspeed import ds_config
from vramplan.errors import CheckpointError
from vramplan.spec.run import RunSpec
from vramplan.train.checkpoint import resume, save_checkpoint
from vramplan.train.engine import TrainEngine
from vramplan.train.fragments import moments_of
from vramplan.train.model import load_model
from vramplan.train.neutral import load_neutral, write_neutral
from vramplan.train.shards import ShardedState
from vramplan.train.state import RunState

GLOBAL_BATCH, LENGTH, LR = 4, 24, 1e-2
_OFFLOAD = {
    "": ("adamw_torch", "none", "none"),
    "fused": ("adamw", "none", "none"),
    "optimizer": ("adamw_torch_fused", "cpu", "none"),  # on the CPU torch's own, which needs no compiler
    "cpuadam": ("adamw", "cpu", "none"),
    "param": ("adamw", "cpu", "cpu"),
    "sgd": ("sgd", "none", "none"),
    "lion": ("lion", "cpu", "none"),  # DeepSpeed's CPULion: its FusedLion needs a GPU
}
"""(optimizer, offload_optimizer, offload_param)"""


def run_spec(model: str, method: str, precision: str, layout: str) -> RunSpec:
    stage, _, offload = layout.partition("+")
    optimizer, offload_optimizer, offload_param = _OFFLOAD[offload]
    return RunSpec.model_validate(
        {
            "model": model,
            "method": {"kind": method} if method == "full" else {"kind": method, "r": 4},
            "precision": precision,
            "seq_len": LENGTH,
            "global_batch_size": GLOBAL_BATCH,
            "micro_batch_size": 1,
            "grad_accum_steps": GLOBAL_BATCH // dist.get_world_size(),
            "activation_checkpointing": "none",
            "optimizer": {"kind": optimizer, "lr": LR, "momentum": 0.9 if optimizer == "sgd" else 0.0},
            "zero": {
                "stage": int(stage),
                "reduce_bucket_size": 5_000,
                "stage3_param_persistence_threshold": 100,
                "sub_group_size": 9_000,
                "offload_optimizer": offload_optimizer,
                "offload_param": offload_param,
            },
        }
    )


def make_engine(run: RunSpec) -> TrainEngine:
    config = ds_config(run, dist.get_world_size())
    loaded = load_model(run, Path(run.model), config)
    engine = TrainEngine(run, loaded.module, config, torch.device("cpu"))
    engine.kept_alive = loaded  # type: ignore[attr-defined]
    return engine


def step(engine: TrainEngine, number: int) -> float:
    """One optimizer step on a batch that depends on ``number`` alone; its loss."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(5, 500, (GLOBAL_BATCH, LENGTH), generator=generator)
    mine, total = ids.chunk(engine.world_size)[engine.rank], torch.zeros((), dtype=torch.float64)
    for micro, row in enumerate(mine.split(1)):
        batch = Batch(input_ids=row, labels=row.clone(), attention_mask=None)
        loss = engine.forward(batch, GLOBAL_BATCH * (LENGTH - 1), is_last=micro + 1 == len(mine))
        engine.backward(loss)
        total += loss.detach()
    engine.step(LR)
    return engine.sum_over_ranks(total)[0]


def whole_state(engine: TrainEngine) -> dict[str, torch.Tensor]:
    """Weights and moments as DeepSpeed's own getters give them; without ZeRO, which they do not know, as they lie."""
    if engine.run.zero.stage == 0:
        return _whole_state_without_zero(engine)
    state = {}
    if engine.run.zero.stage < 3:
        engine.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()  # the getters look there
    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            state[f"{name} weight"] = safe_get_full_fp32_param(param).clone()
            for key in moments_of(engine.run.optimizer) or ():
                state[f"{name} {key}"] = safe_get_full_optimizer_state(param, key).clone()
    return state | _steps(engine.deepspeed.optimizer.optimizer)


def _steps(inner: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What it has counted; nothing for one that does not count."""
    counted = [float(each["step"]) for each in inner.state.values() if "step" in each]
    return {"step": torch.tensor(counted).unique()} if counted else {}


def _whole_state_without_zero(engine: TrainEngine) -> dict[str, torch.Tensor]:
    wrapped = engine.deepspeed.optimizer
    trained = [(name, param) for name, param in engine.module.named_parameters() if param.requires_grad]
    masters = [param for _, param in trained]
    if hasattr(wrapped, "fp32_groups"):  # half precision
        (masters,) = wrapped.fp32_groups
    if hasattr(wrapped, "fp32_groups_flat"):
        return _whole_state_of_flat_masters(wrapped, trained)
    inner, state = getattr(wrapped, "optimizer", wrapped), {}
    for (name, _), master in zip(trained, masters, strict=True):
        state[f"{name} weight"] = master.detach().clone()
        moments = moments_of(engine.run.optimizer) or ()
        state |= {f"{name} {key}": inner.state[master][key].clone() for key in moments}
    return state | _steps(inner)


def _whole_state_of_flat_masters(wrapped, trained) -> dict[str, torch.Tensor]:
    (flat,), state, offset = wrapped.fp32_groups_flat, {}, 0
    kept = {"weight": flat, **{key: wrapped.optimizer.state[flat][key] for key in ("exp_avg", "exp_avg_sq")}}
    for name, param in trained:
        for key, tensor in kept.items():
            state[f"{name} {key}"] = tensor.detach()[offset : offset + param.numel()].view(param.shape).clone()
        offset += param.numel()
    return state | {"step": torch.tensor([float(wrapped.optimizer.state[flat]["step"])])}


def model_weights(engine: TrainEngine) -> dict[str, torch.Tensor]:
    """The weights that the forward uses."""
    import deepspeed

    params = [(name, param) for name, param in engine.module.named_parameters() if param.requires_grad]
    with deepspeed.zero.GatheredParameters([param for _, param in params], enabled=engine.run.zero.stage == 3):
        return {name: param.detach().clone() for name, param in params}


def state_of(run: RunSpec, steps: int) -> RunState:
    return RunState.of(run, step=steps, total_steps=9, num_samples=1, world_size=dist.get_world_size())


def main() -> None:
    root, model, method, precision, *tasks = sys.argv[1:]
    init_distributed(dist_backend="gloo", verbose=False)
    for task in tasks:
        name, _, layouts = task.partition(":")
        for layout in layouts.split(","):
            _TASKS[name](Path(root), layout, run_spec(model, method, precision, layout))


def save(root: Path, layout: str, run: RunSpec) -> None:
    engine = make_engine(run)
    for number in range(2):
        step(engine, number)
    save_checkpoint(engine, root / layout, state_of(run, 2), keep=1)
    tell(root / f"{layout}.saved", engine, ())


def load(root: Path, layout: str, run: RunSpec) -> None:
    for saved in checkpoints(root):
        engine = make_engine(run)
        found = resume(engine, saved, state_of(run, 0))
        assert found is not None
        tell(root / f"{saved.name}-{layout}-{dist.get_world_size()}.loaded", engine, found.notes)


def damage(root: Path, layout: str, run: RunSpec) -> None:
    """One bit of the middle parameter's second moment is another."""
    engine, neutral = make_engine(run), root / "neutral"
    write_neutral(ShardedState(checkpoints(root)[0] / "step-00000002", "deepspeed"), neutral)
    if engine.rank == 0:
        victim = sorted(neutral.glob("*.safetensors"))[3]
        content = bytearray(victim.read_bytes())
        content[-1] ^= 1
        victim.write_bytes(content)
    engine.wait_for_all()
    try:
        load_neutral(engine, neutral)
    except CheckpointError as error:
        (root / f"damage.rank{engine.rank}").write_text(str(error))
    engine.deepspeed.destroy()
    shutil.rmtree(neutral, ignore_errors=True)


def checkpoints(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and path.name[0].isdigit())


_TASKS = {"save": save, "load": load, "damage": damage}


def tell(path: Path, engine: TrainEngine, notes: tuple[str, ...]) -> None:
    """State, weights in use, notes, and the loss of the third step and of a fourth."""
    seen = {"state": whole_state(engine), "weights": model_weights(engine), "notes": notes}
    losses = [step(engine, number) for number in (2, 3)]
    if engine.rank == 0:
        torch.save(seen | {"losses": losses}, path)
    engine.deepspeed.destroy()


if __name__ == "__main__":
    main()
