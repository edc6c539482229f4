"""Tiled MLPs and layers' inputs on the host: another way to the same gradients."""

import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vramplan.errors import SpecError
from vramplan.rank.model import add_adapters, apply_kernels, checkpoint_layers
from vramplan.rank.tiled import tile_mlps
from vramplan.spec.run import RunSpec

SEQ_LEN = 40


def small_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=64,
            attn_implementation="eager",
        )
    )


def run(**fields):
    return RunSpec.model_validate({"model": "small", "seq_len": SEQ_LEN, **fields})


def gradients(model, length, batch=2):
    ids = torch.arange(batch * length).reshape(batch, length) % 64
    model.train()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: param.grad for name, param in model.named_parameters()}


@pytest.mark.parametrize("length", [SEQ_LEN, 4], ids=["whole", "shorter than the stretches are many"])
def test_a_tiled_mlp_gives_the_same_gradients(length):
    expected = gradients(small_model(), length)
    model = small_model()
    tile_mlps(model, run(tiled_mlp=True))
    found = gradients(model, length)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


def test_every_stretch_of_a_tiled_mlp_is_as_long_as_the_model_is_wide():
    model = small_model()
    tile_mlps(model, run(tiled_mlp=True))
    seen = []
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[-2]))
    gradients(model, SEQ_LEN, batch=1)
    assert seen == [14, 14, 12] * 2  # forward, and backward again


def test_a_model_without_llamas_mlp_cannot_be_tiled():
    with pytest.raises(SpecError, match="gate_proj, up_proj and down_proj"):
        tile_mlps(torch.nn.Linear(2, 2), run(tiled_mlp=True))


def test_layer_inputs_pass_the_host_and_gradients_stay():
    expected = gradients(small_model(), SEQ_LEN)
    model = small_model()
    checkpoint_layers(model, run(activation_checkpointing="full", offload_activations="cpu"))
    packed = []
    hooks = torch.autograd.graph.save_on_cpu
    try:
        torch.autograd.graph.save_on_cpu = lambda: torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: packed.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor
        )
        found = gradients(model, SEQ_LEN)
    finally:
        torch.autograd.graph.save_on_cpu = hooks
    assert packed.count((2, SEQ_LEN, 16)) == 2  # each layer's input, and nothing else of that size
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("every", "recomputed"), [(1, [True, True]), (2, [True, False])])
def test_one_layer_of_so_many_is_recomputed(every, recomputed, reentrant):
    expected = gradients(small_model(), SEQ_LEN)
    model = small_model()
    checkpoint_layers(
        model, run(activation_checkpointing="full", checkpoint_every=every, checkpoint_reentrant=reentrant)
    )
    assert [layer.gradient_checkpointing for layer in model.model.layers] == recomputed
    for name, gradient in gradients(model, SEQ_LEN).items():
        torch.testing.assert_close(expected[name], gradient)


def test_the_chunked_loss_is_the_models_own_number():
    expected = gradients(small_model(), SEQ_LEN)
    model = small_model()
    apply_kernels(model, run(loss="chunked"))
    assert type(model.loss_function).__name__ == "ChunkedCausalLMLoss"
    for name, gradient in gradients(model, SEQ_LEN).items():
        torch.testing.assert_close(expected[name], gradient)
    model.loss_function = torch.nn.functional.cross_entropy
    with pytest.raises(SpecError, match="use hf"):
        apply_kernels(model, run(loss="chunked"))


def test_ligers_kernels_go_into_the_model_that_adapters_wrap(monkeypatch):
    """Its functions look for the layers of a causal language model, which PEFT's wrapper does not show."""
    given = []
    package = SimpleNamespace(_apply_liger_kernel_to_instance=lambda model, **_: given.append(model))
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(transformers=package))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    plain, asked = small_model(), run(loss="liger", method={"kind": "lora", "r": 2})
    apply_kernels(plain, asked)
    apply_kernels(add_adapters(plain, asked.method), asked)
    assert given == [plain, plain]
