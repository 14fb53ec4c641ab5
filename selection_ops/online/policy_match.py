"""`match`: the greedy set cosine of the selector of that name, on the candidates of a step.

Adds argmax_j <s + z_j, u> / |s + z_j|, s the sum of what has been added, until there are `n_keep`; equal weights. In the metric asked for.
"""

from __future__ import annotations

from selection_ops.online.policies import register
from selection_ops.online.policy_filter_then_weight import FilterThenWeight

register("match", filter="set-cosine", weights="uniform")(FilterThenWeight)
