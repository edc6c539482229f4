"""Every method against forgetting, one row each: where it is, how it is asked for, what it costs in the ledger."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vramplan.memory import labels


@dataclass(frozen=True, slots=True)
class RetentionMethod:
    """``module``: the file in ``retain/`` with its formula and paper; ``fields``: a spec's that switch it on."""

    module: str
    fields: dict[str, Any]
    terms: tuple[str, ...] = ()
    """Headings of the ledger that it adds to full training; none: it keeps nothing."""
    adapters: bool = field(default=True)
    """Whether it goes with adapters."""


METHODS = (
    RetentionMethod(
        "ewc",
        {"retain": {"ewc": {"data": "builtin:python-reference", "samples": 4}}},
        (labels.ANCHORS, labels.FISHER),
    ),
    RetentionMethod("l2sp", {"retain": {"l2sp": {"weight": 0.1}}}, (labels.ANCHORS,)),
    RetentionMethod("kl", {"retain": {"kl": {"weight": 0.5}}}, (labels.KL, labels.REFERENCE)),
    RetentionMethod("layer_lr", {"retain": {"layer_lr_decay": 0.9}}),
    RetentionMethod(
        "early_stop",
        {"retain": {"early_stop": {"set": "general"}}, "data": {"eval_sets": {"general": "builtin:arithmetic"}}},
    ),
    RetentionMethod("interpolate", {"retain": {"interpolate": 0.3}}),
    RetentionMethod("freeze", {"method": {"kind": "full", "freeze": ["embed_tokens"]}}, adapters=False),
    RetentionMethod("expand", {"method": {"kind": "full", "new_blocks": 1}}, adapters=False),
)
"""They combine: their fields may be merged."""
