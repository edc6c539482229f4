"""Packed documents do not see each other, where a family's architecture says so (``masks_by_document``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vramplan.facts.families import architecture_from_config

from support.small_configs import SMALL

FIRSTS = dict(reversed(SMALL))
HALF = 8
"""Tokens of each of two documents."""


def _logits_of_second(model: Any, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """What the model makes of the second document behind the first."""
    ids = torch.cat([first, second], dim=1)
    positions = torch.arange(HALF).repeat(2)[None]
    found: torch.Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, HALF:]
    return found


@pytest.mark.parametrize("family", FIRSTS)
def test_documents_are_told_apart_where_the_architecture_says_so(family: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {**FIRSTS[family], "pad_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    one, other, second = (torch.randint(1, 100, (1, HALF)) for _ in range(3))
    with torch.no_grad():
        behind_one, behind_other = (_logits_of_second(model, first, second) for first in (one, other))
    apart = torch.allclose(behind_one, behind_other, atol=1e-5)
    assert apart is architecture_from_config({"model_type": family, **fields}).masks_by_document
