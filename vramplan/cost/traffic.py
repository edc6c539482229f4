"""Bytes that one rank sends to the others and to the host in one optimizer step, by ZeRO stage and offload."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from vramplan.cost.work import trainable_numel
from vramplan.facts.architecture import Architecture, Attention
from vramplan.spec.layout import Layout, shard
from vramplan.spec.run import RunSpec

_WEIGHT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "bf16-autocast": 4, "bf16-weights-autocast": 2}
_GRADIENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "bf16-autocast": 2, "bf16-weights-autocast": 2}
"""Width on the wire; under autocast linears' gradients travel in bf16 (deepspeed/runtime/torch_autocast.py)."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes and collectives of one rank in one optimizer step, all its micro-batches together."""

    backward_bytes: float
    """Over the links, in forward and backward."""
    step_bytes: float
    """Over the links, at the optimizer step."""
    num_collectives: int
    num_hooks: int
    """Modules that ZeRO-3 fetches and releases, each pass of each micro-batch."""
    host_bytes: float
    """Between device and host, both directions together."""

    @property
    def link_bytes(self) -> float:
        return self.backward_bytes + self.step_bytes


def step_traffic(run: RunSpec, architecture: Architecture) -> Traffic:
    """The traffic of a closed run, following deepspeed 0.19.8.

    Stages 1 and 2 all-reduce whole buckets although each rank keeps a part (``allreduce_and_scatter`` with
    ``use_multi_rank_bucket_allreduce``, stage_1_and_2.py). Stage 2 does so in every micro-batch, stages 0 and 1 once a
    step. Stage 3 gathers weights in forward and in backward of every micro-batch and reduce-scatters gradients; with
    checkpointing the weights gathered to recompute a layer serve its backward (``max_reuse_distance``). Under sequence
    parallelism gradients travel in fp32 (runtime/config.py, ``seq_parallel_communication_data_type``).
    """
    layout, accum = run.layout or Layout(), run.grad_accum_steps or 1
    ring = (layout.zero_degree - 1) / layout.zero_degree
    gradient_bytes = 4 if layout.sp > 1 else _GRADIENT_BYTES[run.precision]
    gradients = trainable_numel(run, architecture) / layout.tp * gradient_bytes * ring
    updated = trainable_numel(run, architecture) / layout.tp * _WEIGHT_BYTES[run.precision] * ring
    weights = _weight_bytes(run, architecture) / layout.tp * ring
    stage = run.zero.stage or 0
    if stage == 3:
        backward, step = accum * (2 * weights + gradients), 0.0
    else:
        backward = 2 * gradients * (accum if stage == 2 else 1)
        step = updated if stage else 0.0
    hooks = accum * 2 * _num_modules(architecture) if stage == 3 else 0
    buckets = max(1, round((backward + step) / (2 * run.zero.reduce_bucket_size)))
    exchanged, exchanges = _exchanges(run, architecture, layout)
    return Traffic(
        backward_bytes=backward + accum * exchanged,
        step_bytes=step,
        num_collectives=0 if layout.zero_degree == 1 else (hooks + buckets + accum * exchanges),
        num_hooks=hooks,
        host_bytes=_host_bytes(run, architecture, layout, accum),
    )


def _exchanges(run: RunSpec, architecture: Architecture, layout: Layout) -> tuple[float, int]:
    """(bytes, collectives) of one micro-batch under sequence parallelism: queries, keys, values and outputs change
    hands in each layer's forward, recomputation and backward, and positions are gathered but in backward
    (deepspeed/runtime/sequence_parallel/ulysses_sp.py, ``UlyssesSPAttentionHF.forward``)."""
    if layout.sp == 1:
        return 0.0, 0
    tokens = (run.micro_batch_size or 1) * shard(run.seq_len, layout.sp)
    width = 2 if run.precision != "fp32" else 4
    mixers = [layer.mixer for layer in architecture.layers if isinstance(layer.mixer, Attention)]
    # key/value heads are repeated where the ranks are more
    elements = sum(2 * each.head_dim * (each.num_heads + max(each.num_kv_heads, layout.sp)) for each in mixers)
    passes = 2 + (run.activation_checkpointing == "full")
    sent = tokens * elements * width * passes * (layout.sp - 1) / layout.sp
    return sent, len(mixers) * (4 * passes + passes - 1)


def _weight_bytes(run: RunSpec, architecture: Architecture) -> float:
    """Bytes of all weights as ZeRO-3 gathers them: those in 4 bits are packed two to a byte."""
    width = _WEIGHT_BYTES[run.precision]
    whole = architecture.num_params * width
    if run.method.kind != "qlora":
        return whole
    return whole - _packed_numel(architecture) * (width - 0.5)


@lru_cache(maxsize=64)
def _packed_numel(architecture: Architecture) -> int:
    return sum(linear.weight_numel for _, linear in architecture.named_linears() if not linear.by_matmul)


def _host_bytes(run: RunSpec, architecture: Architecture, layout: Layout, accum: int) -> float:
    """Bytes over PCIe: gradients down and updated weights up for an offloaded optimizer, and, for offloaded weights,
    this rank's part up in each of forward and backward."""
    owned = shard(trainable_numel(run, architecture), layout.zero_degree * layout.tp)
    total = 0.0
    if run.zero.offload_optimizer in ("cpu", "nvme"):
        # stage 2 adds up on the GPU what it keeps on the host: down and up again (async_accumulate_grad_in_cpu_via_gpu)
        copies = (2 * accum - 1 if run.zero.stage == 2 else 1) if run.zero.stage != 3 else accum
        total += owned * (copies * _GRADIENT_BYTES[run.precision] + _WEIGHT_BYTES[run.precision])
    if run.zero.offload_param in ("cpu", "nvme"):
        total += 2 * accum * _weight_bytes(run, architecture) / (layout.zero_degree * layout.tp)
    return total


@lru_cache(maxsize=64)
def _num_modules(architecture: Architecture) -> int:
    """Modules with weights of their own: each linear and norm, the embeddings, the head."""
    per_layer = {id(layer): len(layer.norms) + sum(1 for _ in layer.linears()) for layer in architecture.layers}
    return sum(per_layer[id(layer)] for layer in architecture.layers) + len(architecture.embeddings) + 2
