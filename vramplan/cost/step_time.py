"""Seconds of one optimizer step: a roofline that ranks plans (its rates are in ``assumed.py``)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from vramplan.cost import assumed
from vramplan.cost.traffic import Traffic, step_traffic
from vramplan.cost.work import TokenWork, token_work, trainable_numel, training_flops
from vramplan.facts.architecture import Architecture
from vramplan.facts.device import Device, Node
from vramplan.spec.layout import Layout, shard
from vramplan.spec.run import RunSpec


@dataclass(frozen=True, slots=True)
class StepTime:
    """Where the seconds of one optimizer step go."""

    compute_s: float
    """Forward, backward and recomputation of all micro-batches."""
    communication_s: float
    """Collectives and ZeRO-3's hooks."""
    offload_s: float
    """Copies between device and host."""
    optimizer_s: float

    @property
    def total_s(self) -> float:
        return self.compute_s + self.communication_s + self.offload_s + self.optimizer_s


@dataclass(frozen=True)
class CostModel:
    """The step time of every way to close one run; what all ways share is worked out once."""

    run: RunSpec
    node: Node
    architecture: Architecture

    @cached_property
    def work(self) -> TokenWork:
        return token_work(self.run, self.architecture)

    @cached_property
    def trainable_numel(self) -> int:
        return trainable_numel(self.run, self.architecture)

    def step_time(self, closed: RunSpec) -> StepTime:
        """The step time of ``closed``: ``run`` with its open fields filled in."""
        traffic = step_traffic(closed, self.architecture)
        compute = (closed.grad_accum_steps or 1) * self._micro_batch_s(closed)
        return StepTime(
            compute_s=compute,
            communication_s=self._communication_s(traffic),
            offload_s=traffic.host_bytes / _host_link_bandwidth(self.node.device),
            optimizer_s=self._optimizer_s(closed),
        )

    def _micro_batch_s(self, closed: RunSpec) -> float:
        """One micro-batch's forward, backward and recomputation on one rank."""
        layout, work, device = closed.layout or Layout(), self.work, self.node.device
        tokens = (closed.micro_batch_size or 1) * shard(closed.seq_len, layout.sp)
        recompute = self._recomputed_frac(closed)
        flops = training_flops(work, full=closed.method.kind == "full", checkpointing=recompute)
        peak = _peak_flops(device, closed.precision)
        filled = tokens / (tokens + assumed.MATMUL_HALF_TOKENS)
        matmul_s = tokens * flops.matmul / layout.tp / (peak * assumed.MATMUL_EFFICIENCY * filled)
        attention_s = tokens * flops.attention / layout.tp / (peak * assumed.ATTENTION_EFFICIENCY)
        passes = 1 + assumed.BACKWARD_TRAFFIC_FACTOR
        moved = tokens * (work.layer_bytes * (passes + recompute) + work.head_bytes * passes)
        moved += self._dequantized_bytes(closed, 2 + recompute)
        moved_s = moved / (_memory_bandwidth(device) * assumed.BANDWIDTH_EFFICIENCY)
        launches = self.architecture.num_layers * assumed.KERNELS_PER_LAYER * (passes + recompute)
        return max(matmul_s + attention_s + moved_s, launches * assumed.LAUNCH_S)

    def _recomputed_frac(self, closed: RunSpec) -> float:
        """The share of the layers that checkpointing runs again."""
        if closed.activation_checkpointing != "full":
            return 0.0
        num_layers = self.architecture.num_layers
        return -(-num_layers // closed.checkpoint_every) / num_layers

    def _dequantized_bytes(self, closed: RunSpec, passes: float) -> float:
        """QLoRA writes and reads each weight in the compute format, in each pass (bitsandbytes, MatMul4Bit)."""
        if closed.method.kind != "qlora":
            return 0.0
        return passes * self.work.layer_flops / 2 * (0.5 + 2 + 2)

    def _communication_s(self, traffic: Traffic) -> float:
        """Collectives in full: how much of them ``overlap_comm`` hides differs widely, and counted in full the stages
        keep the order of their bytes."""
        seconds = traffic.link_bytes / link_bandwidth(self.node)
        on_cpu = self.node.device.kind == "cpu"
        latency = assumed.CPU_COLLECTIVE_LATENCY_S if on_cpu else assumed.COLLECTIVE_LATENCY_S
        return seconds + traffic.num_collectives * latency + traffic.num_hooks * assumed.HOOK_S

    def _optimizer_s(self, closed: RunSpec) -> float:
        layout = closed.layout or Layout()
        degree = layout.tp * (layout.zero_degree if closed.zero.stage else 1)
        moved = shard(self.trainable_numel, degree) * assumed.OPTIMIZER_BYTES_PER_PARAM[closed.optimizer.kind]
        bandwidth = _memory_bandwidth(self.node.device) * assumed.BANDWIDTH_EFFICIENCY
        if closed.zero.offload_optimizer in ("cpu", "nvme"):
            bandwidth = min(bandwidth, assumed.HOST_BANDWIDTH / self.node.gpus_per_node)
        return moved / bandwidth


def step_time_s(run: RunSpec, node: Node, architecture: Architecture) -> float:
    """Seconds of one optimizer step of a closed run."""
    return CostModel(run, node, architecture).step_time(run).total_s


def link_bandwidth(node: Node) -> float:
    """Bytes per second that a ring over all ranks moves through one rank: its slowest link decides."""
    device = node.device
    if device.kind == "cpu":
        inside = assumed.CPU_LINK_BANDWIDTH
    elif device.link_bandwidth is not None:
        inside = device.link_bandwidth / 2 * assumed.LINK_EFFICIENCY  # the catalogue gives both directions together
    else:
        inside = _host_link_bandwidth(device)
    return min(inside, assumed.NETWORK_BANDWIDTH) if node.num_nodes > 1 else inside


def _host_link_bandwidth(device: Device) -> float:
    recalled = device.raw.get("recalled_not_sourced")
    known = recalled if isinstance(recalled, dict) else {}
    generation = device.raw.get("pcie_gen") or known.get("pcie_gen") or assumed.PCIE_DEFAULT_GENERATION
    return assumed.PCIE_BANDWIDTH.get(int(str(generation)), assumed.PCIE_BANDWIDTH[5])


def _peak_flops(device: Device, precision: str) -> float:
    if device.kind == "cpu":
        return device.fp32_flops or assumed.CPU_FLOPS
    half = device.bf16_flops or device.fp32_flops or assumed.GPU_FLOPS
    # fp32 products run on TF32 tensor cores only where the user asks torch for it
    return device.fp32_flops or half / 8 if precision == "fp32" else half


def _memory_bandwidth(device: Device) -> float:
    if device.kind == "cpu":
        return device.memory_bandwidth or assumed.CPU_BANDWIDTH
    return device.memory_bandwidth or assumed.GPU_BANDWIDTH
