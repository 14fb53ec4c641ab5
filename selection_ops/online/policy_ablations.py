"""The ablations of `filter-then-weight`: each is that policy with one or two options fixed.

`filter-only` leaves out the weights, `vanilla-filter` the optimizer too; `vanilla-filter-then-weight` leaves out the optimizer alone;
`unbounded-weights` the weights' upper bound; `hard-filter` filters by b > 0 and `hard-filter-omp` by the support of matching pursuit.
"""

from __future__ import annotations

from selection_ops.online.policies import register
from selection_ops.online.policy_filter_then_weight import FilterThenWeight

register("filter-only", weights="uniform")(FilterThenWeight)
register("vanilla-filter", metric="sgd", weights="uniform")(FilterThenWeight)
register("vanilla-filter-then-weight", metric="sgd")(FilterThenWeight)
register("unbounded-weights", weights="unbounded")(FilterThenWeight)
register("hard-filter", filter="threshold")(FilterThenWeight)
register("hard-filter-omp", filter="omp")(FilterThenWeight)
