"""vramplan: says before launch whether a fine-tuning job fits, and plans, runs and measures it.

::

    import vramplan

    vramplan.fit("meta-llama/Llama-3.1-8B", seq_len=4096, hardware={"gpu": "h100", "gpus_per_node": 8})
    vramplan.plan("recipe.yaml").save("plan.yaml")
    vramplan.compare("records.jsonl").summary

Importing the package imports nothing else; a name brings what it needs when it is first used, and never torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vramplan.version import __version__

if TYPE_CHECKING:
    from vramplan.api import compare, estimate, fit, plan
    from vramplan.errors import VramplanError
    from vramplan.facts.device import Device, Node
    from vramplan.measure.compare import Comparison
    from vramplan.memory.ledger import Estimate
    from vramplan.search.fit import Fit
    from vramplan.search.plan import Plan
    from vramplan.spec.load import load_run
    from vramplan.spec.run import RunSpec

__all__ = [
    "Comparison",
    "Device",
    "Estimate",
    "Fit",
    "Node",
    "Plan",
    "RunSpec",
    "VramplanError",
    "__version__",
    "compare",
    "estimate",
    "fit",
    "load_run",
    "plan",
]

_HOMES = {
    "Comparison": "vramplan.measure.compare",
    "Device": "vramplan.facts.device",
    "Estimate": "vramplan.memory.ledger",
    "Fit": "vramplan.search.fit",
    "Node": "vramplan.facts.device",
    "Plan": "vramplan.search.plan",
    "RunSpec": "vramplan.spec.run",
    "VramplanError": "vramplan.errors",
    "compare": "vramplan.api",
    "estimate": "vramplan.api",
    "fit": "vramplan.api",
    "load_run": "vramplan.spec.load",
    "plan": "vramplan.api",
}
"""Where each name is defined; imported at its first use (PEP 562)."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vramplan' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
