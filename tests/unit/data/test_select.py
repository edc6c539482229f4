"""Planted faults, duplicates and look-alikes are found, each with its reason."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from vramplan.data.quality import compressed_frac, fault_of, repeated_line_frac, word_frac
from vramplan.data.select import gumbel_top, select
from vramplan.errors import DataError
from vramplan.spec.select import SelectSpec

pytest.importorskip("data_selection")
pytest.importorskip("datasketch")
SPEC = SelectSpec(pool="")
GOOD = topics["atom-identifiers"]


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (GOOD, None),
        ("короткий", "too short"),
        ("Это обычный текст на русском языке. " + topics["lambda"][:0] + "Он говорит о погоде, море и горах, " * 1
         + "а потом о книгах, городах, людях и о том, как долго длится зимний вечер у огня в старом доме, где живут "
         "рыбак, его жена и их дочь, которая учится читать по вечерам при свече.", None),
        ("{}[]();" * 100, "few letters"),
        ("\n".join(["one line that comes again"] * 20 + ["another", "lines"]), "repeated lines"),
        ("again and " * 200, "repeats itself"),
    ],
)  # fmt: skip
def test_faults(text, fault):
    assert fault_of(text, SPEC) == fault


def test_measures():
    assert word_frac("ab 1!") == 0.8
    assert repeated_line_frac("aa\nbb\naa\n") == pytest.approx(1 / 3)
    assert compressed_frac("ab" * 1000) < 0.05
    assert fault_of("x" * 300, SelectSpec(pool="", max_chars=299)) == "too long"


def test_duplicates_are_dropped_and_named(tmp_path):
    near = GOOD + " One more sentence at the end."
    pool = write(tmp_path / "pool.jsonl", [GOOD, GOOD.upper().replace("\n", "  \n"), near, topics["lambda"], "x"])
    found = select(SelectSpec(pool=pool, near_duplicate=0.7), tmp_path / "out.jsonl")
    assert found["dropped"] == {"exact duplicate": 1, "near duplicate": 1, "too short": 1}
    assert found["examples"]["near duplicate"] == [f"{pool} line 3"]
    kept = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["source"] for row in kept] == [f"{pool} line 1", f"{pool} line 4"]
    exact_only = select(SelectSpec(pool=pool, near_duplicate=1), tmp_path / "exact.jsonl")
    assert "near duplicate" not in exact_only["dropped"]
    fewer = select(SelectSpec(pool=pool, near_duplicate=0.7, count=1), tmp_path / "fewer.jsonl")
    assert fewer["num_chosen"] + sum(fewer["dropped"].values()) == fewer["num_pool"]
    assert fewer["dropped"]["not drawn"] == 1


def test_what_resembles_the_target_is_chosen(tmp_path):
    ordered = [text[:1500] for _, text in sorted(topics.items()) if len(text) >= 1500][:24]
    other = [" ".join(reversed(text.split())).replace("e", "q") for text in ordered[12:]]
    pool = write(tmp_path / "pool.jsonl", [*other, *ordered[:8]])
    target = write(tmp_path / "target.jsonl", ordered[8:12])
    spec = SelectSpec(pool=pool, target=target, count=5, near_duplicate=1)
    found = select(spec, tmp_path / "out.jsonl")
    lines = [int(json.loads(line)["source"].split()[-1]) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert set(lines) <= set(range(len(other) + 1, len(other) + 9))
    assert len(lines) == found["num_chosen"]
    assert found["mean_log_importance"]["chosen"] > found["mean_log_importance"]["pool"]
    assert select(spec, tmp_path / "again.jsonl")["dropped"] == found["dropped"]
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_draws_follow_the_scores_and_the_seed():
    import numpy as np

    scores = np.array([0.0, 50.0, 0.0, 50.0])
    assert gumbel_top(scores, 2, seed=1) == [1, 3]
    assert len({tuple(gumbel_top(np.zeros(30), 5, seed)) for seed in range(10)}) > 5


def test_what_cannot_be_chosen_from(tmp_path):
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"prompt": "p", "completion": "c"}\n')
    with pytest.raises(DataError, match="selection is of raw text, but this is a completion row"):
        select(SelectSpec(pool=str(chats)), tmp_path / "out.jsonl")
    short = write(tmp_path / "short.jsonl", ["a", "b"])
    with pytest.raises(DataError, match=r"no document of 2 passes the filters \(2 too short\); loosen min_chars with"):
        select(SelectSpec(pool=short), tmp_path / "out.jsonl")


def test_what_is_there_already_is_not_written_over(tmp_path):
    pool = write(tmp_path / "pool.jsonl", [GOOD])
    before = Path(pool).read_bytes()
    with pytest.raises(DataError, match=r"pool\.jsonl exists: give another file with -o"):
        select(SelectSpec(pool=pool), tmp_path / "pool.jsonl")
    assert Path(pool).read_bytes() == before
