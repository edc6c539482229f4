"""The estimate's modules are those that the model calls: ZeRO-3 listens to each, with weights or without."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.small_configs import SMALL
from vramplan.facts.device import Device, Node
from vramplan.facts.families import architecture_from_config
from vramplan.memory.from_run import job_from_run
from vramplan.memory.gathers import LEAF_FAMILIES, Gathers
from vramplan.memory.profile import Runner
from vramplan.spec.layout import Layout
from vramplan.spec.run import RunSpec

NODE = Node(Device("some GPU", "cuda", 80 * 2**30, 80 * 2**30), 8)
CASES = [
    (f"{family}.{number}", {"model_type": family, **fields}, attention)
    for number, (family, fields) in enumerate(SMALL)
    if family not in LEAF_FAMILIES  # there what is called within the leaf is not listened to
    for attention in ("eager", "sdpa")
    if (family, attention) not in (("bloom", "sdpa"), ("gpt_oss", "sdpa"))  # they have no such attention
]


def called_in_the_model(config, attention):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation=attention)
    called = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    tokens = torch.zeros(2, 8, dtype=torch.long)
    model.train()(input_ids=tokens, labels=tokens, use_cache=False)
    return called


def called_in_the_estimate(config, attention, monkeypatch):
    run = RunSpec(
        model="small",
        model_config_fields=config,
        micro_batch_size=2,
        grad_accum_steps=1,
        seq_len=8,
        attention=attention,
        activation_checkpointing="none",
        zero={"stage": 3},
        layout=Layout(dp=2),
    )
    called = []
    listening = Gathers.before_forward
    monkeypatch.setattr(
        Gathers, "before_forward", lambda self, module: (called.append(module), listening(self, module))
    )
    runner = Runner(job_from_run(run, NODE, architecture_from_config(config)).model_run)
    runner.shown = set(range(len(runner.keys)))  # every layer is run
    runner.micro_batch()
    return called


@pytest.mark.parametrize(("config", "attention"), [case[1:] for case in CASES], ids=[f"{a}-{c}" for a, _, c in CASES])
def test_as_many_modules_as_the_model_calls(config, attention, monkeypatch):
    config = {"pad_token_id": 0, **config}
    assert len(called_in_the_estimate(config, attention, monkeypatch)) == len(called_in_the_model(config, attention))
