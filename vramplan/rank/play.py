"""A job as records are measured: load, engine, then forward, backward and step of each micro-batch."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from vramplan.emit.deepspeed import ds_config
from vramplan.rank.group import join_fake_group, sequence_parallel_group, take_shards_as_told
from vramplan.rank.model import build_model, leave_undefined
from vramplan.rank.optimizer import client_optimizer, trained_groups
from vramplan.rank.plain import PlainEngine
from vramplan.rank.retention import PlayedRetention, anchored_penalties, frozen_copy, needs_copy, plain_base
from vramplan.retain.base_model import BaseModel
from vramplan.spec.layout import Layout
from vramplan.spec.run import RunSpec

PhaseContext = Callable[[str], AbstractContextManager[None]]
"""Given a phase's name, what is to be entered around it."""


@dataclass(slots=True)
class Played:
    """What a played job tells of itself."""

    numel_total: int = 0
    numel_trainable: int = 0
    seconds_per_step: float = 0.0
    """Of the last step played."""


@dataclass
class RankPlayer:
    """Plays rank 0 of ``layout`` for a closed run, each phase inside ``phase(name)``.

    ``managed``: DeepSpeed counts micro-batches and ``engine.step()`` is called after each one (as in the records);
    else the loop steps after the last. What is known so far is in ``played``, also when a phase fails.
    """

    run: RunSpec
    layout: Layout
    phase: PhaseContext
    device: str = "cpu"
    steps: int = 2
    managed: bool = True
    padded: bool = False
    """Whether a padding mask that is passed hides something: each sequence's last token."""
    undefined_weights: bool = False
    """Whether weights that ZeRO-3 splits are left undefined."""
    halved_weights: bool = False
    """Whether weights that ZeRO-3 splits are made in bf16, as in some records (``measure/record.py``)."""
    on_model: Callable[[torch.nn.Module], None] = lambda model: None
    """Told the model when it is built, before the engine."""

    def __post_init__(self) -> None:
        self.played = Played()
        self.model: torch.nn.Module | None = None
        self.engine: Any = None
        self.retention: PlayedRetention | None = None
        self.reference: Any = None
        """The frozen copy of the base that KL asks, if it needs one."""

    def play(self) -> Played:
        join_fake_group(self.layout.world_size)
        config = self._engine_config()
        with self.phase("model_load"):
            self.model = build_model(self.run, config, self.device, halved=self.halved_weights)
        if self.undefined_weights:
            leave_undefined(self.model)
        self._count(self.model)
        self.on_model(self.model)
        with self.phase("engine_init"):
            # weights that ZeRO-3 has cut hold methods of their own, cycles that only a collection frees: a tied head's
            # part would else go whenever Python happens to collect, or never
            gc.collect()
            self.retention = self._retention(self.model, config)
            self.engine = self._initialize(self.model, config)
            if self.run.retain.kl is not None:
                autocast = self.run.precision == "bf16-autocast"
                self.retention.base = BaseModel(self.engine, self.reference, autocast=autocast)
        if self.retention.springs is not None:
            with self.phase("retention"):
                self._start_springs(self.retention)
        for step in range(1, self.steps + 1):
            started = time.perf_counter()
            for micro in range(1, (self.run.grad_accum_steps or 1) + 1):
                self._micro_batch(f"step{step}.micro{micro}", is_last=micro == self.run.grad_accum_steps)
            self.played.seconds_per_step = time.perf_counter() - started
        return self.played

    def _retention(self, model: torch.nn.Module, config: dict[str, Any]) -> PlayedRetention:
        """What is made before the engine: the frozen copy of the base, and the springs' hooks."""
        if needs_copy(self.run):
            base = build_model(plain_base(self.run), config, halved=self.halved_weights)
            self.reference = frozen_copy(self.run, base, config, self.device)
        springs = anchored_penalties(self.run, model, 0, self.layout.world_size)
        return PlayedRetention(self.run, self.layout.world_size, springs)

    def _start_springs(self, retention: PlayedRetention) -> None:
        """As ``train/retention.py``, ``start_penalties``: sequences of the Fisher diagonal are whole."""
        assert retention.springs is not None
        retention.springs.anchor()
        if not retention.samples_fisher:
            return
        for _ in range(retention.num_samples()):
            batch = self._batch(1)
            retention.springs.begin_sample(float(self.layout.world_size), counts=True)
            if self.managed:
                self.engine.set_gradient_accumulation_boundary(False)
            self.engine.backward(self.engine(**batch).loss)
        retention.springs.end_samples()
        if self.managed:
            self.engine.set_gradient_accumulation_boundary(None)

    def _engine_config(self) -> dict[str, Any]:
        """DeepSpeed's config; empty for plain PyTorch, which counts micro-batches as DeepSpeed does."""
        if self.run.engine == "torch":
            self.managed = True
            return {}
        config = ds_config(self.run, self.layout.world_size)
        if self.managed:
            config["managed_gradient_accumulation"] = True
        self.managed = config["managed_gradient_accumulation"]
        config["steps_per_print"] = 2**31
        return config

    def _initialize(self, model: torch.nn.Module, config: dict[str, Any]) -> Any:
        if self.run.engine == "torch":
            return PlainEngine(self.run, model, self.layout.world_size, self.device)
        import deepspeed

        mpu = sequence_parallel_group(self.layout, model, self.run.attention, self.run.micro_batch_size or 1)
        trainable = trained_groups(self.run, model)
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=trainable,
            optimizer=client_optimizer(self.run, trainable),
            config=config,
            mpu=mpu,
        )
        if self.layout.tp > 1:  # it compares batches by a sum over ranks, none of which is there
            engine.first_dataloader_check.remove()
            take_shards_as_told()
        return engine

    def _micro_batch(self, prefix: str, *, is_last: bool) -> None:
        assert self.retention is not None
        batch = self._batch(self.run.micro_batch_size or 1)
        with self.phase(f"{prefix}.forward"):
            base_logits = self.retention.base_logits(batch)
            output = self.engine(**batch)
            loss = output.loss
            if base_logits is not None:
                loss = loss + self.retention.divergence(output.logits, base_logits, batch["labels"])
            del base_logits
            if not self.run.keep_outputs:
                del output  # as the trainer, which keeps the loss alone
        with self.phase(f"{prefix}.backward"):
            self.retention.before_backward(is_last=is_last)
            self.engine.backward(loss)
            del loss  # a loop goes on with its detached value; the graph stays only with the output
        with self.phase(f"{prefix}.optimizer_step"):
            if self.managed or is_last:
                self.engine.step()

    def _batch(self, num_sequences: int) -> dict[str, Any]:
        vocab_size = self.engine.module.config.vocab_size
        local_len = self.run.seq_len // self.layout.sp
        shape = (num_sequences, local_len)
        input_ids = torch.randint(0, vocab_size, shape, device=self.device)
        batch: dict[str, Any] = {"input_ids": input_ids, "labels": input_ids.clone(), "use_cache": False}
        if self.run.attention_mask:
            batch["attention_mask"] = torch.ones_like(input_ids)
            if self.padded:
                batch["attention_mask"][:, -1] = 0
        if self.run.data.packing != "none":
            half = -(-local_len // 2)  # two documents
            batch["position_ids"] = torch.arange(local_len, device=self.device).remainder(half).repeat(shape[0], 1)
        elif self.layout.sp > 1:
            batch["position_ids"] = torch.arange(local_len, device=self.device).expand(shape)
        return batch

    def _count(self, model: torch.nn.Module) -> None:
        for param in model.parameters():
            numel = getattr(param, "ds_numel", param.numel())
            self.played.numel_total += numel
            self.played.numel_trainable += numel * param.requires_grad
