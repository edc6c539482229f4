"""Rank 0 of a process group of any size, alone in its process."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

from vramplan.errors import SpecError
from vramplan.spec.layout import Layout


def join_fake_group(world_size: int) -> None:
    """Makes this process rank 0 of ``world_size`` ranks, in torch and in DeepSpeed.

    Collectives of torch's ``fake`` process group do nothing, so DeepSpeed allocates every buffer that rank 0 would
    hold, and nobody else need exist. A process joins once.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        if dist.get_world_size() != world_size:
            raise SpecError(
                f"this process is already one of {dist.get_world_size()} ranks and cannot play one of {world_size}: "
                "start another process"
            )
        return
    # Rank 0 alone: no launcher set these, and DeepSpeed reads them. MASTER_* are never connected to.
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world_size), LOCAL_SIZE="1", LOCAL_WORLD_SIZE="1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    import deepspeed
    import deepspeed.comm.torch

    # On the CPU DeepSpeed opens shared memory with the other local ranks and waits for them.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False, verbose=False)


def sequence_parallel_group(layout: Layout, model: torch.nn.Module, attention: str, micro_batch_size: int) -> object:
    """Ulysses' parallel state (``mpu``), with the model's attention routed through it; None where ``sp`` is 1."""
    if layout.sp == 1:
        return None
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    return UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model,
        core_attn_implementation=attention,
        sequence_parallel_size=layout.sp,
        micro_batch_size=micro_batch_size,
        seq_length_is_variable=True,
    )
