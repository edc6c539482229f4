"""ZeRO-3 keeps one bucket for each format in which gradients travel (stage3.py, ``get_all_comm_dtypes``)."""

import pytest

from vramplan.memory import labels

from support.matrix import BUCKETS, Case, Prepared, prepare

NUMEL = BUCKETS["small"]["reduce_bucket_size"]


@pytest.mark.parametrize(("method", "num_bytes"), [("lora", 2), ("dora", 2 + 4)])
def test_magnitudes_in_fp32_have_a_bucket_beside_that_of_autocast(method: str, num_bytes: int):
    """Adapters' factors are in linears, so they travel in autocast's bf16; DoRA's magnitudes are not."""
    found = prepare(
        Case.parse(f"gemma.26/{method}/3/none/eager/bf16-autocast/padded/cpu/4/2/1/adamw/none/small/let go")
    )
    assert isinstance(found, Prepared), found
    (init,) = [moment for moment in found.estimate.moments if moment.name.startswith("engine_init")]
    assert {term.name: term.num_bytes for term in init.terms}[labels.BUCKET] == num_bytes * NUMEL
