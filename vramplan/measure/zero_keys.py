"""DeepSpeed's names of its ZeRO keys, as records have them (deepspeed 0.19.8, runtime/zero/config.py)."""

from __future__ import annotations

from typing import Any

_OTHER_NAMES = {
    "zero_hpz_partition_size": "hpz_partition_size",
    **{
        name: f"stage3_{name}"
        for name in (
            "prefetch_bucket_size",
            "param_persistence_threshold",
            "model_persistence_threshold",
            "max_live_parameters",
            "max_reuse_distance",
            "gather_16bit_weights_on_model_save",
            "module_granularity_threshold",
            "use_all_reduce_for_fetch_params",
            "allgather_sequential",
        )
    },
}
"""Names that are not those of ``ZeroSpec``."""


def renamed(zero: dict[str, Any]) -> dict[str, Any]:
    """A section with the names of ``ZeroSpec``; offload that is a section of its own is told by its device."""
    found = {_OTHER_NAMES.get(name, name): value for name, value in zero.items()}
    for name in ("offload_optimizer", "offload_param"):
        section = found.get(name)
        if isinstance(section, dict) and not section.keys() - {"device", "pin_memory"}:
            found[name] = section.get("device", "none")
    return found
