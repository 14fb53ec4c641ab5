"""`less-online`: the largest cosines of Adam's step on a candidate and the target's gradient (LESS: Xia et al. 2024, arXiv 2402.04333, live).

Adam's step for one sample is (beta1 m + (1 - beta1) g) / sqrt(beta2 v + (1 - beta2) g^2 + eps), whole gradient by whole gradient, with the
moments of the live optimizer where LESS has those of a warm-up training; the target's gradient stays plain. Equal weights.
"""

from __future__ import annotations

from selection_ops.online.policies import register
from selection_ops.online.policy_filter_then_weight import FilterThenWeight

register("less-online", metric="opus", preconditioner="less", filter="cosine", weights="uniform")(FilterThenWeight)
