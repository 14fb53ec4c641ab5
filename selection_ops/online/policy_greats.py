"""`greats`: greedy by <g_j, v> less the interaction with what was taken (GREATS: Wang et al. 2024, the gain with H = I).

The gain of j given S is g_j'v - c g_j' sum_S g_i. Published c is the learning rate times the batch's, under which the second term vanishes
beside the first; here c is the line search alpha* of S. Equal weights.
"""

from __future__ import annotations

from selection_ops.online.policies import register
from selection_ops.online.policy_filter_then_weight import FilterThenWeight

register("greats", metric="sgd", filter="greedy", filter_score="residual", weights="uniform")(FilterThenWeight)
