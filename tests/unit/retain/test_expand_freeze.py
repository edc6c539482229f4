"""Block expansion on real (tiny) models: the new blocks change nothing, and only they are trained."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from vramplan.errors import SpecError
from vramplan.facts.expansion import new_block_positions
from vramplan.retain.expand import expand_model_directory
from vramplan.retain.freeze import freeze
from vramplan.spec.trainable import FullMethod

from support.tiny_model import save_tiny_model


def gpt2(directory):
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=64)).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(("save", "layers", "new"), [(save_tiny_model, 2, 1), (save_tiny_model, 2, 2), (gpt2, 3, 2)])
def test_an_expanded_model_says_what_the_base_says(tmp_path, save, layers, new):
    base, target = save(tmp_path / "base"), tmp_path / "expanded"
    target.mkdir()
    expand_model_directory(base, target, new)
    ids = torch.arange(20)[None]
    before, after = AutoModelForCausalLM.from_pretrained(base), AutoModelForCausalLM.from_pretrained(target)
    assert after.config.num_hidden_layers == layers + new
    with torch.no_grad():
        assert torch.allclose(before(ids).logits, after(ids).logits, atol=1e-6)
    freeze(after, FullMethod(new_blocks=new))
    trained = {name.split(".")[2] for name, param in after.named_parameters() if param.requires_grad}
    assert trained == {str(position) for position in new_block_positions(layers, new)}


def test_positions_spread_evenly():
    assert new_block_positions(32, 8) == (4, 9, 14, 19, 24, 29, 34, 39)  # LLaMA-Pro's 40 blocks
    assert new_block_positions(2, 2) == (1, 3)
    with pytest.raises(SpecError, match="new_blocks 3 is more than the 2"):
        new_block_positions(2, 3)


def test_freezing_by_pattern_and_by_last_blocks(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "tiny"))
    freeze(model, FullMethod(train_last_blocks=1, freeze=("mlp",)))
    trained = [name for name, param in model.named_parameters() if param.requires_grad]
    assert trained
    assert all(name.startswith("model.layers.1.") and "mlp" not in name for name in trained)
    with pytest.raises(SpecError, match="leaves nothing to train"):
        freeze(model, FullMethod(freeze=("",)))
    with pytest.raises(SpecError, match="train_last_blocks 3 is more than the 2"):
        freeze(model, FullMethod(train_last_blocks=3))
