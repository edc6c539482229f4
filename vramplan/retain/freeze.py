"""Freezing by pattern, by last blocks, or all but new blocks (Howard and Ruder 2018, arXiv 1801.06146).

A parameter that is not trained keeps its value: what it holds of general knowledge cannot be lost. The function lives
beside the model's other builders, for the simulator freezes the same way.
"""

from __future__ import annotations

from vramplan.rank.freeze import freeze as freeze
