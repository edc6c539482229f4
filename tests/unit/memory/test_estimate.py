"""The estimate's own promises: which rank, which adapters, what is refused, what adds up."""

import pytest

from vramplan.errors import SpecError
from vramplan.facts.catalogue import find_model
from vramplan.facts.device import Node
from vramplan.facts.devices import find_device
from vramplan.facts.resolve import resolve_architecture
from vramplan.memory.estimate import UncoveredError, estimate, estimate_run
from vramplan.memory.labels import HOST_BUILT, HOST_READ
from vramplan.memory.ledger import Estimate
from vramplan.spec.run import RunSpec

SMALL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def ask(model=SMALL, zero=None, gpus=8, rank=None, **fields) -> Estimate:
    stage = {"stage": 2, "offload_optimizer": "none", "offload_param": "none", **(zero or {})}
    chosen = {"micro_batch_size": 1, "grad_accum_steps": 1, "activation_checkpointing": "full", "seq_len": 256}
    run = RunSpec(model=model, zero=stage, **{**chosen, **fields})
    return estimate(run, Node(find_device("h100-80gb"), gpus), resolve_architecture(run), rank=rank)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("bucket", [5_000_000, 50_000_000])
@pytest.mark.parametrize("formats", [{}, {"grad_accum_dtype": "fp32"}], ids=["bf16", "fp32 sums"])
def test_no_rank_holds_more_than_the_answer(stage, bucket, formats):
    zero = {"stage": stage, "reduce_bucket_size": bucket}
    worst = max(ask("Qwen/Qwen2.5-0.5B", zero, rank=rank, **formats).allocated_peak_bytes for rank in range(8))
    assert ask("Qwen/Qwen2.5-0.5B", zero, **formats).allocated_peak_bytes == worst


def test_ranks_do_differ():
    zero = {"stage": 2, "reduce_bucket_size": 50_000_000}
    assert len({ask("Qwen/Qwen2.5-0.5B", zero, rank=rank).allocated_peak_bytes for rank in range(8)}) > 1


def test_adapters_that_match_nothing_are_one_sentence():
    with pytest.raises(SpecError, match=r"target_modules: .* matches no projection of the model.*q_proj"):
        ask(method={"kind": "lora", "target_modules": ["nothing_here"]})


@pytest.mark.parametrize("targets", [r".*layers\.5\..*q_proj", ["layers.29.self_attn.q_proj"], ["q_proj", "lm_head"]])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_adapters_on_some_layers(targets, stage, checkpointing):
    method = {"kind": "lora", "target_modules": targets}
    found = ask(zero={"stage": stage}, method=method, activation_checkpointing=checkpointing)
    assert found.allocated_peak_bytes > 0


def test_layers_with_adapters_keep_more_than_layers_without():
    few = ask(method={"kind": "lora", "target_modules": r".*layers\.29\..*"}, activation_checkpointing="none")
    many = ask(
        method={"kind": "lora", "target_modules": r".*layers\.(1[5-9]|2\d)\..*"}, activation_checkpointing="none"
    )
    every = ask(method={"kind": "lora"}, activation_checkpointing="none")
    assert few.allocated_peak_bytes < many.allocated_peak_bytes < every.allocated_peak_bytes


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_paged_moments_lie_in_the_hosts_memory(stage):
    # weights in the format of their files take nothing of the host's memory as they are loaded
    fields = {**find_model(SMALL).config, "torch_dtype": "bfloat16"}
    plain, paged = (
        ask(optimizer={"kind": kind}, zero={"stage": stage}, model_config_fields=fields)
        for kind in ("adamw_8bit", "paged_adamw_8bit")
    )
    moved = plain.phases[-1].end_bytes - paged.phases[-1].end_bytes
    assert moved > 0
    assert sum(term.num_bytes for term in paged.host_terms) - sum(term.num_bytes for term in plain.host_terms) == moved


@pytest.mark.parametrize("precision", ["bf16", "fp32", "bf16-autocast"])
def test_the_chunked_loss_takes_less_than_whole_logits_in_fp32(precision):
    fields = {"precision": precision, "seq_len": 2048, "micro_batch_size": 4, "zero": {"stage": 0}}
    whole = 4 * 4 * 2048 * 49152  # the gradient of log-softmax beside its result's
    assert ask(loss="chunked", **fields).allocated_peak_bytes + 0.9 * whole < ask(**fields).allocated_peak_bytes


def test_the_third_micro_batch_finds_what_the_second_was_the_first_to_gather_ahead():
    zero = {"stage": 3, "stage3_use_all_reduce_for_fetch_params": True}
    ends = {each.phase: each.end_bytes for each in ask(zero=zero, grad_accum_steps=4).phases}
    assert ends["step1.micro4.forward"] > ends["step1.micro2.forward"] > ends["step1.micro1.forward"]
    assert ends["step2.micro4.forward"] == ends["step2.micro2.forward"]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_more_layers_are_recomputed_the_fewer_bytes(stage):
    zero = {"stage": stage, "reduce_bucket_size": 1_000_000, "stage3_prefetch_bucket_size": 1_000_000}
    peaks = [ask(zero=zero, seq_len=2048, checkpoint_every=every).allocated_peak_bytes for every in (1, 2, 3, 30)]
    none = ask(zero=zero, seq_len=2048, activation_checkpointing="none").allocated_peak_bytes
    assert peaks == sorted(peaks)
    assert len(set(peaks)) == 4
    assert peaks[-1] < none


HALVES = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"method": {"kind": "lora"}, "zero": {"stage": 3, "stage3_module_granularity_threshold": 100}}, "granularity"),
        ({"zero": {"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu", "hpz_partition_size": 4}}, "hpz"),
        ({"optimizer": {"kind": "paged_adamw"}, "zero": {"offload_optimizer": "cpu"}}, "paged_adamw"),
        ({"optimizer": {"kind": "muon"}, "zero": {"stage": 3, "offload_optimizer": "cpu"}}, "muon under ZeRO-3"),
        ({"optimizer": {"kind": "muon"}, "layout": {"dp": 2, "sp": 2}}, "muon under tensor or sequence parallelism"),
        ({"optimizer": {"kind": "muon"}, "zero": {"contiguous_gradients": False}}, "muon with zero.contiguous_grad"),
        ({**HALVES, "optimizer": {"kind": "adafactor"}}, "bf16_master_weights_and_grads with the optimizer adafactor"),
        ({**HALVES, "grad_accum_dtype": "fp32"}, "bf16_master_weights_and_grads with grad_accum_dtype"),
        ({"grad_accum_dtype": "fp32", "precision": "fp16", "zero": {"stage": 1}}, "under ZeRO-1 with fp16 weights"),
        ({"grad_accum_dtype": "fp32", "zero": {"stage": 2, "reduce_scatter": False}}, "under ZeRO-2 without"),
        ({"grad_accum_dtype": "fp32", "optimizer": {"kind": "muon"}}, "grad_accum_dtype with the optimizer muon"),
        ({"layout": {"dp": 4, "tp": 2}}, "head tied to the embedding"),
        ({"layout": {"dp": 4, "tp": 2}, "zero": {"stage": 3}}, "tensor parallelism under ZeRO-3"),
        ({"layout": {"dp": 4, "tp": 2}, "method": {"kind": "lora"}}, "tensor parallelism with adapters"),
        ({"layout": {"dp": 2, "tp": 2, "sp": 2}}, "tensor parallelism with sequence parallelism"),
        ({"model": "Qwen/Qwen2.5-7B-Instruct", "layout": {"dp": 1, "tp": 8}}, "uneven shares .4 by 8"),
        ({"model": "openai/gpt-oss-20b", "layout": {"dp": 4, "tp": 2}}, "tensor parallelism of the gpt_oss family"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_counted_is_refused_by_name(fields, named):
    with pytest.raises(UncoveredError, match=named):
        ask(**fields)


@pytest.mark.parametrize("loss", ["hf", "chunked", "liger"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_terms_add_up_to_their_moment(stage, loss):
    found = ask(zero={"stage": stage}, loss=loss)
    for moment, phase in zip(found.moments, found.phases, strict=True):
        assert moment.num_bytes == phase.peak_bytes >= phase.end_bytes
        assert all(term.num_bytes >= 0 for term in moment.terms)
    assert found.allocated_peak_bytes == max(phase.peak_bytes for phase in found.phases)


def test_each_rank_has_a_share_of_a_tensor_parallel_model():
    whole = ask("meta-llama/Llama-3.1-8B", zero={"stage": 0})
    half = ask("meta-llama/Llama-3.1-8B", zero={"stage": 0}, layout={"dp": 4, "tp": 2})
    # 12 B of states and 2 B of weights for each element of the linears and of the head that the other rank has
    split = (8_030_261_248 - 128_256 * 4096 - 65 * 4096) // 2
    assert whole.phases[-1].end_bytes - half.phases[-1].end_bytes == pytest.approx(14 * split, rel=0.01)


def test_offload_moves_states_to_the_host():
    here = ask("meta-llama/Llama-3.1-8B", zero={"stage": 2})
    away = ask("meta-llama/Llama-3.1-8B", zero={"stage": 2, "offload_optimizer": "cpu"})
    assert here.host_bytes_per_node == 0
    # master, its gradient and two moments in fp32, and the low-precision copy: 18 B an element of the rank's share
    assert away.host_bytes_per_node > 18 * 8_030_261_248
    assert away.allocated_peak_bytes < here.allocated_peak_bytes


def at(found: Estimate, phase: str) -> dict[str, int]:
    """The terms at a phase's highest instant."""
    numbers = {each.phase: number for number, each in enumerate(found.phases)}
    return {term.name: term.num_bytes for term in found.moments[numbers[phase]].terms}


def test_second_parts_of_weights_go_with_the_step_and_come_back_with_the_forward():
    released = {"stage": 3, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    plain, hpz = ask(zero=released), ask(zero={**released, "hpz_partition_size": 2})
    both = zip(hpz.phases, plain.phases, strict=True)
    ends = {phase.phase: phase.end_bytes - other.end_bytes for phase, other in both}
    half = 2 * 134_515_008 // 2  # bf16, and every tensor of the model divides by 8
    assert ends["engine_init"] == ends["step1.micro1.backward"] == half
    assert ends["step1.micro1.optimizer_step"] == 0
    assert 0 < half - ends["step2.micro1.forward"] < half // 1000  # small tensors stay whole until the step


@pytest.mark.parametrize("stage", [2, 3])
def test_the_step_takes_norms_of_gradients_that_went_to_the_host(stage):
    """The engine does not know during backward that it is the last one."""
    found = ask(zero={"stage": stage, "offload_optimizer": "cpu"})
    largest = 49152 * 576
    share = largest // 8 if stage == 3 else 16_814_376  # of stage 2 the rank's own slice, at most its partition
    norm = at(found, "step2.micro1.optimizer_step")["gradient norm in fp64"]
    assert norm == 8 * share if stage == 3 else 0 < norm <= 8 * share
    assert "gradient norm in fp64" not in at(found, "step2.micro1.backward")


def test_packed_documents_have_a_mask_in_every_layer():
    """bool once, and a copy in the core's format that each layer keeps for backward."""

    def end_of_forward(**fields) -> int:
        found = ask(activation_checkpointing="none", zero={"stage": 0}, **fields)
        return next(phase.end_bytes for phase in found.phases if phase.phase == "step1.micro1.forward")

    packed = end_of_forward(data={"train": "builtin:arithmetic", "packing": "best_fit"})
    assert packed > end_of_forward()


def test_weights_that_are_cast_as_they_are_read_pass_through_the_hosts_memory():
    config = find_model(SMALL).config
    stored, cast = (
        ask(model_config_fields={**config, "torch_dtype": dtype}, zero={"stage": 2})
        for dtype in ("bfloat16", "float32")
    )
    assert stored.host_bytes_per_node == 0
    assert {term.name for term in cast.host_terms} == {HOST_BUILT}
    assert cast.host_bytes_per_node == 8 * 2 * 134_515_008  # every rank reads the whole model
    assert cast.pinned_bytes_per_node == 0
    assert cast.allocated_peak_bytes == stored.allocated_peak_bytes


def test_routed_experts_are_merged_in_the_hosts_memory_by_every_rank():
    config = {
        "model_type": "mixtral",
        "torch_dtype": "bfloat16",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_local_experts": 8,
        "vocab_size": 1000,
    }
    one = 8 * 256 * 512 * 2  # of a layer's gates, up- or down-projections
    whole, cut = (ask(model="mixtral", model_config_fields=config, zero={"stage": stage}) for stage in (2, 3))
    for found in (whole, cut):
        assert {term.name for term in found.host_terms} == {HOST_BUILT}
        assert found.host_bytes_per_node == 8 * (3 * 3 * one + 2 * one)  # the last gates and up-projections twice


@pytest.mark.parametrize("stage", [2, 3])
def test_a_family_with_experts_of_which_no_layer_has_any_merges_none(stage):
    config = {
        "model_type": "qwen2_moe",
        "torch_dtype": "bfloat16",
        "num_hidden_layers": 2,
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts": 4,
        "mlp_only_layers": [0, 1],
        "vocab_size": 1000,
    }
    assert not ask(model="dense", model_config_fields=config, zero={"stage": stage}).host_terms


def closed(**fields) -> RunSpec:
    """Of weights that are stored as they are trained."""
    chosen = {"micro_batch_size": 2, "grad_accum_steps": 1, "activation_checkpointing": "none", "seq_len": 256}
    stored = {**find_model(SMALL).config, "torch_dtype": "bfloat16"}
    zero = {"stage": 2, "offload_optimizer": "none", "offload_param": "none"}
    return RunSpec(**{"model": SMALL, "model_config_fields": stored, "zero": zero, **chosen, **fields})


def every_moment(**fields) -> Estimate:
    run = closed(**fields)
    return estimate_run(run, Node(find_device("h100-80gb"), 8), resolve_architecture(run))


def test_every_moment_that_a_run_passes_is_in_its_estimate():
    found = every_moment()
    assert [phase.phase for phase in found.phases[-4:]] == ["evaluation", "save", "resume", "export"]
    assert [moment.phase.value for moment in found.moments[-4:]] == ["evaluation", "save", "resume", "save"]
    run = closed()
    assert found.phases[:-4] == estimate(run, Node(find_device("h100-80gb"), 8), resolve_architecture(run)).phases
    (read,) = (term.num_bytes for term in found.host_terms if term.name == HOST_READ)
    assert read == 2 * 134_515_008  # the model's file; the rank's own is 12 B x elements / 8


def test_moments_that_a_run_does_not_pass_are_not_shown():
    without = every_moment(data={"eval_frac": 0.0})
    assert [phase.phase for phase in without.phases[-3:]] == ["save", "resume", "export"]
    plain = every_moment(engine="torch", zero={"stage": 0, "offload_optimizer": "none", "offload_param": "none"})
    assert plain.phases[-1].phase == "step2.micro1.optimizer_step"


def test_an_evaluation_can_be_the_peak():
    found = every_moment(micro_batch_size=1, training={"eval_micro_batch_size": 64})
    assert found.peak.phase.value == "evaluation"
    assert found.peak.name == "evaluation: loss"


def test_a_resume_makes_states_beside_those_that_are_there():
    """Low precision without ZeRO: the engine's own first step made moments, and torch copies all of the loaded ones to
    the device before it lets go of them."""
    found = every_moment(seq_len=8, zero={"stage": 0, "offload_optimizer": "none", "offload_param": "none"})
    resume = next(phase for phase in found.phases if phase.phase == "resume")
    assert resume.peak_bytes == (2 + 4 + 8 + 8) * 134_515_008


def test_fp32_sums_are_there_before_they_are_added_to():
    """``average_tensor`` asks for the buffer's slices before it reduces the bucket."""
    found = ask(zero={"stage": 2}, rank=0, grad_accum_dtype="fp32", seq_len=16)
    moment = next(each for each in found.moments if each.name == "step1.micro1.backward: gradient reduction")
    size_of = {term.name: term.num_bytes for term in moment.terms}
    elements = resolve_architecture(RunSpec(model=SMALL)).num_params
    assert size_of["gradient partition"] == pytest.approx(4 * elements / 8, rel=1e-4)
    assert size_of["reduction copy"] > 2 * elements  # all slices flattened, and one of the rank's widened
