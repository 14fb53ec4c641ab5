"""`grad-match`: orthogonal matching pursuit of the target's gradient (Killamsetty et al. 2021, arXiv 2103.00123, algorithm 2).

The largest residual g_j'(v - G_S w_S) enters, w_S >= 0 is refit by regularised least squares, up to `n_keep`; those weights are kept.
"""

from __future__ import annotations

from selection_ops.online.policies import register
from selection_ops.online.policy_filter_then_weight import FilterThenWeight

register("grad-match", metric="sgd", filter="omp", filter_score="residual", weights="unbounded")(FilterThenWeight)
