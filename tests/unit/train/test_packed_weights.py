"""Weights that lie in a file in 8 bits are written out in the run's precision, and those are trained."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from vramplan.spec.load import run_from_mapping
from vramplan.train.model import pretrained, written_out

BLOCK = 32


def stored_in_fp8(directory: Path) -> dict[str, torch.Tensor]:
    """A small Llama whose linears are stored as DeepSeek-V3's are, 8 bits and a scale a block; its weights as the file
    says them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96, vocab_size=128
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    stored, said = {}, {}
    for name, weight in load_file(directory / "model.safetensors").items():
        if "_proj" not in name:
            stored[name] = said[name] = weight
            continue
        blocks = weight.float().unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))  # rows, row, columns, column
        scales = blocks.abs().amax(dim=(1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        eighth = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        stored[name] = eighth.flatten(2).flatten(0, 1)
        stored[f"{name}_scale_inv"] = scales
        said[name] = (eighth.float() * scales[:, None, :, None]).flatten(2).flatten(0, 1).to(torch.bfloat16)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((directory / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
    (directory / "config.json").write_text(json.dumps(fields))
    return said


def test_weights_stored_in_8_bits_are_written_out_and_trained(tmp_path):
    said = stored_in_fp8(tmp_path)
    # on a CPU transformers writes them out unasked, on a GPU with 8-bit products it would not
    assert written_out(tmp_path)["quantization_config"].dequantize
    run = run_from_mapping({"model": str(tmp_path), "method": "full", "precision": "bf16", "seq_len": 16})
    model = pretrained(run, tmp_path)
    found = dict(model.named_parameters())
    assert set(found) <= set(said) | {"lm_head.weight"}
    for name, param in found.items():
        assert param.dtype is torch.bfloat16
        assert param.requires_grad
        if name in said:
            torch.testing.assert_close(param.detach(), said[name], rtol=0.01, atol=1e-6)
    tokens = torch.arange(16)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(param.grad is not None for param in model.parameters())
