"""Samples by index: in memory, or in a memory-mapped file for what does not fit there."""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import IO, Any, overload

import numpy as np
from numpy.typing import NDArray

from vramplan.data.sample import Sample


class _View(Sequence[Sample]):
    """A sequence that makes each sample when it is asked for."""

    @abstractmethod
    def _at(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self._at(each) for each in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._at(index % len(self))


class Picked(_View):
    """Some samples of a sequence."""

    def __init__(self, samples: Sequence[Sample], indices: Sequence[int]) -> None:
        self._samples, self._indices = samples, np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def _at(self, index: int) -> Sample:
        return self._samples[int(self._indices[index])]


class Joined(_View):
    """Sequences laid end to end."""

    def __init__(self, sequences: Sequence[Sequence[Sample]]) -> None:
        self._sequences = sequences
        self._ends = np.cumsum([len(sequence) for sequence in sequences])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _at(self, index: int) -> Sample:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._sequences[number][index - int(self._ends[number]) + len(self._sequences[number])]


class OnDisk(_View):
    """Samples whose tokens lie in a temporary file, four bytes each; it has no name and goes with the process.

    A token is written as ``2 * id + trained``. In memory are a sample's place, weight, cut and name.
    """

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as its memory map
        self._ends: list[int] = [0]
        self._num_cut: list[int] = []
        self._weights: list[float] = []
        self._where: list[str] = []
        for sample in samples:
            self._file.write((sample.ids * 2 + sample.trained).astype(np.uint32).tobytes())
            self._ends.append(self._ends[-1] + sample.num_tokens)
            self._num_cut.append(sample.num_cut)
            self._weights.append(sample.weight)
            self._where.append(sample.where)
        self._file.flush()
        self._tokens: NDArray[Any] = (
            np.memmap(self._file, dtype=np.uint32, mode="r") if self._ends[-1] else np.zeros(0, dtype=np.uint32)
        )

    def __len__(self) -> int:
        return len(self._where)

    def _at(self, index: int) -> Sample:
        tokens = np.asarray(self._tokens[self._ends[index] : self._ends[index + 1]], dtype=np.int64)
        return Sample(
            self._where[index], tokens >> 1, (tokens & 1).astype(np.bool_), self._num_cut[index], self._weights[index]
        )


def keep_samples(samples: Iterable[Sample], keep: str) -> Sequence[Sample]:
    """The samples where ``data.keep`` wants them."""
    return OnDisk(samples) if keep == "disk" else tuple(samples)
