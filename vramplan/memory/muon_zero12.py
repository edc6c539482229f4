"""Muon under ZeRO-1 and ZeRO-2 (deepspeed 0.19.8, runtime/zero/stage_1_and_2.py, ``get_flat_partition``): at the
boundary every rank makes the updates of all matrices of which it owns a part, whole."""

from __future__ import annotations

from vramplan.memory import labels
from vramplan.memory.between import Files
from vramplan.memory.job import Job
from vramplan.memory.moments import Parts, Stretch, merged
from vramplan.memory.muon import update_bytes
from vramplan.memory.size import ZERO
from vramplan.memory.zero12 import Zero12


class Muon12(Zero12):
    """The groups are of matrices and of what FusedAdam steps; both share the buffer of gradients."""

    def __init__(self, job: Job, rank: int) -> None:
        super().__init__(job, rank)
        self.own_groups = [tuple(name for name, _ in group if name in self.owned) for group in job.groups]
        self.of_matrices = [group[0][0] in job.matrices for group in job.groups]

    def files(self) -> Files:
        """As without Muon, but the states are of whole matrices that the rank owns a part of."""
        weights, largest = self.flat.padded_numel * self.width, max(self.flat.partitions)
        states = self.states().get(labels.MOMENTS, ZERO)
        assert not isinstance(states, int)
        own = self.share * self.master_bytes + states[0]
        return Files(weights, own, largest * self.flat.degree * self.width, largest * self.master_bytes)

    def _finish(self, stretch: Stretch, *alive: Parts) -> None:
        """Momentum and its staged copy come to be in the first step and stay; results lie beside the gradients, which
        go when no other group has any in their buffer."""
        first = labels.STAGED not in self.resident
        made = 0
        for names, is_muon in zip(self.own_groups, self.of_matrices, strict=True):
            if not is_muon:
                continue
            momentum = self._whole_bytes(names)
            if first:
                self.resident = merged(self.resident, {labels.MOMENTS: momentum, labels.STAGED: momentum})
            for name in names:
                scratch = {labels.STEP_SCRATCH: update_bytes(self.job.matrices[name], self.job.dtype, self.job.device)}
                stretch.see("Muon's update", self.resident, {labels.UPDATES: made}, scratch, *alive)
                made += self._whole_bytes([name])
        self.resident = merged(self.resident, {labels.UPDATES: made})
        if not any(names for names, is_muon in zip(self.own_groups, self.of_matrices, strict=True) if not is_muon):
            self.resident = self.resident.without(labels.GRAD_PARTITION)

    def _update(self, stretch: Stretch, index: int, first: bool) -> None:
        """As without Muon; a group of matrices has its results in the place of gradients, each by itself, and makes no
        states."""
        share, is_muon, names = self.flat.partitions[index], self.of_matrices[index], self.own_groups[index]
        lone = self.width == self.master_bytes and [self.owned[name] for name in names] == [share]
        flat = {labels.FLAT_GRAD: 0 if lone else share * self.master_bytes}
        joined = {labels.REDUCTION: share * self.width if len(names) > 1 and self.width != self.master_bytes else 0}
        stretch.see("gradients flattened", self.resident, self.outputs, flat, joined)
        label = labels.UPDATES if is_muon else labels.GRAD_PARTITION
        whole = self.resident.get(label, ZERO)[0]
        later = zip(self.own_groups[index + 1 :], self.of_matrices[index + 1 :], strict=True)
        left = whole if any(each for each, of_matrices in later if not of_matrices) else 0
        if is_muon:
            left = whole - self._whole_bytes(names)
        self.resident = merged(self.resident.without(label), {label: left})
        viewed = {label: whole - left if lone else 0}
        if first and not is_muon:
            self.resident = merged(self.resident, self.moments(self.optimizer, share))
        stretch.see("optimizer update", self.resident, self.outputs, flat, viewed)
