"""Small parameters of modules that no other site type knows: the module runs sample by sample, each with its own copy.

Exact for whatever the module computes, as long as samples do not meet in it; slower, as small products are. So it is the last
resort: convolutions, routers, the matrices of a state-space model that are not called as modules.
"""

from __future__ import annotations

from typing import Any

from selection_ops.sites.base import Forward, SiteType, Tape

MOST_NUMBERS = 2**20
"""A larger parameter would be copied for every sample of a batch; it is listed as not attributed."""


class Expanded(SiteType):
    """Any module that runs; its parameters are named by the search."""

    @staticmethod
    def forward(module: Any, call: Forward, tape: Tape) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return tape.each_sample(module, call, args, kwargs)

        return forward
