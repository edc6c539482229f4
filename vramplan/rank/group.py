"""Rank 0 of a process group of any size, alone in its process."""

from __future__ import annotations

import inspect
import os
import sys
from typing import Any

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
    """Ulysses' parallel state (``mpu``), with the model's attention routed through it; None where ``sp`` is 1.

    A process registers once. Batches may have any size: ``micro_batch_size`` is but the first.
    """
    if layout.sp == 1:
        return None
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    text_config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    if getattr(text_config, "head_dim", 0) is None:  # Mixtral's; Ulysses takes the field as it is
        text_config.head_dim = text_config.hidden_size // text_config.num_attention_heads
    state: object = UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model,
        core_attn_implementation=attention,
        sequence_parallel_size=layout.sp,
        micro_batch_size=micro_batch_size,
        seq_length_is_variable=True,
    )
    _take_any_batch(attention)
    return state


def _take_any_batch(attention: str) -> None:
    """Ulysses holds every call to the batch size of its registration (ulysses_sp.py, ``UlyssesSPAttentionHF.forward``),
    but the last micro-batch may be smaller and an evaluation's differ: it is told each call's."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    registered = ALL_ATTENTION_FUNCTIONS[attention]
    ulysses = inspect.getclosurevars(registered).nonlocals["uattn"]

    def of_this_batch(module: torch.nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        ulysses.batch_size = query.shape[0]
        for name in ("required_query_shape", "required_key_value_shape", "required_context_shape"):
            length, _, *rest = getattr(ulysses, name)
            setattr(ulysses, name, torch.Size([length, query.shape[0], *rest]))
        return registered(module, query, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[attention] = of_this_batch


def take_shards_as_told() -> None:
    """DeepSpeed's loss over a split vocabulary asks every rank of a tensor-parallel group where its share lies
    (sequence/cross_entropy.py, ``_validate_vocab_shard_bounds``); in a fake group nobody answers, and every share is
    taken to be as large as this rank's."""
    import deepspeed.sequence.cross_entropy as cross_entropy

    def whole_vocabulary(local_size: int, start: int, end: int, group: Any, device: Any) -> int:
        return local_size * dist.get_world_size(group)

    cross_entropy._validate_vocab_shard_bounds = whole_vocabulary
