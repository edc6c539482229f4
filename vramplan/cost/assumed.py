"""What the step time assumes of hardware and kernels. Every number here is ASSUMED: it ranks plans, it promises none.

A step time is only ever compared with that of another plan for the same model on the same hardware, so what counts is
that the numbers stand in the right proportion. ``vramplan compare`` never judges them.
"""

from __future__ import annotations

MATMUL_EFFICIENCY = 0.70
"""Share of the dense peak that large bf16 matrix products reach.
ASSUMED: cuBLAS reaches 650 to 750 of an H100 SXM's 989 TFLOP/s, and 250 of an A100's 312, in ml-engineering's
"maximum achievable matmul FLOPS" tables (compute/accelerator, Bekman)."""
MATMUL_HALF_TOKENS = 256
"""Tokens of a micro-batch at which matrix products reach half of that: below, tiles and launches go to waste.
ASSUMED: the weights' own traffic meets the arithmetic at peak / bandwidth = 989e12 / 3.35e12 = 295 FLOP per byte on an
H100, that is at about as many bf16 tokens."""
ATTENTION_EFFICIENCY = 0.40
"""Share of the dense peak in attention's products.
ASSUMED: FlashAttention-2 forward and backward on an A100, 50 to 73 %, less for short sequences and sdpa
(Dao 2023, arXiv 2307.08691, figure 5)."""
BANDWIDTH_EFFICIENCY = 0.80
"""Share of the memory bandwidth that element-wise kernels reach. ASSUMED: STREAM-like copies on A100 and H100."""
LAUNCH_S = 6e-6
"""Seconds from one kernel's launch to the next by Python and the dispatcher. ASSUMED: eager PyTorch, 5 to 10 us."""
KERNELS_PER_LAYER = 60
"""Kernels of one decoder layer's forward in transformers' eager code. DERIVED by counting a Llama layer's operators."""

LINK_EFFICIENCY = 0.70
"""Share of a link's one-directional bandwidth that a ring collective reaches.
ASSUMED: nccl-tests all-reduce bus bandwidth of 230 of 300 GB/s on an A100 node."""
COLLECTIVE_LATENCY_S = 30e-6
"""Seconds of one collective beyond its bytes. ASSUMED: NCCL ring on one node."""
NETWORK_BANDWIDTH = 25e9
"""Bytes per second of one rank to another node.
ASSUMED: one 200 Gb/s adapter for each GPU, as in a DGX A100 (NVIDIA's data sheet)."""
PCIE_BANDWIDTH = {3: 12e9, 4: 24e9, 5: 48e9}
"""Bytes per second and direction of 16 lanes, by generation. ASSUMED: 76 % of the signalling rate."""
PCIE_DEFAULT_GENERATION = 4
"""Where the catalogue does not give one. ASSUMED."""
HOOK_S = 100e-6
"""Seconds that ZeRO-3 spends in Python for each module, each pass: fetch, release, trace.
ASSUMED: the step time of small models under stage 3 is bound by it."""

HOST_BANDWIDTH = 200e9
"""Bytes per second of one node's host memory, shared by its ranks: what bounds CPUAdam.
ASSUMED: eight channels of DDR4-3200, 205 GB/s."""

CPU_FLOPS = 100e9
"""FLOP/s of one rank on a CPU. ASSUMED: one core with AVX-512 at 3 GHz; ranks on a CPU share the cores."""
CPU_BANDWIDTH = 10e9
"""Bytes per second of memory for one rank on a CPU. ASSUMED: one of DDR4's channels at half its rate."""
CPU_LINK_BANDWIDTH = 1e9
"""Bytes per second of gloo between two ranks of one machine. ASSUMED: loopback TCP."""
CPU_COLLECTIVE_LATENCY_S = 300e-6
"""Seconds of one gloo collective beyond its bytes. ASSUMED."""

GPU_FLOPS = 100e12
"""Dense bf16 FLOP/s of a GPU that the catalogue does not know. ASSUMED: a middling card."""
GPU_BANDWIDTH = 1e12
"""Memory bytes per second of a GPU that the catalogue does not know. ASSUMED: a middling card."""

OPTIMIZER_BYTES_PER_PARAM = {
    "adamw": 34,
    "adamw_torch": 72,
    "adamw_torch_fused": 34,
    "adamw_8bit": 22,
    "paged_adamw": 34,
    "paged_adamw_8bit": 22,
    "lion": 26,
    "sgd": 14,
    "adafactor": 40,
    "muon": 34,
}
"""Bytes of memory traffic of one parameter's update: gradient norm and gradient 4 + 4, fp32 master 8, two fp32 moments
16, the rounded weight 2. DERIVED from the update rule; torch's unfused AdamW re-reads states in each of its passes."""
ELEMENTWISE_BYTES = {
    "norm": 36,
    "norm_fused": 8,
    "residual": 6,
    "rotary": 24,
    "gated": 10,
    "plain": 6,
    "score": 24,
    "logit": 30,
}
"""Bytes moved in forward for each element, in bf16, by the element-wise kernels of transformers' eager code: RMS norm
with its fp32 copy, layer norm, residual sum, rotation of query and key, activation (and product), eager attention's
scores with their fp32 softmax, the loss's fp32 logits. DERIVED by adding up each operator's reads and writes."""
BACKWARD_TRAFFIC_FACTOR = 2.0
"""Bytes moved by backward over those of forward. DERIVED: it reads what forward kept and writes as many gradients."""
