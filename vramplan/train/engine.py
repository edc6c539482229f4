"""DeepSpeed's engine behind the few calls that the loop makes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from vramplan.data.batch import IGNORED, Batch
from vramplan.emit.deepspeed import managed_accumulation
from vramplan.errors import LegalityError
from vramplan.rank.group import sequence_parallel_group
from vramplan.rank.optimizer import client_optimizer, trained_groups
from vramplan.rank.retention import anchored_penalties
from vramplan.retain.base_model import BaseModel
from vramplan.retain.kl import kl_to_base
from vramplan.spec.layout import Layout
from vramplan.spec.run import RunSpec
from vramplan.train.host_adam import forget_powers
from vramplan.train.layout import check_layout
from vramplan.train.loss import batch_loss, takes_num_targets
from vramplan.train.mapped import free_mapped_files


def join_group(run: RunSpec) -> torch.device:
    """Joins the ranks that the launcher started; gives this rank's device.

    Raises:
        LegalityError: what the trainer does not run: tensor or pipeline parallel layouts, states in files.
    """
    check_layout(run)
    if "nvme" in (run.zero.offload_optimizer, run.zero.offload_param):
        raise LegalityError(
            "zero.offload_*: nvme is counted but not trained: checkpoints here do not read states out of DeepSpeed's "
            "swap files; set cpu"
        )
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    device = torch.device("cpu")
    if accelerator.device_name() != "cpu":
        local_rank = int(os.environ["LOCAL_RANK"])
        accelerator.set_device(local_rank)
        device = torch.device(accelerator.device_name(), local_rank)
    deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), verbose=False)
    return device


class TrainEngine:
    """One rank's engine. Every rank makes the same calls in the same order.

    Ranks in a row, as many as ``layout.sp``, hold stretches of the same sequences: rank ``r`` is the ``r % sp``-th of
    data-parallel group ``r // sp`` (deepspeed's parallel_state_sp.py, ``initialize_sequence_parallel``).
    """

    def __init__(
        self, run: RunSpec, module: Any, config: dict[str, Any], device: torch.device, reference: Any | None = None
    ) -> None:
        import deepspeed

        self.run = run
        self.device = device
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        layout = run.layout or Layout(dp=self.world_size)
        self.sp_degree = layout.sp
        self.dp_degree = self.world_size // self.sp_degree
        """Parts that a global batch is cut into."""
        self.dp_rank = self.rank // self.sp_degree
        # Summed within a group and averaged over groups (stage_1_and_2.py:1508 and 1688, engine.py:3884), but stage 3's
        # reduce-scatter averages over all ranks (runtime/comm/coalesced_collectives.py:124).
        self._averaged_over = self.world_size if run.zero.stage == 3 else self.dp_degree
        self.penalties = anchored_penalties(run, module, self.rank, self.world_size)
        trained = trained_groups(run, module)
        free_mapped_files(run, module, trained)
        # Built before initialize, which may cast the module: the loss reads no dtype.
        self._divides_sum = takes_num_targets(module)
        self.deepspeed, *_ = deepspeed.initialize(
            model=module,
            model_parameters=trained,
            optimizer=client_optimizer(run, trained),
            config=config,
            mpu=sequence_parallel_group(layout, module, run.attention, run.micro_batch_size or 1),
        )
        forget_powers(self.deepspeed.basic_optimizer, device)
        self.deepspeed.train()  # from_pretrained gives a model that evaluates: no dropout, no checkpointing
        self.base = None
        if run.retain.kl is not None:
            self.base = BaseModel(self.deepspeed, reference, autocast=run.precision == "bf16-autocast")
        self._sampling = False
        self._largest_evaluated = (0, 0)
        self._managed = managed_accumulation(run)
        self._half_without_zero = run.precision in ("bf16", "fp16") and not run.zero.stage
        if self._half_without_zero:
            self._take_back_first_step()

    @property
    def module(self) -> Any:
        """The model inside (PEFT's wrapper where adapters are trained)."""
        return self.deepspeed.module

    def own_stretch(self, batch: Batch) -> Batch:
        """What this rank holds of its group's sequences, on its device: all of them without sequence parallelism."""
        return batch.stretch(self.rank % self.sp_degree, self.sp_degree).to(self.device)

    @property
    def length_multiple(self) -> int:
        """Of what padded sequences' lengths are multiples: stretches of 8 tokens, which matrix units like."""
        return 8 * self.sp_degree

    def forward(
        self,
        batch: Batch,
        target_weight: float,
        *,
        is_last: bool = True,
        row_losses: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """This micro-batch's part of the global batch's loss (a scalar with its graph); ``is_last``: the step follows
        its backward; ``row_losses``: as in ``batch_loss``."""
        if not self.module.training:
            shape = batch.input_ids.shape[0], batch.input_ids.shape[1] * self.sp_degree
            self._largest_evaluated = max(self._largest_evaluated, shape, key=lambda each: each[0] * each[1])
        if self._managed and self.module.training:
            self.deepspeed.set_gradient_accumulation_boundary(is_last)
        training = self.module.training
        if self.penalties is not None and training and not self._sampling:
            self.penalties.gradient_scale = self._averaged_over * self.loss_scale() if is_last else 0.0
            self.penalties.penalty = 0.0
        if self.base is None or not training or self._sampling:
            return batch_loss(
                self.deepspeed, batch, target_weight, divides_sum=self._divides_sum, row_losses=row_losses
            )
        assert self.run.retain.kl is not None
        base_logits = self.base.logits(batch.inputs())
        return batch_loss(
            self.deepspeed,
            batch,
            target_weight,
            divides_sum=self._divides_sum,
            extra=lambda logits: self._kl(logits, base_logits, batch, target_weight),
            row_losses=row_losses,
        )

    def _kl(self, logits: torch.Tensor, base_logits: torch.Tensor, batch: Batch, target_weight: float) -> torch.Tensor:
        assert self.run.retain.kl is not None
        counted = batch.predicted() != IGNORED  # a token's logits predict the next one
        return kl_to_base(logits, base_logits, counted) * (self.run.retain.kl.weight / target_weight)

    @contextmanager
    def sampling_fisher(self) -> Iterator[None]:
        """Inside, backwards are samples for the Fisher diagonal and reach no optimizer."""
        self._sampling = True
        try:
            yield
        finally:
            self._sampling = False

    def take_largest_evaluated(self) -> tuple[int, int]:
        """Sequences and their whole length (however many ranks share each) of the largest forward of evaluations since
        this was last asked."""
        taken, self._largest_evaluated = self._largest_evaluated, (0, 0)
        return taken

    def retention_bytes(self) -> int:
        """Bytes that methods against forgetting keep on this rank."""
        return sum(each.state_bytes() for each in (self.penalties, self.base) if each is not None)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of one part of the loss."""
        # DeepSpeed averages what must be a sum: the parts are divided by all tokens already
        self.deepspeed.backward(loss * self._averaged_over * self._missing_loss_scale(), scale_wrt_gas=False)

    def step(self, lr: float) -> None:
        """Reduces, clips and applies the gradients at rate ``lr``."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_share", 1.0)
        self.deepspeed.step()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients and no dropout inside."""
        self.deepspeed.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.deepspeed.train()

    def grad_norm(self) -> float | None:
        """Norm of the last step's gradients before clipping; None where DeepSpeed keeps none (ZeRO 0 in fp32)."""
        norm = self.deepspeed.get_global_grad_norm()
        return None if norm is None else float(norm)

    @property
    def step_was_applied(self) -> bool:
        """False when fp16's loss scaling met an overflow and left the weights alone."""
        return bool(self.deepspeed.was_step_applied())

    def sum_over_ranks(self, *values: torch.Tensor) -> list[float]:
        """The sum over all ranks of each scalar."""
        stacked = torch.stack([value.detach().to(torch.float64) for value in values])
        dist.all_reduce(stacked)
        return [float(value) for value in stacked]

    def gather(self, values: torch.Tensor) -> list[float]:
        """The vectors of all data-parallel groups, of equal length, laid end to end; within a group they are summed."""
        shares = [torch.zeros_like(values) for _ in range(self.world_size)]
        dist.all_gather(shares, values)
        groups = torch.stack(shares).view(self.dp_degree, self.sp_degree, -1).sum(1)
        return [float(value) for value in groups.flatten()]

    def wait_for_all(self) -> None:
        """Returns when every rank has come here."""
        dist.barrier()

    def loss_scale(self) -> float:
        """What the loss is multiplied with before backward, besides the ranks: more than 1 for fp16 only."""
        if self._half_without_zero:
            return self._missing_loss_scale()
        return float(self.deepspeed.optimizer.loss_scale) if self.run.precision == "fp16" else 1.0

    def _missing_loss_scale(self) -> float:
        """1, but for fp16 without ZeRO: DeepSpeed 0.19.8 divides the gradients by its loss scale in the step
        (runtime/fp16/fused_optimizer.py), while ``engine.backward`` multiplies only the losses of ZeRO's optimizers."""
        return float(self.deepspeed.optimizer.loss_scale_config.cur_scale) if self._half_without_zero else 1.0

    def _take_back_first_step(self) -> None:
        """Half precision without ZeRO: DeepSpeed 0.19.8 makes the optimizer's states by a step with zero gradients
        (``initialize_optimizer_states``), which counts for Adam's bias correction and decays the master weights. The
        other stages make no such step, and the stage must not change the training."""
        wrapper = self.deepspeed.optimizer
        wrapper.refresh_fp32_params()
        for state in (*wrapper.optimizer.state.values(), *wrapper.optimizer.param_groups):
            if "step" in state:
                state["step"] = state["step"] * 0
            if "momentum_buffer" in state:  # SGD's has the decay in it
                state["momentum_buffer"].zero_()
