"""ZeRO-1 and ZeRO-2 without a contiguous bucket (``contiguous_gradients: false``): gradients wait where they are."""

from __future__ import annotations

from vramplan.memory import labels
from vramplan.memory.activations import undominated
from vramplan.memory.engine import Micro
from vramplan.memory.moments import Stretch, at_point
from vramplan.memory.size import add, const
from vramplan.memory.zero12 import Zero12


class Zero12Holding(Zero12):
    """Nothing is copied into a bucket; what is reduced together is flattened for it."""

    def _backward_reducing(self, stretch: Stretch, micro: Micro) -> None:
        """Without a contiguous bucket gradients stay ``param.grad`` until as many as a bucket holds are reduced
        (``reduce_ipg_grads``, ``buffered_reduce_fallback``); then stage 2 lets go of those of other ranks, or, where it
        overlaps, before it reduces next (``_clear_previous_reduced_grads``). Stage 1 keeps all, and those of earlier
        micro-batches until the end."""
        found, keeps, left = self.profile, self.job.stage == 1, self._left_width(micro)
        self.resident = self.resident.without(*([labels.GRADIENTS] if keeps else []))
        gradients, owned = found.gradients, 0
        start = held_from = lingering = 0
        order = tuple(gradient.name for gradient in gradients)
        for flush in self._flushes(order):
            until = len(found.backward) if flush.before is None else gradients[flush.before].at.index
            self._see_held(stretch, start, until, owned + lingering - held_from, left)
            kept = owned + flush.numel
            alive = at_point(found.graph_done if flush.before is None else gradients[flush.before].at)
            held = self.trained_numel if left else kept
            parts = {labels.GRADIENTS: held * self.width, labels.REDUCTION: self._copy_bytes(flush)}
            stretch.see("gradient reduction", self.resident, alive, parts)
            end = len(order) if flush.before is None else flush.before
            done = gradients[:end]
            owned = sum(each.numel for each in done if keeps or self.flat.owned_by(each.name, self.rank))
            lingering = kept - owned if self.job.zero.overlap_comm else 0
            held_from, start = sum(each.numel for each in done), until
        self._end_of_reduction(stretch, micro)

    def _see_held(self, stretch: Stretch, start: int, until: int, offset_numel: int, left: int) -> None:
        """Instants ``start`` to ``until`` of backward with the gradients held then: those delivered and an offset, or
        all where they are ``left`` of earlier micro-batches."""
        points = [point for point in self.profile.backward if start <= point.index < until]
        if not points:
            return
        width = self.width * (not left)
        for _, point in undominated([(add(each.total, const(width * each.grad_numel)), each) for each in points]):
            numel = self.trained_numel if left else point.grad_numel + offset_numel
            stretch.see(point.where, self.resident, {labels.GRADIENTS: self.width * numel}, at_point(point))
