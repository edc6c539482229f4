"""A rank's share of a model on the tape."""

from __future__ import annotations

from tests.support.small_configs import SMALL
from vramplan.facts.dtype import Dtype
from vramplan.facts.families import architecture_from_config
from vramplan.memory.model_run import ModelRun
from vramplan.memory.profile import Runner
from vramplan.memory.tensor_parallel import split
from vramplan.memory.views import GRADIENTS
from vramplan.spec.trainable import FullMethod

LLAMA = {"model_type": "llama", **next(fields for family, fields in SMALL if family == "llama")}


def test_an_input_gradient_waits_to_be_summed_over_the_ranks_while_the_weights_gradient_is_handed_over():
    """``ColumnParallel`` was applied before the weight was transposed, so backward comes to it after the weight's
    gradient: those of both products of the MLP and of the residual stream are there then."""
    architecture = architecture_from_config(LLAMA)
    found = {}
    for degree in (1, 2):
        run = ModelRun(split(architecture, degree), FullMethod(), Dtype.BF16, None, "cuda", "sdpa", True, False)
        gradients = Runner(run).micro_batch().gradients
        at = next(each.at for each in gradients if each.name.endswith("mlp.gate_proj.weight"))
        found[degree] = at.by_label[GRADIENTS][1] / (architecture.hidden_size * Dtype.BF16.nbytes)
    assert found == {1: 2, 2: 3}
