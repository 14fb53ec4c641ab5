"""`tracin`: the largest <g_i, v>, plain gradients on both sides (TracIn: Pruthi et al. 2020, arXiv 2002.08484, at the live weights)."""

from __future__ import annotations

from selection_ops.online.policies import register
from selection_ops.online.policy_filter_then_weight import FilterThenWeight

register("tracin", metric="sgd", filter="top-k", weights="uniform")(FilterThenWeight)
