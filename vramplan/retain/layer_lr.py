"""Layer-wise learning rates (discriminative fine-tuning, Howard and Ruder 2018, arXiv 1801.06146, section 3.2)."""

from vramplan.spec.rates import rate_groups as rate_groups
from vramplan.spec.rates import rate_share as rate_share
