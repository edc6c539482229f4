"""What transformers' own classes say of their attention."""

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vramplan.facts.attention import has_attention
from vramplan.facts.families import architecture_from_config

from support.small_configs import SMALL


@pytest.mark.parametrize("model_type", dict(SMALL))
def test_what_a_family_has_is_what_its_class_says(model_type):
    family = architecture_from_config({"model_type": model_type, **dict(SMALL)[model_type]}).family
    says = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    assert has_attention(family, "eager")
    assert has_attention(family, "sdpa") == says._supports_sdpa
    assert has_attention(family, "flash_attention_2") == says._supports_flash_attn
