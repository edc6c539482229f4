"""What keys of a run must say of each other; found before any process starts."""

from __future__ import annotations

from vramplan.errors import LegalityError, SpecError, nearest_names
from vramplan.spec.alloc_conf import AllocConf
from vramplan.spec.run import RunSpec
from vramplan.spec.trainable import LoraMethod


def check_run(run: RunSpec) -> None:
    """Raises:
    LegalityError: methods that do not go together.
    SpecError: a held-out set is named that the run does not have, evaluations are watched that it does not make, or
        the allocator has no such setting.
    """
    retain = run.retain
    if run.alloc_conf:
        AllocConf.parse(run.alloc_conf)
    if retain.kl is not None and run.loss == "liger":
        raise LegalityError("retain.kl needs the logits, which loss liger never makes: use loss hf, or l2sp or ewc")
    if run.loss != "hf" and (key := _needs_token_losses(run)) is not None:
        raise LegalityError(f"{key} weighs the loss of each token, and loss {run.loss} gives their mean alone: use hf")
    if retain.interpolate and isinstance(run.method, LoraMethod) and run.method.use_dora:
        raise LegalityError("retain.interpolate cannot scale DoRA's adapters: set method.use_dora false, or drop it")
    if run.training.patience is not None and run.training.best_on is None:
        raise SpecError("training.patience needs training.best_on, the held-out set that it watches: name one")
    wanted = {"training.best_on": run.training.best_on}
    if retain.early_stop is not None:
        wanted["retain.early_stop.set"] = retain.early_stop.set
    for key, name in wanted.items():
        if name is not None and name not in run.data.set_names:
            raise SpecError(_no_such_set(key, name, run.data.set_names))
    watchers = {"retain.early_stop": retain.early_stop, "training.patience": run.training.patience}
    watching = [key for key, value in watchers.items() if value is not None]
    if watching and run.training.eval_every is None:
        raise SpecError(
            f"{watching[0]} watches evaluations, of which there is one only, at the end: set training.eval_every"
        )


def _needs_token_losses(run: RunSpec) -> str | None:
    """The key for which the loss is taken from the logits in fp32 (``train/loss.py``, ``token_nll``), token by token:
    a loss that spares them would be planned for and not run."""
    if run.data.hard_examples is not None:
        return "data.hard_examples"
    return "weight_column" if any(source.weight_column is not None for source in run.data.sources) else None


def _no_such_set(key: str, name: str, known: tuple[str, ...]) -> str:
    near = nearest_names(name, known, count=1)
    asked = f"; did you mean {near[0]}?" if near else ""
    return (
        f"{key} is {name!r}, but the held-out sets are {', '.join(known) or 'none'}{asked} "
        f"(data.eval_frac gives held_out, data.replay.eval_frac replay, data.eval_sets any other)"
    )
