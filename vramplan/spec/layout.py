"""How a job's ranks are arranged, and the one rule by which anything is divided among them."""

from __future__ import annotations

from dataclasses import dataclass


def shard(numel: int, degree: int) -> int:
    """Elements that one of ``degree`` ranks holds of ``numel``: an equal share, rounded up (the padding counts).

    The only division by a degree in the project. Works elementwise on numpy arrays.
    """
    return -(-numel // degree)


@dataclass(frozen=True, slots=True)
class Layout:
    """Degrees of parallelism; their product is the number of ranks.

    ``dp``: data parallel (ZeRO partitions over ``dp * sp``); ``tp``: tensor parallel (DeepSpeed AutoTP);
    ``sp``: sequence parallel (Ulysses); ``pp``: pipeline; ``ep``: experts.
    """

    dp: int = 1
    tp: int = 1
    sp: int = 1
    pp: int = 1
    ep: int = 1

    @property
    def world_size(self) -> int:
        return self.dp * self.tp * self.sp * self.pp

    @property
    def zero_degree(self) -> int:
        """Ranks that ZeRO partitions over: data-parallel and sequence-parallel ranks hold the same weights."""
        return self.dp * self.sp

    @property
    def not_trained(self) -> str:
        """Why ``vramplan train`` does not run it; empty where it does."""
        if self.dp * self.sp == self.world_size:
            return ""
        return (
            f"layout: the trainer runs data and sequence parallelism, but this plan has tp {self.tp} and pp {self.pp}: "
            "set them to 1"
        )
