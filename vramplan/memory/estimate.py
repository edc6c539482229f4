"""The estimate of one closed run: the only place that puts the terms together."""

from __future__ import annotations

from vramplan.errors import SpecError
from vramplan.facts.architecture import Architecture
from vramplan.facts.device import Node
from vramplan.memory.engine import Engine
from vramplan.memory.job import Job, job_from_run
from vramplan.memory.ledger import Estimate
from vramplan.memory.zero0 import Zero0
from vramplan.memory.zero12 import Zero12
from vramplan.spec.run import RunSpec


class UncoveredError(SpecError):
    """The arithmetic does not cover this combination yet; the text names what."""


def estimate(run: RunSpec, node: Node, architecture: Architecture, rank: int = 0) -> Estimate:
    """Bytes of one rank at every moment of a closed run.

    Raises:
        SpecError: a field that the planner decides is None, or the combination is not covered.
    """
    job = job_from_run(run, node, architecture)
    stretches = _engine(job, rank).walk()
    return Estimate(
        moments=tuple(stretch.moment() for stretch in stretches),
        phases=tuple(stretch.phase_bytes() for stretch in stretches),
        overhead=(),
        host_terms=(),
        capacity_bytes=node.capacity_bytes,
        ranks_per_node=node.gpus_per_node,
        host_capacity_bytes=node.host_memory_bytes,
    )


def _engine(job: Job, rank: int) -> Engine:
    if job.stage == 0:
        return Zero0(job, rank)
    if job.stage in (1, 2):
        return Zero12(job, rank)
    raise UncoveredError("ZeRO-3 is not covered yet")
