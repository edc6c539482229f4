"""DeepSpeed's Adam on the host makes the same step whatever steps its process made before."""

from __future__ import annotations

import json
import os
import subprocess
import sys

STEPS = """
import json, torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
from vramplan.train.host_adam import forget_powers

def stepped(optimizer, numbers):
    weight = optimizer.param_groups[0]["params"][0]
    for number in numbers:
        draws = torch.Generator().manual_seed(number)
        weight.data.normal_(generator=draws)
        weight.grad = torch.randn(20_000, generator=draws)
        for state in optimizer.state.values():
            state["step"] = number - 1
            state["exp_avg"].normal_(generator=draws)
            state["exp_avg_sq"].uniform_(0.5, 1.5, generator=draws)
        optimizer.step()
    return weight.data.clone()

def of(kind, **options):
    weight = torch.nn.Parameter(torch.zeros(20_000))
    return kind([{"params": [weight], "lr": 0.1, "betas": (0.9, 0.999), **options}])

def muon_with(kind):
    return of(lambda groups: MuonWithAuxAdam(groups, adam_optimizer=kind), use_muon=False)

found = {}
for name, optimizer in {
    "FusedAdam": of(FusedAdam),
    "DeepSpeedCPUAdam": of(DeepSpeedCPUAdam),
    "Muon's FusedAdam": muon_with(FusedAdam),
    "Muon's DeepSpeedCPUAdam": muon_with(DeepSpeedCPUAdam),
}.items():
    stepped(optimizer, [1])  # makes its states
    one_by_one, at_once = stepped(optimizer, range(2, 60)), stepped(optimizer, [7, 59])
    forget_powers(optimizer, torch.device("cpu"))
    found[name] = {
        "as it is": torch.equal(one_by_one, at_once),
        "mended": all(torch.equal(stepped(optimizer, steps), at_once) for steps in (range(2, 60), [59])),
    }
other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))])
forget_powers(other, torch.device("cpu"))
assert set(vars(other)) == set(vars(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))])))
print(json.dumps(found))
"""


def test_a_step_depends_on_its_number_alone():
    run = subprocess.run(
        [sys.executable, "-c", STEPS],
        capture_output=True,
        text=True,
        timeout=600,  # the extensions may have to be compiled
        check=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )
    found = json.loads(run.stdout.splitlines()[-1])
    mended = {"as it is": False, "mended": True}
    kinds = ("FusedAdam", "DeepSpeedCPUAdam", "Muon's FusedAdam", "Muon's DeepSpeedCPUAdam")
    assert found == dict.fromkeys(kinds, mended)
