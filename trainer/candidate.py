"""What is offered to an online step, and what the step did with it.

Legend: N candidates.
"""

from __future__ import annotations

import dataclasses

from selection_ops.encoding import Encoded
from selection_ops.online.metrics import Geometry
from selection_ops.online.oracle import OracleReport
from selection_ops.online.policies import Decision


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """An encoded sample that is offered to a step."""

    sample_id: str
    encoded: Encoded
    position: int = -1
    """Position in the order of the stream, -1 outside of one."""
    rank: int = -1
    """Rank in the stream, -1 outside of one."""
    selection_weight: float = 1.0
    stream: str = ""
    """Name of the stream, empty outside of one."""
    generation: int = 0
    """Generation of the stream, 0 outside of one."""

    @property
    def tokens(self) -> int:
        """Length in tokens."""
        return len(self.encoded.ids)

    @property
    def loss_tokens(self) -> int:
        """Tokens that carry loss."""
        return sum(self.encoded.loss_mask)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step did. `weight_N` has mean 1 over the kept and is 0 elsewhere; losses are before the update."""

    step: int
    decision: Decision
    weight_N: tuple[float, ...]
    mode: str
    metric: str
    loss: float
    """Step loss, nats per token."""
    target_loss: float | None
    sample_loss_N: tuple[float | None, ...]
    """Sums over the loss tokens, nats; None for a candidate that was not computed."""
    grad_norm: float
    grad_norm_l1: float
    """Sum of absolute values of the gradient whose L2 norm is `grad_norm`: both before clipping."""
    clip_factor: float
    effective_sample_size: float
    padding_share: float
    trained_tokens: int
    masked_N: tuple[int, ...] = ()
    """Loss tokens of the kept that were cleared; empty where tokens are not looked at."""
    geometry: Geometry | None = None
    sketched_target: bool = False
    """Whether the target's direction came from sketches, and no gradient of it was formed whole."""
    formed_candidates: bool = False
    """Whether the gradient of every candidate was formed whole to be sketched."""
    exact_gram: tuple[int, ...] = ()
    """Candidates whose interactions came from whole gradients."""
    oracle: OracleReport | None = None
    """What the oracle found, at steps where it was asked."""
    selection_seconds: float = 0.0
    oracle_seconds: float = 0.0

    @property
    def applied(self) -> bool:
        """Whether the optimizer stepped; it does not where nothing was kept."""
        return bool(self.decision.kept)
