#!/usr/bin/env python3
"""Builds the catalogue's data files from collected facts.

usage: python scripts/build_catalogue.py SRC_DIR

SRC_DIR holds ``models.json`` and ``gpus.json`` as collected from public sources. Written: ``models.json`` and
``gpus.json`` in ``vramplan/facts/data/``, with ``scripts/catalogue_extra.json`` added. A model's own count of
parameters is left out on purpose: what vramplan answers is what vramplan counts.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL_KEYS = ("name", "config", "params_published", "params_verified", "source", "confidence", "unsure", "note")
GPU_KEYS = (
    "name",
    "vendor",
    "memory_nominal_gb",
    "memory_driver_mib",
    "bf16_tflops_dense",
    "fp16_tflops_dense",
    "fp32_tflops",
    "memory_bandwidth_gbps",
    "nvlink_gbps_bidirectional",
    "compute_capability",
    "sources",
    "note",
)
MIB = 2**20
LARGE_GB = 24
_COLLECTION_ID = re.compile(r",? index id \d+|\s*\((?:index id|files?) [\d, ]+\)")
_KIND = {"NVIDIA": "cuda", "AMD": "rocm", "Intel": "hpu"}


def main(source_dir: Path) -> None:
    extra = json.loads((ROOT / "scripts/catalogue_extra.json").read_text())
    models = [trimmed_model(model) for model in json.loads((source_dir / "models.json").read_text())]
    gpus = json.loads((source_dir / "gpus.json").read_text())
    write("models.json", models + extra["models"])
    write("gpus.json", [trimmed_gpu(gpu, gpus) for gpu in gpus])


def trimmed_model(model: dict[str, Any]) -> dict[str, Any]:
    return {key: without_ids(model[key]) for key in MODEL_KEYS if model.get(key)}


def trimmed_gpu(gpu: dict[str, Any], gpus: list[dict[str, Any]]) -> dict[str, Any]:
    usable, basis = usable_bytes(gpu, gpus)
    row = {key: without_ids(gpu[key]) for key in GPU_KEYS if gpu.get(key) is not None}
    row["kind"] = _KIND[gpu["vendor"]]
    row["memory_bytes"] = gpu["memory_bytes"] or usable
    row["memory_usable_bytes"] = usable
    row["memory_usable_basis"] = basis
    return row


def usable_bytes(gpu: dict[str, Any], gpus: list[dict[str, Any]]) -> tuple[int, str]:
    """Most that torch can allocate on the card, and how that is known."""
    if gpu["memory_usable_bytes"]:
        return gpu["memory_usable_bytes"], "lowest torch total_memory seen"
    if gpu["memory_bytes"]:
        for twin in gpus:
            if twin["memory_usable_bytes"] and twin["memory_bytes"] == gpu["memory_bytes"]:
                return twin["memory_usable_bytes"], f"assumed as {twin['name']}, whose driver reports the same total"
        # The driver keeps a larger share of a small card, so a small card says nothing of a large one.
        ratio = min(seen_share(other) for other in gpus if seen_share(other) and same_class(other, gpu))
        return int(gpu["memory_bytes"] * ratio), f"assumed {ratio:.4f} of the driver's total, the lowest share seen"
    return gpu["memory_nominal_gb"] * 10**9, "assumed the nominal decimal gigabytes; no driver figure seen"


def seen_share(gpu: dict[str, Any]) -> float:
    """Usable share of the driver's total where both were seen, else 0."""
    both = gpu["memory_usable_bytes"] and gpu["memory_driver_mib"]
    return gpu["memory_usable_bytes"] / (gpu["memory_driver_mib"] * MIB) if both else 0.0


def same_class(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool((one["memory_nominal_gb"] >= LARGE_GB) == (other["memory_nominal_gb"] >= LARGE_GB))


def without_ids(value: object) -> object:
    """Text without the collection's own file numbers, which mean nothing elsewhere."""
    return _COLLECTION_ID.sub("", value) if isinstance(value, str) else value


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """One row a line, so that a change of one model is a change of one line."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    target = ROOT / "vramplan/facts/data" / name
    target.write_text(f"[\n{lines}\n]\n")
    print(f"{target.relative_to(ROOT)}: {len(rows)} rows, {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
