"""TrainingSpec: how long, how fast, and what is written down."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vramplan.spec.base import UserModel


class LmEvalSpec(UserModel):
    """Tasks of EleutherAI's lm-evaluation-harness (``lm_eval``), given to the finished, saved and reloaded model in a
    process of its own."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of tasks or groups, as ``lm-eval ls tasks`` lists them; ``*`` stands for any letters."""
    include_path: str | None = None
    """A directory with tasks of one's own in YAML, as ``lm_eval`` reads it; Python functions that they name are run.
    Relative to where the command runs, as are the ``data_files`` of a task."""
    limit: float | None = Field(default=None, gt=0)
    """Examples of each task; below 1 a share of them. None: all."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Solved examples before each question. None: as each task has it."""
    batch_size: int | None = Field(default=None, ge=1)
    """Sequences of one forward. None: as in the run's evaluations, else as in training."""
    chat_template: bool = False
    """Whether questions are put as messages, in the tokenizer's chat template."""


class TrainingSpec(UserModel):
    """The loop: steps, schedule, seeds, evaluation and checkpoints."""

    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps. None: ``epochs`` over the data."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the data when ``max_steps`` is None."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after warm-up, by optimizer step."""
    warmup_frac: float = Field(default=0.03, ge=0.0, le=1.0)
    """Share of the steps over which the rate rises from zero."""
    min_lr_frac: float = Field(default=0.0, ge=0.0, le=1.0)
    """Rate at the end as a share of the peak."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this global norm; 0 switches clipping off."""
    seed: int = 0
    """Decides data order, dropout and adapters' initial values."""
    eval_every: int | None = Field(default=None, ge=1)
    """Optimizer steps between evaluations. None: at the end only."""
    eval_micro_batch_size: int | None = Field(default=None, ge=1)
    """Sequences of one rank's forward in an evaluation. None: as in training."""
    save_every: int | None = Field(default=None, ge=1)
    """Optimizer steps between checkpoints. None: so many that failures cost at most 1% of the time in lost work, and
    writing no more than that is worth (``hours_between_failures``)."""
    hours_between_failures: float = Field(default=24.0, gt=0)
    """Mean time between failures that the spacing of checkpoints reckons with. ASSUMED: one a day."""
    snapshot_every: int | None = Field(default=None, ge=1)
    """Optimizer steps between snapshots in shared memory (/dev/shm), which outlive the run's processes and cost host
    memory instead of time; one node only. None: none are written."""
    best_on: str | None = None
    """The held-out set (``held_out``, ``replay``, or a name of ``data.eval_sets``) whose lowest loss marks the best
    checkpoint, which is kept and exported; where ``retain.early_stop`` says how much may be forgotten, a step that
    forgot more is the best only if every one did. None: the last is."""
    patience: int | None = Field(default=None, ge=1)
    """Evaluations in a row without a new lowest loss on ``best_on``'s set that end the run. None: it is never ended for
    that."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints kept."""
    log_every: int = Field(default=1, ge=1)
    """Optimizer steps between log lines."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Where curves are shown, beside ``metrics.jsonl``, which is always written. ``wandb`` and ``mlflow`` must be
    installed; their own variables (``WANDB_MODE``, ``MLFLOW_TRACKING_URI``) say where they write."""
    project: str = "vramplan"
    """Project (W&B) or experiment (MLflow) that the run belongs to."""
    trust_remote_code: bool = False
    """Whether code from a model's directory may run."""
    allow_pickle: bool = False
    """Whether weights may be read from pickles (``pytorch_model*.bin``) where a model has none as safetensors; torch
    then unpickles nothing but tensors."""
    sample: str | None = None
    """A question that the finished, saved and reloaded model answers at the end."""
    sample_tokens: int = Field(default=64, ge=1)
    """Longest answer, in tokens."""
    lm_eval: LmEvalSpec | None = None
    """Benchmark tasks after training; needs ``vramplan[eval]``. None: none."""
    merge_adapters: bool = False
    """Whether adapters are also merged into the weights at the end (a full model next to the adapters)."""
