"""What a user may say about a selection. Held apart from the mathematics, so that it loads without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from schemas.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a selection may spend: exactly one of samples and tokens."""

    samples: int | None = None
    """Number of samples, all of which are spent unless `allow_short`."""
    tokens: int | None = None
    """Encoded tokens of the chosen samples together, at most."""

    def __post_init__(self) -> None:
        if (self.samples is None) == (self.tokens is None):
            raise InputError(
                f"a budget is either samples or tokens; got samples={self.samples}, tokens={self.tokens}. Give one of them"
            )
        if self.amount < 1:
            raise InputError(f"a budget must be at least 1, got {self.amount} {self.unit}")

    @property
    def amount(self) -> int:
        """The number of samples or tokens."""
        return int(self.tokens if self.samples is None else self.samples)  # type: ignore[arg-type]

    @property
    def unit(self) -> str:
        """`samples` or `tokens`."""
        return "tokens" if self.samples is None else "samples"


@dataclass(frozen=True, kw_only=True)
class SelectorSettings:
    """How to choose. `None` means the selector's own default."""

    selector: str = "match"
    """match, direct, direct-signed, random, loss, grad-norm, target-cosine, target-dot, influence or influence-cos."""
    shortlist: float = 2.0
    """match: consider the best of the pool by cosine, this many times the budget; 0 considers the whole pool."""
    rows: Literal["sum", "unit"] | None = None
    """Whether a sample counts with its sum-loss gradient or with its direction only (default: sum; direct-signed: unit)."""
    gain: Literal["target", "flat+null", "flat", "damped"] = "target"
    """match and direct-signed: what to gain on. The mean target gradient; its part off the stiff directions; its flat
    part; or the damped natural gradient (C + delta I)^-1 g."""
    contrast: Literal["none", "swap"] = "none"
    """match and direct-signed: `swap` adds the difference to the gradient of the target with swapped answers."""
    contrast_weight: float = 0.5
    """Weight of the unit contrast direction beside the unit gain direction; 0.5 to 1 is sensible."""
    stiff_limit: float | None = None
    """Factor r of the limit on total stiff cost, or the limit itself where its kind is absolute (default: match none,
    direct 0.1, direct-signed 1)."""
    stiff_limit_kind: Literal["target", "absolute", "pool"] | None = None
    """r x the held-out stiff cost of target samples x budget; r alone; or r x the pool's mean cost x budget, which moves
    with the pool (default: target; direct: pool)."""
    redundancy: float = 0.0
    """direct-signed: price r on what the chosen samples repeat of each other: the gain of their summed gradient s less
    (rho / 2) ||s||^2, rho = r x gain / ||s||^2 of the selection without it. 0: none; 1: weighs as in `match`; larger: variety
    before gain. Under a budget of tokens, samples that add nothing more are not bought. Reads the sketches."""
    max_loss_quantile: float | None = None
    """Leave out samples whose mean loss per loss token lies above this quantile of the candidates, such as 0.99."""
    max_grad_norm_quantile: float | None = None
    """Leave out samples whose gradient norm (of the sum loss, over the root of the loss tokens, so that length alone makes
    no outlier) lies above this quantile of the candidates, such as 0.99."""
    if_infeasible: Literal["error", "raise"] = "error"
    """What to do when no selection meets the limit: stop, or raise it to the smallest feasible one and say the factor."""
    allow_short: bool = False
    """Spend less than a budget of samples where more would not help."""
    fractional: bool = False
    """Keep the weights of the relaxed problem as selection weights; their sum meets the budget, their number need not."""
    few_targets: bool = False
    """Let the direct modes run with fewer than 50 target samples, where the spectrum is noise."""
    quotas: dict[str, float] = field(default_factory=dict)
    """Largest share of the budget for a domain, by name."""
    floors: dict[str, float] = field(default_factory=dict)
    """Smallest share of the budget for a domain, by name (token budgets: reached to within one sample)."""
    lowest: bool = False
    """loss and grad-norm: prefer the smallest instead of the largest."""
    seed: int = 0
    """Seed of `random` and of the restarts of `direct`."""
    restarts: int = 0
    """direct: further random starts; the best objective wins."""
    max_iterations: int = 20
    """direct: most rounds of successive approximation. match, and direct-signed with redundancy: most Frank-Wolfe passes
    over the pool."""
    greedy_rows: int = 50_000
    """match, and direct-signed with redundancy: largest number of rows for exact greedy; over more, Frank-Wolfe proposes and
    greedy decides among its best."""
    bound: bool = True
    """Compute the relaxed bound: `max_iterations` passes over the pool's sketches."""
    two_fold: bool = True
    """Select again against each half of the target, and judge by the other half."""

    def __post_init__(self) -> None:
        """Refuse values that no selector can use; the message holds the value."""
        for name in ("shortlist", "contrast_weight", "restarts"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}")
        if 0 < self.shortlist < 1:
            raise InputError(
                f"shortlist is a multiple of the budget, at least 1, or 0 for the pool; got {self.shortlist}"
            )
        if self.stiff_limit is not None and not self.stiff_limit >= 0:
            raise InputError(f"stiff_limit must not be negative, got {self.stiff_limit}")
        if not 0.0 <= self.redundancy < float("inf"):
            raise InputError(f"redundancy must be a number, 0 or larger, got {self.redundancy}")
        for name in ("max_loss_quantile", "max_grad_norm_quantile"):
            quantile = getattr(self, name)
            if quantile is not None and not 0.0 < quantile <= 1.0:
                raise InputError(f"{name} must lie above 0 and at most at 1, such as 0.99; got {quantile}")
        for name in ("max_iterations", "greedy_rows"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise InputError(f"unknown {name} {value!r}; known: {', '.join(known)}")
        for name in ("quotas", "floors"):
            for domain, share in getattr(self, name).items():
                if not 0.0 <= share <= 1.0:
                    raise InputError(f"{name}: the share of domain {domain!r} must lie in [0, 1], got {share}")


_CHOICES: dict[str, tuple[str, ...]] = {
    "rows": ("sum", "unit"),
    "gain": ("target", "flat+null", "flat", "damped"),
    "contrast": ("none", "swap"),
    "stiff_limit_kind": ("target", "absolute", "pool"),
    "if_infeasible": ("error", "raise"),
}
