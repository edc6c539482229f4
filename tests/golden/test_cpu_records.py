"""The estimator against the real engine: bytes of 75 runs on the CPU, measured by a program that shares no code."""

from pathlib import Path

import pytest

from vramplan.measure.compare import estimate_record, quantile
from vramplan.measure.record import read_records
from vramplan.memory.estimate import UncoveredError

RECORDS = Path(__file__).with_name("cpu_records.jsonl")
BENCH = Path(__file__).with_name("measured") / "cpu_bench.jsonl"
"""Taken by `vramplan bench run`: qwen3, sliding windows, small buckets, adapters under every stage, offload
(on the CPU the host's memory is the device's: both are counted)."""
ADAPTERS = Path(__file__).with_name("measured") / "cpu_adapters.jsonl"
"""Taken by `vramplan bench run`: DoRA under every stage and on tables, adapters under autocast."""
SEQUENCE = Path(__file__).with_name("measured") / "cpu_sequence_parallel.jsonl"
"""Taken by `vramplan bench run`: Ulysses on 2 and 4 ranks. (On 8 this small a model is outweighed by the CPU kernel's
buffers, which the estimate does not count.)"""
OPTIMIZERS = Path(__file__).with_name("measured") / "cpu_optimizers.jsonl"
"""Taken by `vramplan bench run`: torch's AdamW, SGD with and without momentum and Adafactor under every ZeRO stage."""
FAMILIES = Path(__file__).with_name("measured") / "cpu_families.jsonl"
"""Taken by `vramplan bench run`: small models of every dense family and its variants, each in 13 settings of attention,
checkpointing, ZeRO stage, precision and method. (So small that what is not counted shows: a kilobyte of position ids,
and in low precision the buffers of the CPU's matrix kernels.)"""
LATENT = Path(__file__).with_name("measured") / "cpu_mla.jsonl"
"""Taken by `vramplan bench run`: DeepSeek-V2 and -V3 with and without a narrow query, with each kind of rotation,
values as wide as queries and narrower, dense and with each kind of router, in the settings of the families and
more."""
EXPERTS = Path(__file__).with_name("measured") / "cpu_moe.jsonl"
"""Taken by `vramplan bench run`: families with routed experts, in the settings of the families and more; the adapters
of mixtral and qwen3_moe reach routers and experts."""
WRAPPED = Path(__file__).with_name("measured") / "cpu_expert_adapters.jsonl"
"""Taken by `vramplan bench run`: adapters on the parameters of experts and routers (PEFT's ParamWrapper) of
deepseek_v2, deepseek_v3, gpt_oss, llama4, qwen2_moe, qwen3_moe and mixtral, lora and qlora, under every ZeRO stage."""
KEYS = Path(__file__).with_name("measured") / "cpu_zero_keys.jsonl"
"""Taken by `vramplan bench run`: adapters on token embeddings, and DeepSpeed's rarer keys of ZeRO 1 to 3 (how
gradients are laid out, reduced and overlapped, how weights are gathered) with small buckets."""
DRAWS = Path(__file__).with_name("measured") / "cpu_draws.jsonl"
"""Taken by `vramplan bench run` of jobs that benchmarks/draws.py drew: every family of the catalogue, real widths (of
large models a quarter), few layers, every other setting at random, sequence parallelism and sliding windows under it
too."""
QUANTIZED = Path(__file__).with_name("measured") / "cpu_qlora.jsonl"
"""Taken by `vramplan bench run` with bitsandbytes 0.50.2 on the CPU. That program builds the model whole and
quantizes it then, so its ``model_load`` is not that of a checkpoint being read."""
QUANTIZED_ZERO3 = QUANTIZED.with_name("cpu_qlora_zero3.jsonl")
"""As those, under ZeRO-3, which splits the packed weights as the engine starts."""


def covered(path=RECORDS):
    for record in read_records(path):
        try:
            yield record, estimate_record(record)
        except UncoveredError:
            continue


@pytest.mark.parametrize(
    ("path", "count"),
    [(RECORDS, 45), (BENCH, 49), (ADAPTERS, 16), (SEQUENCE, 6), (OPTIMIZERS, 20)],
    ids=["records", "bench", "adapters", "sequence", "optimizers"],
)
def test_peaks_of_covered_records(path, count):
    errors = [
        found.train_allocated_peak_bytes / record.measured.train_allocated_peak_bytes - 1
        for record, found in covered(path)
    ]
    assert len(errors) >= count
    absolute = sorted(abs(error) for error in errors)
    assert quantile(absolute, 0.5) <= 0.0001
    assert quantile(absolute, 0.9) <= 0.001
    assert absolute[-1] <= 0.01


@pytest.mark.parametrize(
    "path",
    [RECORDS, BENCH, ADAPTERS, SEQUENCE, OPTIMIZERS],
    ids=["records", "bench", "adapters", "sequence", "optimizers"],
)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_phases(path, stage):
    compared = 0
    for record, found in covered(path):
        if record.spec.zero.stage != stage:
            continue
        measured = {phase.phase: phase for phase in record.measured.phases}
        for phase in found.phases:
            assert phase.peak_bytes == pytest.approx(measured[phase.phase].allocated_peak_bytes, rel=0.01)
            if phase.phase != "model_load":  # what is loaded twice is let go of when the engine starts
                assert phase.end_bytes == pytest.approx(measured[phase.phase].allocated_end_bytes, rel=0.01)
            compared += 1
    assert compared


@pytest.mark.parametrize(("path", "count"), [(QUANTIZED, 5 * 8), (QUANTIZED_ZERO3, 7 * 8 + 14)])
def test_quantized_weights(path, count):
    """Within 1% at the peak and 2% in a phase. All but one phase of all are within 1%: the first backward of QLoRA
    under ZeRO-3 and autocast (QZ2-7) took 786,432 bytes more than was simulated and estimated; no later step did."""
    compared, beyond = 0, []
    for record, found in covered(path):
        peak = record.measured.train_allocated_peak_bytes
        assert found.train_allocated_peak_bytes == pytest.approx(peak, rel=0.01)
        measured = {phase.phase: phase for phase in record.measured.phases}
        for phase in found.phases:
            seen = measured[phase.phase]
            assert phase.peak_bytes == pytest.approx(seen.allocated_peak_bytes, rel=0.02)
            assert phase.end_bytes == pytest.approx(seen.allocated_end_bytes, rel=0.01)
            beyond += [] if phase.peak_bytes == pytest.approx(seen.allocated_peak_bytes, rel=0.01) else [record.id]
            compared += 1
    assert compared == count
    assert len(beyond) <= 1


@pytest.fixture(
    scope="module",
    params=[(FAMILIES, 340, 17), (LATENT, 105, 2), (EXPERTS, 72, 5), (WRAPPED, 37, 7), (KEYS, 67, 8), (DRAWS, 130, 29)],
    ids=["dense", "latent", "experts", "wrapped", "keys", "draws"],
)
def families(request):
    path, least, num_types = request.param
    found = list(covered(path))
    types = {record.spec.model.config["model_type"] for record, _ in found}
    count = len(found)  # a failing assertion would print them all
    assert count >= least
    assert len(types) == num_types
    return found


def test_peaks_of_families(families):
    errors = sorted(
        abs(found.train_allocated_peak_bytes / record.measured.train_allocated_peak_bytes - 1)
        for record, found in families
    )
    assert quantile(errors, 0.5) <= 0.0005
    assert quantile(errors, 0.95) <= 0.005
    assert errors[-1] <= 0.01


def test_phases_of_families(families):
    for record, found in families:
        measured = {phase.phase: phase for phase in record.measured.phases}
        for phase in found.phases[2:]:  # the steps; the engine starts with a megabyte or less
            name = f"{record.spec.id} {phase.phase}"
            assert phase.peak_bytes == pytest.approx(measured[phase.phase].allocated_peak_bytes, rel=0.02), name
            assert phase.end_bytes == pytest.approx(measured[phase.phase].allocated_end_bytes, rel=0.005), name


TORCH = Path(__file__).with_name("measured") / "cpu_torch.jsonl"
"""Taken by `vramplan bench run` with engine torch: plain PyTorch alone and under DDP (2 and 8 ranks of a fake group),
full and LoRA, four precisions, checkpointing, accumulation, AdamW one tensor at a time and fused, SGD, Adafactor, the
loss that shifts its logits (counted as if it copied all positions)."""


def test_plain_torch():
    compared = 0
    for record, found in covered(TORCH):
        measured = {phase.phase: phase for phase in record.measured.phases}
        assert found.train_allocated_peak_bytes == pytest.approx(record.measured.train_allocated_peak_bytes, rel=0.002)
        for phase in found.phases:
            name = f"{record.spec.id} {phase.phase}"
            if phase.phase != "model_load":  # a checkpoint that is read makes no second head
                assert phase.peak_bytes == pytest.approx(measured[phase.phase].allocated_peak_bytes, rel=0.003), name
            assert phase.end_bytes == pytest.approx(measured[phase.phase].allocated_end_bytes, rel=0.003), name
        compared += 1
    assert compared == 46


MASKED = Path(__file__).with_name("measured") / "cpu_masks.jsonl"
"""Taken by `vramplan train` on two ranks: packed documents, and padded sequences with their mask."""


def test_masks_of_packed_and_padded_sequences():
    compared = 0
    for record, found in covered(MASKED):
        measured = {phase.phase: phase for phase in record.measured.phases}
        for phase in found.phases:
            if phase.phase.endswith(("forward", "backward")):  # the rest is 0.7 MiB in all
                assert phase.peak_bytes == pytest.approx(measured[phase.phase].allocated_peak_bytes, rel=0.01)
                compared += 1
    assert compared == 2 * 2 * 2 * 2


TRAINER = Path(__file__).with_name("measured") / "cpu_trainer.jsonl"
"""Taken by `vramplan train` on two ranks and `--resume` after it: ZeRO 0 to 3, full and LoRA, under 0 to 2 a rate of
its own for each layer, and the last blocks alone; fp32 weights too, which lie in the mapped file as they are loaded.
Under ZeRO-3 the CPU's allocator does not see gloo let go of what it gathered."""
BETWEEN_STEPS = {"evaluation", "save", "resume", "export"}


def test_moments_between_steps():
    compared = 0
    for record, found in covered(TRAINER):
        predicted = {phase.phase: phase for phase in found.phases}
        for phase in record.measured.phases:
            name, peak = f"{record.spec.id} {phase.phase}", predicted[phase.phase].peak_bytes
            if phase.phase in BETWEEN_STEPS or (record.spec.zero.stage < 3 and phase.is_step):
                assert peak == pytest.approx(phase.allocated_peak_bytes, rel=0.02), name
                compared += phase.phase in BETWEEN_STEPS
        moments = [moment.name for moment in found.moments]
        assert moments[-1].startswith("resume" if "resume" in predicted and "export" not in predicted else "export")
    assert compared == 17 * 4 - 1


SMALLER = TRAINER.with_name("cpu_trainer_small.jsonl")
"""Taken by `vramplan train` on two ranks under ZeRO-3: models of 35 to 290 thousand parameters, so small that a table
is most of them, full and with adapters and modules saved whole. Between ranks of a CPU gloo copies what is gathered:
of the mixture's experts, which are most of it, that is more than the bar."""


def test_moments_between_steps_of_very_small_models():
    compared = 0
    for record, found in covered(SMALLER):
        predicted = {phase.phase: phase for phase in found.phases}
        measured = {phase.phase: phase for phase in record.measured.phases}
        for name in ("save", "evaluation", "export"):
            if name != "export" or record.spec.model.name != "tiny-mixtral":
                peak = measured[name].allocated_peak_bytes
                assert predicted[name].peak_bytes == pytest.approx(peak, rel=0.02), (record.id, name)
                compared += 1
        if record.spec.method.kind != "qlora":  # whose mapped file is still there
            end = measured["model_load"].allocated_end_bytes
            assert predicted["model_load"].end_bytes == pytest.approx(end, rel=0.02), record.id
            compared += 1
    assert compared == 4 * 4 - 2


@pytest.mark.parametrize("path", [QUANTIZED, QUANTIZED_ZERO3], ids=["zero012", "zero3"])
def test_loading_packs_weight_by_weight(path):
    for record in read_records(path):
        loading, measured = estimate_record(record).phases[0], record.measured.phases[0]
        assert loading.phase == measured.phase == "model_load"
        assert loading.peak_bytes == pytest.approx(measured.allocated_peak_bytes, rel=1e-3), record.id
