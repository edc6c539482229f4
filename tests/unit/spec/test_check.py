"""Keys that do not go together are refused before anything is planned for them."""

from __future__ import annotations

import pytest

from vramplan.errors import LegalityError, SpecError
from vramplan.spec.check import check_run
from vramplan.spec.load import run_from_mapping

WEIGHTED = {"train": {"path": "a.jsonl", "weight_column": "w"}}


@pytest.mark.parametrize("loss", ["chunked", "liger"])
@pytest.mark.parametrize(
    ("data", "key"),
    [
        ({"hard_examples": {}}, "data.hard_examples"),
        (WEIGHTED, "weight_column"),
        ({"replay": WEIGHTED["train"]}, "weight_column"),
    ],
)
def test_what_weighs_tokens_needs_the_loss_of_each(loss, data, key):
    with pytest.raises(LegalityError, match=rf"{key} weighs the loss of each token, and loss {loss} gives"):
        check_run(run_from_mapping({"model": "x", "loss": loss, "data": data}))
    check_run(run_from_mapping({"model": "x", "data": data}))
    check_run(run_from_mapping({"model": "x", "loss": loss}))


def test_a_setting_that_the_allocator_does_not_have_is_refused():
    with pytest.raises(SpecError, match="alloc_conf: 'foo' is not known here; known are expandable_segments"):
        check_run(run_from_mapping({"model": "x", "alloc_conf": "foo"}))
    check_run(run_from_mapping({"model": "x", "alloc_conf": "expandable_segments:True,max_split_size_mb:128"}))
