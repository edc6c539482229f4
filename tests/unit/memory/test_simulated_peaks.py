"""Peaks of single phases beside what the simulator gave (`python benchmarks/matrix.py`), where they once differed."""

import pytest

from support.matrix import Case, Prepared, prepare

SIMULATED = {
    # OPT's layer calls the linears of its MLP itself: the norm's result has no name once the first returned, and the
    # first layer's input none once that layer returned
    ("opt.5/qlora/2/none/eager/fp32/padded/cuda/4/2/2/sgd/none/default/kept", "step1.micro1.forward"): 204_132_656,
    ("opt.7/dora/1/none/sdpa/bf16-autocast/none/cuda/4/1/2/adamw_torch/optimizer/small/kept", "step1.micro1.forward"): (
        188_901_424
    ),
    ("gpt2.0/dropout/1/none/eager/fp32/none/cpu/4/1/1/sgd/none/small/kept", "step1.micro1.forward"): 388_505_600,
    # a lone rank too copies what a module reads of others in its first forward
    ("falcon.11/dora/3/none/sdpa/fp32/none/cpu/1/2/2/adamw/optimizer/small/kept", "step1.micro1.forward"): 409_831_841,
    ("falcon.11/dora/3/none/sdpa/fp32/none/cpu/1/2/2/adamw/optimizer/small/kept", "step1.micro2.forward"): 401_443_233,
    # recomputing ends before its last product runs, on the CPU too
    ("phi.31/dropout/0/full/sdpa/bf16/padded/cpu/1/2/1/adamw/none/small/let go", "step1.micro1.backward"): 126_974_864,
    # BLOOM names what its table gives, not what its norm makes of it
    ("bloom.8/lora/0/none/eager/bf16-autocast/padded/cpu/1/1/2/adamw/none/default/let go", "step1.micro1.forward"): (
        261_865_476
    ),
    # what an adapter's dropout gives goes when lora_A returns
    ("gemma2.27/dropout/1/full/eager/bf16-autocast/padded/cpu/1/2/1/sgd/none/small/let go", "step1.micro1.backward"): (
        486_910_036
    ),
    # on the CPU dropout saves its mask before it makes its result
    ("gpt2.1/expanded/0/full/eager/bf16/none/cpu/1/2/1/adamw_torch/none/default/kept", "step1.micro1.backward"): (
        256_115_580
    ),
    # Falcon names the result of each of its two norms, and hands the kernel a copy of the keys for every head
    (
        "falcon.10/lora/1/full/sdpa/fp32/padded/cpu/1/1/1/sgd/optimizer/small/let go",
        "step1.micro1.forward",
    ): 141_101_184,
    (
        "falcon.11/frozen/1/none/flash_attention_2/bf16-autocast/none/cuda/1/1/1/sgd/none/small/kept",
        "step1.micro1.backward",
    ): 211_958_328,
    # bitsandbytes' linear names the input that it cast until it returns
    ("granite.42/qlora/1/full/sdpa/bf16-autocast/none/cuda/4/2/1/sgd/none/small/let go", "step1.micro1.backward"): (
        110_400_060
    ),
    # BLOOM's modules add to the residual themselves, while their own names stand
    ("bloom.8/frozen/1/none/eager/bf16-autocast/none/cpu/4/2/1/sgd/none/small/let go", "step1.micro1.forward"): (
        289_645_568
    ),
    # Phi names what the embedding's dropout gives
    (
        "phi.31/dora/3/none/sdpa/bf16-autocast/none/cuda/1/2/1/adamw/both/small/kept",
        "step1.micro1.forward",
    ): 322_534_984,
    # autocast's copies of queries, keys and values go when the kernel returns
    (
        "stablelm.35/qlora/2/full/flash_attention_2/bf16-autocast/none/cuda/4/2/2/adamw/optimizer/small/kept",
        "step1.micro1.forward",
    ): 82_314_068,
    # autocast caches its copy of the embeddings' output, a leaf under checkpointing that OLMo-2's projections read
    (
        "olmo2.38/dora/1/full/flash_attention_2/bf16-autocast/padded/cuda/4/1/2/adamw_torch/none/default/kept",
        "step1.micro1.forward",
    ): 148_156_160,
    # Gemma-3 normalises queries and keys when all three projections are there
    (
        "gemma3_text.29/full/3/full/flash_attention_2/fp16/packed/cuda/1/1/1/adamw_torch/none/small/let go",
        "step1.micro1.forward",
    ): 1_022_576_771,
    # a bias is added like any other operand: on the CPU to a copy of the product in its format
    (
        "falcon.12/expanded/1/none/eager/bf16-autocast/none/cpu/4/1/1/adamw_torch/none/default/let go",
        "step1.micro1.forward",
    ): 304_583_936,
    # with offload of weights no part stays on the device as a tensor is cut
    ("qwen2.18/qlora/3/none/flash_attention_2/fp16/padded/cuda/4/1/1/sgd/both/small/let go", "engine_init"): 22_051_092,
    # what recomputing saved of a weight for DeepSpeed's linear goes before its gradients are cast
    (
        "opt.5x2/expanded/3/full/sdpa/bf16-autocast/none/cuda/4/1/2/adamw/optimizer/small/kept",
        "step1.micro1.backward",
    ): 102_085_544,
    # where rotary positions join halves, heads lie before positions already, and no product copies them
    ("glm.43x2/qlora/0/none/sdpa/fp32/none/cuda/1/2/1/sgd/none/default/let go", "step1.micro1.forward"): 267_593_288,
}
"""``(case, phase)``: bytes."""


@pytest.mark.parametrize(("key", "phase"), SIMULATED)
def test_the_estimate_is_what_was_simulated(key: str, phase: str):
    found = prepare(Case.parse(key))
    assert isinstance(found, Prepared), found
    (peak,) = [each.peak_bytes for each in found.estimate.phases if each.phase == phase]
    assert peak == pytest.approx(SIMULATED[key, phase], rel=0.001)


def test_the_first_gradient_is_there_as_the_bucket_is_made():
    """Under ZeRO-2, whose later gradients find the bucket and leave it (stage_1_and_2.py, ``setup_buckets``)."""
    found = prepare(
        Case.parse("starcoder2.48/expanded/2/none/sdpa/bf16-autocast/none/cuda/4/2/1/sgd/optimizer/default/kept")
    )
    assert isinstance(found, Prepared), found
    (peak,) = [each.peak_bytes for each in found.estimate.phases if each.phase == "step1.micro1.backward"]
    assert peak == pytest.approx(4_180_789_536, rel=0.00001)
