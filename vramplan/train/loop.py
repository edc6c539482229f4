"""The optimizer steps of a run: batches, forward, backward, step, and what happens between steps."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from vramplan.data.batch import Batch, collate, padded_length
from vramplan.data.dataset import RunData
from vramplan.data.hard import LossHistory
from vramplan.data.mixture import Stream
from vramplan.data.sample import Sample
from vramplan.data.sampler import micro_batches, rank_slice
from vramplan.errors import RunFailedError
from vramplan.measure.run_dir import RunDir
from vramplan.spec.data import HELD_OUT, REPLAY_SET
from vramplan.spec.run import RunSpec
from vramplan.train.checkpoint import load_step
from vramplan.train.engine import TrainEngine
from vramplan.train.evaluate import evaluate
from vramplan.train.in_place import InPlace, without_frames
from vramplan.train.metrics import Memory, Metrics
from vramplan.train.phases import PROBED_STEPS, Phases
from vramplan.train.pinned import pinned_loss
from vramplan.train.saving import Saving
from vramplan.train.schedule import learning_rate
from vramplan.train.seeds import seed_micro_batch
from vramplan.train.state import RunState
from vramplan.train.watch import Watch


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """One optimizer step's samples: ``ids`` of all ranks in order, and the target tokens of all of them."""

    ids: tuple[int, ...]
    length: int
    """Tokens to which every sequence of the step is padded, on every rank and in every micro-batch."""
    num_targets: int
    target_weight: float
    """Sum of the targets' weights; ``num_targets`` where nothing is weighted."""
    num_tokens: int
    """Without padding."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step gave; the loss is the mean over the global batch's target tokens."""

    loss: float
    lr: float
    seconds: float


class Loop:
    """Runs optimizer steps from ``state.step`` to its end. Every rank runs the same loop on its part of each batch."""

    def __init__(
        self,
        engine: TrainEngine,
        data: RunData,
        run_dir: RunDir,
        metrics: Metrics,
        phases: Phases,
        memory: Memory,
        pad_id: int,
        eval_sets: Mapping[str, Sequence[Sample]] | None = None,
    ) -> None:
        self.engine, self.data, self.run_dir = engine, data, run_dir
        self.metrics, self.phases, self.memory = metrics, phases, memory
        self.run: RunSpec = engine.run
        self.total_steps = total_steps(engine.run, data.stream)
        self._pad_id = pad_id
        self.mining = data.stream.mining
        self.watch = Watch(engine.run)
        self.saving = Saving(engine, run_dir, metrics)
        self.steps_done = 0
        self._step_s = 0.0
        self._in_place = InPlace(engine)
        self._micro_batch_size = engine.run.micro_batch_size or 1
        self.stopped = False
        """Whether an evaluation has ended the run."""
        every = {**(eval_sets or {}), REPLAY_SET: data.held_out_replay, HELD_OUT: data.held_out}
        most = engine.run.data.eval_max
        self._sets = {name: samples[:most] for name, samples in every.items() if len(samples)}

    def forbid_retries(self) -> None:
        """From now on out of memory ends the process, also where the step could be taken anew."""
        self._in_place.is_safe = False

    def step(self, step: int) -> StepResult:
        """Optimizer step ``step`` (from 0).

        Raises:
            RunFailedError: the loss is not finite.
        """
        started = time.perf_counter()
        batch = self._global_batch(step)
        lr = learning_rate(step, self.total_steps, self.run.peak_lr, self.run.training)
        own_loss = self._accumulate_in_place(step, batch)
        with self.phases.phase(f"{self._last_micro(step)}.optimizer_step", step + 1):
            self.engine.step(lr)
        (loss,) = self.engine.sum_over_ranks(own_loss)
        self._check_finite(loss, f"at step {step + 1}", batch.ids)
        result = StepResult(loss, lr, time.perf_counter() - started)
        self._step_s = result.seconds
        self._report(step, batch, result)
        return result

    def _check_finite(self, loss: float, when: str, ids: Sequence[int]) -> None:
        """Raises:
        RunFailedError: the loss is not finite; ``ids`` are the samples that it may be due to.
        """
        if math.isfinite(loss):
            return
        saved = any(self.run_dir.checkpoints.glob("step-*"))
        raise RunFailedError(
            f"the loss is {loss} {when} (samples {_name_samples(self.data.train, ids)}): lower optimizer.lr, or look "
            f"at these rows; {'the last checkpoint is from before it' if saved else 'there is no checkpoint yet'}"
        )

    def restore_losses(self, first_step: int) -> None:
        """The losses of the steps before ``first_step``, for hard examples; later ones go to the same file.

        Raises:
            CheckpointError: the file does not hold them.
        """
        if self.mining is None:
            return
        path = self.run_dir.sample_losses
        self.mining.history = LossHistory.read(path, first_step, batch_size(self.run, self.engine.dp_degree))
        self.engine.wait_for_all()
        if self.engine.rank == 0:
            self.mining.history.write_to(path)

    @property
    def has_held_out(self) -> bool:
        """Whether there is anything to evaluate on."""
        return bool(self._sets)

    def before_training(self) -> None:
        """What the base model makes of the named held-out sets: what retention is measured against."""
        if self._sets.keys() - {HELD_OUT} or self.run.retain.early_stop is not None:
            self.evaluate(0)

    def between_steps(self, steps_done: int) -> None:
        """Evaluation and checkpoint, where they are due after ``steps_done`` steps."""
        self.steps_done = steps_done
        is_last, is_best = steps_done == self.total_steps, False
        training = self.run.training
        if self._sets and (is_last or _due(steps_done, training.eval_every)):
            self.evaluate(steps_done)
            is_best = self.watch.best_step == steps_done
            self.stopped = self.watch.stop_reason is not None
        is_due = self.saving.checkpoint_is_due(steps_done, self._step_s)
        if is_last or is_best or self.stopped or is_due:
            self.save(steps_done)
        elif self.saving.snapshot_is_due(steps_done):
            with self.phases.phase("save", steps_done):
                self.saving.snapshot(self._state_to_save(steps_done))
            self.phases.evaluated("save", self.engine.take_largest_evaluated())
        if self.stopped and not is_last:
            self.metrics.event("note", text=f"stopped after step {steps_done}: {self.watch.stop_reason}")

    def return_to_best(self) -> None:
        """Loads the checkpoint that ``training.best_on`` asks for, if it is not where the run ended."""
        best = self.watch.best_step
        if best is not None:
            self.metrics.event("best", step=best)
        worse = self.watch.worse_than_before
        if worse is not None:
            self.metrics.event("note", text=worse)
        if best is not None and best != self.steps_done:
            path = load_step(self.engine, self.run_dir.checkpoints, best)
            self.metrics.event("note", text=f"the best checkpoint, of step {best}, is exported ({path})")

    def evaluate(self, steps_done: int) -> None:
        """The loss on every held-out set."""
        for name, samples in self._sets.items():
            self._evaluate(steps_done, name, samples)

    def _evaluate(self, steps_done: int, name: str, samples: Sequence[Sample]) -> None:
        with self.phases.phase("evaluation", steps_done):
            evaluation = evaluate(self.engine, samples, self._pad_id)
        self.phases.evaluated("evaluation", self.engine.take_largest_evaluated())
        perplexity = evaluation.perplexity
        self.watch.add(name, steps_done, evaluation.loss)
        self.metrics.event(
            "evaluation",
            step=steps_done,
            set=name,
            loss=evaluation.loss,
            perplexity=perplexity,
            num_targets=evaluation.num_targets,
        )
        prefix = "eval" if name == HELD_OUT else f"eval_{name}"
        self.metrics.scalars(steps_done, **{f"{prefix}__loss": evaluation.loss, f"{prefix}__perplexity": perplexity})

    def save(self, steps_done: int) -> None:
        """Writes a checkpoint."""
        with self.phases.phase("save", steps_done):
            self.saving.checkpoint(self._state_to_save(steps_done), self._step_s, self.watch.best_step)
        self.phases.evaluated("save", self.engine.take_largest_evaluated())

    def _state_to_save(self, steps_done: int) -> RunState:
        """Raises:
        RunFailedError: the last update broke the weights, which gradients can do whose loss was still finite.
        """
        loss = self.pinned_loss()
        ids = self.data.stream.batch(steps_done - 1, batch_size(self.run, self.engine.dp_degree))
        self._check_finite(loss, f"on the run's first samples after the update of step {steps_done}", ids)
        return replace(self.state(steps_done), pinned_loss=loss)

    def state(self, steps_done: int) -> RunState:
        """What a checkpoint after ``steps_done`` steps says of the run."""
        return RunState.of(
            self.run,
            step=steps_done,
            total_steps=self.total_steps,
            num_samples=len(self.data.train),
            world_size=self.engine.world_size,
        )

    def pinned_loss(self) -> float:
        """The loss of the weights as they are on the pinned batch."""
        return pinned_loss(self.engine, self.data.train, self._pad_id)

    def _accumulate_in_place(self, step: int, batch: GlobalBatch) -> torch.Tensor:
        """As ``_accumulate``; where memory runs out and it is safe, again with micro-batches of half the size."""
        self._in_place.begin_step()
        while True:
            try:
                return self._accumulate(step, batch)
            except (RuntimeError, MemoryError) as error:
                if not self._in_place.may_retry(error, self._micro_batch_size):
                    raise
                kind, message = without_frames(error)
            self._halve_micro_batches(step, kind, message)

    def _halve_micro_batches(self, step: int, kind: type[Exception], message: str) -> None:
        """Raises:
        kind: the failed pass is not wholly gone, so the process must end with what it met.
        """
        held = self._in_place.clean_up()
        if held:
            raise kind(f"{message}\n{held} bytes of the failed pass are still held")
        self.phases.stop_measuring()  # the record is of a run as planned
        self._micro_batch_size = -(-self._micro_batch_size // 2)
        self.metrics.event("halved", step=step, micro_batch_size=self._micro_batch_size, reason=message.splitlines()[0])

    def _accumulate(self, step: int, batch: GlobalBatch) -> torch.Tensor:
        """Forward and backward of each micro-batch of this rank; the sum of their parts of the loss."""
        engine, phases = self.engine, self.phases
        chunks = self._micro_batches(batch)
        total = torch.zeros((), dtype=torch.float64, device=engine.device)
        row_losses = torch.zeros(sum(map(len, chunks)), device=engine.device) if self.mining is not None else None
        start = 0
        for micro, chunk in enumerate(chunks):
            seed_micro_batch(self.run.training.seed, step, micro, engine.rank)
            tensors = self._tensors(step, chunk, batch.length)
            phases.hold(tensors, chunk)
            rows = None if row_losses is None else row_losses[start : start + len(chunk)]
            start += len(chunk)
            prefix = f"step{step + 1}.micro{micro + 1}"
            with phases.phase(f"{prefix}.forward", step + 1, micro + 1):
                loss = engine.forward(tensors, batch.target_weight, is_last=micro + 1 == len(chunks), row_losses=rows)
            with phases.phase(f"{prefix}.backward", step + 1, micro + 1):
                engine.backward(loss)
                total += loss.detach()
                del loss  # it holds the graph, and with it the embeddings' output where that is a leaf
        if self.mining is not None and row_losses is not None:
            self.mining.history.add(batch.ids, engine.gather(row_losses))
        return total

    def _tensors(self, step: int, chunk: tuple[int, ...], length: int) -> Batch:
        batch = collate(
            [self.data.shown(step, index) for index in chunk],
            length,
            self._pad_id,
            with_mask=self.run.attention_mask,
            with_weights=self.data.is_weighted or self.mining is not None,
        )
        return self.engine.own_stretch(batch)

    def _micro_batches(self, batch: GlobalBatch) -> list[tuple[int, ...]]:
        mine = rank_slice(batch.ids, self.engine.dp_rank, self.engine.dp_degree)
        return list(micro_batches(mine, self._micro_batch_size))

    def _last_micro(self, step: int) -> str:
        share = batch_size(self.run, self.engine.dp_degree) // self.engine.dp_degree
        return f"step{step + 1}.micro{-(-share // self._micro_batch_size)}"

    def _global_batch(self, step: int) -> GlobalBatch:
        train = self.data.train
        ids = self.data.stream.batch(step, batch_size(self.run, self.engine.dp_degree))
        samples = [self.data.shown(step, index) for index in ids] if self.data.worded else [train[i] for i in ids]
        # The measured steps are as long as the plan says, so memory's peak is met at once and not by a late long batch.
        padded = padded_length(samples, self.run.seq_len, self.engine.length_multiple)
        length = self.run.seq_len if step < PROBED_STEPS else padded
        num_tokens = sum(sample.num_tokens for sample in samples)
        num_targets = sum(sample.num_targets for sample in samples)
        target_weight = sum(sample.target_weight for sample in samples) if self.data.is_weighted else num_targets
        target_weight = target_weight or 1  # rows that all weigh 0 give no gradient
        return GlobalBatch(ids, length, num_targets, target_weight, num_tokens)

    def _report(self, step: int, batch: GlobalBatch, result: StepResult) -> None:
        done, training = step + 1, self.run.training
        if done % training.log_every and done != self.total_steps:
            self.metrics.event("samples", step=done, samples=_digest(batch.ids))  # the log of them has no gaps
            return
        grad_norm, tokens_per_s = self.engine.grad_norm(), batch.num_tokens / result.seconds
        self.metrics.event(
            "step",
            step=done,
            total_steps=self.total_steps,
            epoch=self.data.stream.epoch_of(step, len(batch.ids)),
            loss=result.loss,
            lr=result.lr,
            grad_norm=grad_norm,
            num_tokens=batch.num_tokens,
            num_targets=batch.num_targets,
            tokens_per_s=tokens_per_s,
            seconds=result.seconds,
            applied=self.engine.step_was_applied,
            samples=_digest(batch.ids),
            **self.memory.fields(),
        )
        self.metrics.scalars(
            done,
            train__loss=result.loss,
            train__lr=result.lr,
            train__grad_norm=grad_norm,
            speed__tokens_per_s=tokens_per_s,
        )


def total_steps(run: RunSpec, stream: Stream) -> int:
    """Optimizer steps of the whole run."""
    if run.training.max_steps is not None:
        return run.training.max_steps
    dp_degree = run.layout.dp if run.layout is not None else 1
    return stream.steps_of_epochs(run.training.epochs, batch_size(run, dp_degree))


def batch_size(run: RunSpec, dp_degree: int) -> int:
    """Sequences of one optimizer step over all ranks."""
    if run.global_batch_size is not None:
        return run.global_batch_size
    return (run.micro_batch_size or 1) * (run.grad_accum_steps or 1) * dp_degree


def _due(steps_done: int, every: int | None) -> bool:
    return every is not None and steps_done % every == 0


def _digest(ids: tuple[int, ...]) -> str:
    """A short proof of which samples a step saw, in which order."""
    return hashlib.blake2b(repr(ids).encode(), digest_size=8).hexdigest()


def _name_samples(samples: Sequence[Sample], ids: Sequence[int], most: int = 8) -> str:
    names = ", ".join(samples[index].where for index in ids[:most])
    return names if len(ids) <= most else f"{names} and {len(ids) - most} more"
