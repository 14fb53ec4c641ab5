"""`opus`: draws by the gain of the update that the optimizer would make of a candidate (OPUS, arXiv 2602.05400).

The gain of j given S is <P g_j, v> - c <P g_j, sum_S P g_i>, with c the line search alpha* of S where OPUS has the learning rate (see `greats`);
drawn by Boltzmann's rule at `filter_temperature` on standardised gains, one after the other. Equal weights.
"""

from __future__ import annotations

from selection_ops.online.policies import register
from selection_ops.online.policy_filter_then_weight import FilterThenWeight

register("opus", metric="opus", filter="boltzmann", filter_score="residual", weights="uniform")(FilterThenWeight)
