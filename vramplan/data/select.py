"""Choosing documents of a pool: filters, exact and near duplicates, and likeness to a target by importance resampling
(DSIR, Xie et al. 2023, arXiv:2302.03169; PyPI ``data-selection``). Needs the extra ``select``.

``python -m vramplan.data.select OUTPUT``: a SelectSpec as JSON on stdin, the report as JSON on stdout.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vramplan.data.quality import FILTERS, fault_of
from vramplan.data.row import Text
from vramplan.data.tables import iter_rows
from vramplan.errors import DataError, VramplanError
from vramplan.spec.data import SourceSpec
from vramplan.spec.select import SelectSpec

_NUM_PERM = 128
_RUN_WORDS = 5
_EXAMPLES = 3


@dataclass(slots=True)
class Report:
    """How many documents were dropped for which reason, with a few names of each."""

    num_pool: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, name: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        names = self.examples.setdefault(reason, [])
        if len(names) < _EXAMPLES:
            names.append(name)

    def of(self, kept: list[Text], picked: list[int], reason: str) -> list[Text]:
        """The picked ones, in order; the others are dropped."""
        for index in sorted(set(range(len(kept))) - set(picked)):
            self.drop(reason, kept[index].where)
        return [kept[index] for index in picked]


def select(spec: SelectSpec, output: Path) -> dict[str, Any]:
    """Writes the chosen documents to ``output`` (JSONL of ``text`` and ``source``); the report as plain data.

    Raises:
        DataError: a source is no raw text, nothing passes, ``output`` exists (it may be the pool), or the extra is not
            installed.
    """
    _need_extra()
    if output.exists():
        raise DataError(f"{output} exists: give another file with -o")
    report = Report()
    kept = _without_duplicates(_good(spec, report), spec, report)
    if not kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items())
        keys = " and ".join(FILTERS[reason] for reason in report.dropped)
        raise DataError(
            f"{spec.pool}: no document of {report.num_pool} passes the filters ({reasons}); loosen {keys} with --set"
        )
    chosen, likeness = kept, None
    if spec.target is not None:
        target = [row.text for row in _texts(spec.target)]
        scores = log_importance([row.text for row in kept], target)
        picked = gumbel_top(scores, min(spec.count or max(1, len(kept) // 10), len(kept)), spec.seed)
        chosen = report.of(kept, picked, "unlike the target")
        likeness = {"chosen": float(scores[picked].mean()), "pool": float(scores.mean())}
    elif spec.count is not None:
        picked = gumbel_top(np.zeros(len(kept)), min(spec.count, len(kept)), spec.seed)
        chosen = report.of(kept, picked, "not drawn")
    _write(output, chosen)
    return {
        "pool": spec.pool,
        "target": spec.target,
        "num_pool": report.num_pool,
        "num_chosen": len(chosen),
        "dropped": report.dropped,
        "examples": report.examples,
        "mean_log_importance": likeness,
        "output": str(output),
    }


def _texts(path: str) -> Iterable[Text]:
    for row in iter_rows(SourceSpec(path=path)):
        if not isinstance(row, Text):
            raise DataError(f"{row.where}: selection is of raw text, but this is a {type(row).__name__.lower()} row")
        yield row


def _good(spec: SelectSpec, report: Report) -> Iterable[Text]:
    for row in _texts(spec.pool):
        report.num_pool += 1
        fault = fault_of(row.text, spec)
        if fault is None:
            yield row
        else:
            report.drop(fault, row.where)


def _without_duplicates(rows: Iterable[Text], spec: SelectSpec, report: Report) -> list[Text]:
    """The first of each set of (near) duplicates."""
    from datasketch import MinHash, MinHashLSH

    seen: set[bytes] = set()
    sketches = MinHashLSH(threshold=spec.near_duplicate, num_perm=_NUM_PERM) if spec.near_duplicate < 1 else None
    kept: list[Text] = []
    for row in rows:
        words = row.text.casefold().split()
        exact = hashlib.blake2b(" ".join(words).encode(), digest_size=16).digest()
        if exact in seen:
            report.drop("exact duplicate", row.where)
            continue
        seen.add(exact)
        if sketches is not None:
            sketch = MinHash(num_perm=_NUM_PERM, seed=spec.seed + 1)
            sketch.update_batch([run.encode() for run in word_runs(words)])
            if sketches.query(sketch):
                report.drop("near duplicate", row.where)
                continue
            sketches.insert(len(kept), sketch)
        kept.append(row)
    return kept


def word_runs(words: list[str]) -> set[str]:
    """Every run of five words (all of them where there are fewer)."""
    return {" ".join(words[start : start + _RUN_WORDS]) for start in range(max(1, len(words) - _RUN_WORDS + 1))}


def log_importance(pool: list[str], target: list[str]) -> NDArray[np.float64]:
    """log p(target) - log p(pool) of each document of the pool, by bags of hashed words and word pairs."""
    from data_selection import HashedNgramDSIR

    with tempfile.TemporaryDirectory() as cache:
        estimator = HashedNgramDSIR(
            ["pool"],
            ["target"],
            cache,
            raw_load_dataset_fn=lambda _: pool,
            raw_parse_example_fn=lambda text: text,
            target_load_dataset_fn=lambda _: target,
            target_parse_example_fn=lambda text: text,
            num_proc=1,
        )
        estimator.fit_importance_estimator()
        scores = [estimator.importance_estimator(estimator.featurizer(text)) for text in pool]
    return np.asarray(scores, dtype=np.float64)


def gumbel_top(scores: NDArray[np.float64], count: int, seed: int) -> list[int]:
    """``count`` indices drawn without replacement with chances exp(score), in their order (the package's own draw
    cannot be seeded)."""
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
    noisy = scores + random.gumbel(size=len(scores))
    return sorted(np.argsort(-noisy, kind="stable")[:count].tolist())


def _write(output: Path, rows: list[Text]) -> None:
    lines = (json.dumps({"text": row.text, "source": row.where}, ensure_ascii=False) + "\n" for row in rows)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{output}: cannot be written ({error.strerror}); choose another -o") from error


def _need_extra() -> None:
    try:
        import data_selection  # noqa: F401
        import datasketch  # noqa: F401
    except ImportError as error:
        raise DataError(f"choosing text needs {error.name}: pip install 'vramplan[select]'") from error


def main() -> int:
    """Answers with the report, or with one sentence on what is wrong."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print progress; stdout is for the answer alone
    spec = SelectSpec.model_validate_json(sys.stdin.read())
    code = 0
    try:
        answer = select(spec, Path(sys.argv[1]))
    except VramplanError as error:
        answer, code = {"error": str(error), "exit_code": error.exit_code}, error.exit_code
    answers.write(json.dumps(answer))
    answers.close()
    return code


if __name__ == "__main__":
    sys.exit(main())
