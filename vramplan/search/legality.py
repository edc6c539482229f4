"""Combinations that DeepSpeed 0.19.8 or transformers 5.17 refuse, each with its reason and where that stands.

A rule looks at a closed run and says why it cannot be run, or None. Rules are about combinations only: whether the
bytes fit is another question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vramplan.facts.architecture import Architecture, Attention
from vramplan.facts.attention import has_attention
from vramplan.facts.device import Node
from vramplan.search.legal_formats import bf16_master_weights, other_leaves, stored_in_few_bits, sums_in_fp32
from vramplan.spec.run import RunSpec
from vramplan.spec.trainable import LoraMethod


@dataclass(frozen=True, slots=True)
class Illegality:
    """Why a combination is refused, and by which lines."""

    reason: str
    """One clause that names the fields and what to change."""
    source: str
    """File and function in the installed package."""


Rule = Callable[[RunSpec, Node, Architecture], str | None]


def illegality(run: RunSpec, node: Node, architecture: Architecture) -> Illegality | None:
    """The first reason why a closed run is refused, or None where it can be run."""
    return next(illegalities(run, node, architecture), None)


def illegalities(run: RunSpec, node: Node, architecture: Architecture) -> Iterator[Illegality]:
    """Every reason why a closed run is refused."""
    for rule, source in _RULES:
        reason = rule(run, node, architecture)
        if reason is not None:
            yield Illegality(reason, source)


def with_usual_attention(run: RunSpec, architecture: Architecture) -> RunSpec:
    """The run; where no attention was asked for and the family has no sdpa, with eager (as transformers does)."""
    if "attention" in run.model_fields_set or has_attention(architecture.family, run.attention):
        return run
    return run.model_copy(update={"attention": "eager"})


def _param_offload_needs_stage_3(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    if run.zero.offload_param not in ("cpu", "nvme") or run.zero.stage == 3:
        return None
    return f"offload_param needs ZeRO stage 3: stage {run.zero.stage} keeps whole weights and ignores it"


def _optimizer_offload_needs_zero(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    if run.zero.offload_optimizer != "cpu" or run.zero.stage != 0:
        return None
    return "offload_optimizer needs ZeRO stage 1, 2 or 3: stage 0 gives CPUAdam weights on the GPU, which it refuses"


def _nvme_needs_stage_3(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    if run.zero.offload_optimizer != "nvme" or run.zero.stage == 3:
        return None
    return f"offload_optimizer nvme needs ZeRO stage 3: stage {run.zero.stage} keeps its states in the host's memory"


def _muon_reduces_whole(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    if run.optimizer.kind != "muon" or run.zero.stage != 3 or not run.zero.reduce_scatter:
        return None
    return "optimizer muon under ZeRO-3 needs zero.reduce_scatter false: set it, or take stage 1 or 2"


def _all_reduced_fetches(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    if run.zero.stage != 3 or not run.zero.stage3_use_all_reduce_for_fetch_params:
        return None
    if run.method.kind != "lora" or run.precision not in ("bf16", "fp16"):
        return None
    return (
        "zero.stage3_use_all_reduce_for_fetch_params fetches tensors of one format together, and adapters are fp32 "
        f"beside {run.precision} weights: set it false"
    )


def _hpz_group(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    ranks, size = node.world_size if run.layout is None else run.layout.world_size, run.zero.hpz_partition_size
    if size == 1:
        return None
    if run.zero.stage != 3:
        return f"zero.hpz_partition_size needs ZeRO stage 3: stage {run.zero.stage} keeps whole weights"
    if size > ranks or ranks % size:
        return f"zero.hpz_partition_size {size} does not divide the {ranks} ranks"
    return None


def _fp16_hardware(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    if run.precision != "fp16":
        return None
    if node.device.kind == "cpu":
        return "precision fp16 needs a CPU with fp16 instructions, which few have: use bf16 or fp32"
    capability = node.device.compute_capability
    if capability is not None and capability < (7, 0):
        return f"precision fp16 needs compute capability 7.0, {node.device.name} has {_dotted(capability)}: use fp32"
    return None


def _flash_attention_hardware(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    if run.attention != "flash_attention_2":
        return None
    if node.device.kind in ("cpu", "hpu"):
        return f"attention flash_attention_2 does not run on {node.device.name}: use sdpa"
    capability = node.device.compute_capability
    if capability is not None and capability < (8, 0):
        return f"attention flash_attention_2 needs compute capability 8.0, {node.device.name} has {_dotted(capability)}"
    return None


def _flash_attention_precision(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    if run.attention != "flash_attention_2" or run.precision != "fp32":
        return None
    return "attention flash_attention_2 computes in bf16 or fp16 only: set precision bf16, or attention sdpa"


def _sinks_need_eager(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    if run.attention == "eager" or not architecture.has_sinks:
        return None
    return f"attention {run.attention} has no place for {architecture.family}'s attention sinks: set attention eager"


def _attention_of_family(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    if has_attention(architecture.family, run.attention):
        return None
    return f"attention {run.attention} does not exist for the {architecture.family} family: set attention eager"


def _alibi_and_flash_attention(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    mixer = architecture.layers[0].mixer
    if run.attention != "flash_attention_2" or not (isinstance(mixer, Attention) and mixer.alibi):
        return None
    return f"attention flash_attention_2 has no place for {architecture.family}'s ALiBi: set attention sdpa"


def _adapters_on_linear_routers(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    method = run.method
    if not isinstance(method, LoraMethod) or not any(method.adapts(name) for name in architecture.linear_routers):
        return None
    return (
        f"method.target_modules {method.target_modules!r} reaches {architecture.family}'s routers, which return two "
        "tensors where an adapter takes one: name its projections (q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, "
        "down_proj)"
    )


def _dora_keeps_4_bit_weights(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    method = run.method
    if not isinstance(method, LoraMethod) or method.kind != "qlora" or not method.use_dora:
        return None
    if run.zero.stage != 3 or node.device.kind != "cpu":
        return None
    return (
        "method.use_dora with qlora under ZeRO-3 on a CPU: PEFT puts a new weight in place of each that it writes out, "
        "of which ZeRO-3 does not know; take ZeRO stage 2"
    )


def _fused_loss_hardware(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    if run.loss != "liger" or node.device.kind != "cpu":
        return None
    return "loss liger is a Triton kernel, which needs a GPU: use loss hf"


def _liger_hardware(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    if run.kernels != "liger" or node.device.kind != "cpu":
        return None
    return "kernels liger are Triton's, which need a GPU: use kernels hf"


def _offloaded_activations(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    if run.offload_activations == "none" or run.activation_checkpointing == "full":
        return None
    return "offload_activations keeps the inputs of checkpointed layers: set activation_checkpointing full"


def _pipeline(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    if run.layout is None or run.layout.pp == 1:
        return None
    return "layout.pp needs a model written as deepspeed's PipelineModule, which transformers' models are not: set pp 1"


def _sequence_parallel_heads(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    if run.layout is None or run.layout.sp == 1:
        return None
    mixer, sp = architecture.layers[0].mixer, run.layout.sp
    kv_heads = mixer.num_kv_heads if isinstance(mixer, Attention) else mixer.num_heads
    if mixer.num_heads % sp:
        return f"layout.sp {sp} does not divide the {mixer.num_heads} attention heads"
    if kv_heads % sp and sp % kv_heads:
        return f"layout.sp {sp} neither divides the {kv_heads} key/value heads nor is a multiple of them"
    return None


def _sequence_parallel_attention(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    if run.layout is None or run.layout.sp == 1 or run.attention != "eager":
        return None
    return "layout.sp needs attention sdpa or flash_attention_2: eager's mask of all pairs is not split"


def _sequence_parallel_family(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    """Seen by training a small model of each family on two ranks, with whole sequences and with halves of them."""
    if run.layout is None or run.layout.sp == 1:
        return None
    family = architecture.family
    if architecture.has_latent_attention:
        return f"layout.sp needs queries as wide as values, which {family}'s latent attention has not: set sp 1"
    if family in _NO_KV_HEADS:
        return f"layout.sp needs num_key_value_heads in the config, which the {family} family has not: set sp 1"
    if family == "llama4":
        return "layout.sp needs positions in every layer's attention, which llama4 does not pass on: set sp 1"
    return None


_NO_KV_HEADS = ("bloom", "falcon", "gpt2", "gpt_neox", "opt")


def _sequence_parallel_window(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    if run.layout is None or run.layout.sp == 1 or run.attention == "flash_attention_2":
        return None
    shortest = min(architecture.windows, default=run.seq_len)
    if shortest >= run.seq_len:
        return None
    return (
        f"layout.sp drops the masks of sdpa, which keep {architecture.family}'s sliding windows of {shortest} tokens: "
        "set attention flash_attention_2, or sp 1"
    )


def _sequence_parallel_methods(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    if run.layout is None or run.layout.sp == 1:
        return None
    if run.retain.ewc is not None:
        return "layout.sp spreads a sample's gradient over ranks before retain.ewc could square it: set sp 1"
    if run.data.augment.neftune_alpha is not None:
        return "layout.sp shortens the sequences by whose length data.augment.neftune_alpha is scaled: set sp 1"
    if run.zero.stage == 3 and not run.zero.reduce_scatter:
        return "layout.sp under ZeRO-3 needs zero.reduce_scatter true: else some gradients are summed, others averaged"
    return None


def _sequence_parallel_length(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    if run.layout is None or run.seq_len % run.layout.sp == 0:
        return None
    return f"seq_len {run.seq_len} is no multiple of layout.sp {run.layout.sp}"


def _packing_is_seen(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    if run.data.packing == "none" or run.attention == "flash_attention_2":
        return None
    if not architecture.masks_by_document:
        return (
            f"data.packing {run.data.packing}: {architecture.family} makes its masks without positions, so packed "
            "documents would see each other: set data.packing none"
        )
    if run.layout is not None and run.layout.sp > 1:
        return (
            f"data.packing {run.data.packing} with layout.sp: masks are dropped there, so packed documents would see "
            "each other: set attention flash_attention_2, or data.packing none"
        )
    return None


def _tensor_and_sequence_parallel(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    if run.layout is None or run.layout.tp == 1 or run.layout.sp == 1:
        return None
    return "layout.tp and layout.sp together: tensor parallelism replaces the groups that sequence parallelism needs"


def _tensor_parallel_adapters(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    if run.layout is None or run.layout.tp == 1 or run.method.kind == "full":
        return None
    return "layout.tp splits linears by their names, which adapters change: use method full, or tp 1"


_REJECTED_PLANS = frozenset(["deepseek_v2", "deepseek_v3", "glm", "llama4", "mixtral", "olmo2", "phi3", "qwen3_moe"])
"""Families whose plan in transformers 5.17 has styles that DeepSpeed does not know, and so rejects as a whole:
``rowwise_split_input``, ``packed_colwise``, ``packed_rowwise``, ``moe_tp_experts``, ``mla_kv_a_proj``."""
_WITHOUT_PLAN = {
    "gpt2": "has a policy of its own for it and refuses to cut it by names",
    "bloom": "cuts its heads and not its ALiBi, so its forward fails",
    "falcon": "cuts its joined queries, keys and values through the heads, so its forward fails",
}


def _tensor_parallel_family(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    if run.layout is None or run.layout.tp == 1:
        return None
    family = architecture.family
    if family in _REJECTED_PLANS:
        return f"layout.tp: DeepSpeed's AutoTP rejects the plan that transformers has for {family}: set tp 1"
    if family in _WITHOUT_PLAN:
        return f"layout.tp: transformers has no plan for {family}, and AutoTP {_WITHOUT_PLAN[family]}: set tp 1"
    return None


def _frozen_weights_in_files(run: RunSpec, node: Node, architecture: Architecture) -> str | None:
    method = run.method
    if run.zero.offload_param != "nvme" or not (isinstance(method, LoraMethod) or method.freezes):
        return None
    return (
        "zero.offload_param nvme with frozen weights: from the second step on DeepSpeed fetches more of them ahead "
        "than it has buffers for, and ends the run; set it cpu, or train all weights"
    )


_RULES: tuple[tuple[Rule, str], ...] = (
    (_param_offload_needs_stage_3, "deepspeed/runtime/zero/offload_config.py, DeepSpeedZeroOffloadParamConfig"),
    (_optimizer_offload_needs_zero, "deepspeed/ops/adam/cpu_adam.py, DeepSpeedCPUAdam.step"),
    (_nvme_needs_stage_3, "deepspeed/runtime/zero/stage_1_and_2.py, DeepSpeedZeroOptimizer.__init__"),
    (sums_in_fp32, "deepspeed/runtime/engine.py, _do_optimizer_sanity_check"),
    (
        bf16_master_weights,
        "deepspeed/runtime/base_optimizer.py, _configure_master_weights; config.py, _do_error_check",
    ),
    (other_leaves, "deepspeed/runtime/zero/parameter_offload.py, _set_leaf_by_threshold_preorder"),
    (_muon_reduces_whole, "deepspeed/runtime/zero/stage3.py, DeepSpeedZeroOptimizer_Stage3.__init__"),
    (_all_reduced_fetches, "deepspeed/runtime/zero/partition_parameters.py, _all_gather_coalesced"),
    (_hpz_group, "deepspeed/utils/groups.py, _create_zero_param_parallel_group"),
    (_fp16_hardware, "deepspeed/runtime/engine.py, _do_sanity_check; accelerator/*_accelerator.py, is_fp16_supported"),
    (_flash_attention_hardware, "transformers/modeling_utils.py, _flash_attn_import_error; flash-attn's README"),
    (_flash_attention_precision, "transformers/modeling_utils.py, _flash_attn_can_dispatch"),
    (_sinks_need_eager, "transformers/models/gpt_oss/modeling_gpt_oss.py, _supports_sdpa"),
    (_attention_of_family, "transformers/modeling_utils.py, _sdpa_can_dispatch and _flash_attn_can_dispatch"),
    (_alibi_and_flash_attention, "transformers/models/falcon/modeling_falcon.py, FalconFlashAttention2.forward"),
    (_adapters_on_linear_routers, "peft/tuners/lora/layer.py, Linear.forward; models/llama4, Llama4Router.forward"),
    (_dora_keeps_4_bit_weights, "peft/utils/integrations.py, dequantize_module_weight"),
    (_fused_loss_hardware, "liger_kernel/ops/fused_linear_cross_entropy.py"),
    (_liger_hardware, "liger_kernel/ops/rms_norm.py"),
    (stored_in_few_bits, "transformers/quantizers/auto.py, AutoHfQuantizer.merge_quantization_configs"),
    (_offloaded_activations, "torch/utils/checkpoint.py, _CheckpointFrame.save_inputs"),
    (_pipeline, "deepspeed/runtime/pipe/engine.py, PipelineEngine.__init__"),
    (_sequence_parallel_heads, "deepspeed/runtime/sequence_parallel/ulysses_sp.py, UlyssesSPAttentionHF.__init__"),
    (_sequence_parallel_attention, "deepspeed/runtime/sequence_parallel/ulysses_sp.py, register_with_transformers"),
    (_sequence_parallel_family, "deepspeed/runtime/sequence_parallel/ulysses_sp.py, UlyssesSPAttentionHF.forward"),
    (_sequence_parallel_window, "transformers/integrations/sdpa_attention.py, sdpa_attention_forward"),
    (_sequence_parallel_methods, "deepspeed/runtime/zero/stage3.py, __reduce_and_partition_ipg_grads"),
    (_sequence_parallel_length, "deepspeed/runtime/sequence_parallel/ulysses_sp.py, UlyssesSPDataLoaderAdapter.refill"),
    (
        _packing_is_seen,
        "transformers/models/opt/modeling_opt.py, OPTDecoder (create_causal_mask); ulysses_sp.py, uattn_wrapper",
    ),
    (_tensor_and_sequence_parallel, "deepspeed/runtime/engine.py, _configure_tensor_parallel_states (self.mpu)"),
    (
        _tensor_parallel_family,
        "deepspeed/module_inject/tp_plan_converter.py, TPPlanConverter.convert; auto_tp.py, AutoTP.tp_parser",
    ),
    (
        _frozen_weights_in_files,
        "deepspeed/runtime/zero/partitioned_param_coordinator.py, __prefetch_nvme_param_partitions",
    ),
    (_tensor_parallel_adapters, "deepspeed/module_inject/auto_tp.py (no LoRA layer in its policies)"),
)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
