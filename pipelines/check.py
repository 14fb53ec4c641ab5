"""Checking a scored run: rows recomputed by the engine and by plain autograd, against what is stored and what theory predicts.

Three comparisons, each with its own question. Stored against recomputed under the scoring's own spec: are these the sketches of
these texts under this model? Sketches in float32 against exact gradients: do they keep inner products as well as theory says?
What is decided from stored sketches against the same from exact gradients: does it matter?
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from pipelines.check_rows import StoredRow, draw_rows, draw_target
from pipelines.geometry import read_target
from pipelines.options import CheckOptions, ScoringOptions
from pipelines.preconditioning import Side, load_preconditioner
from pipelines.scorer import SampleScorer, Scored, load_encoder
from pipelines.scoring import ModelLocation, scoring_spec
from schemas.fingerprint import plain
from schemas.manifest import Manifest
from schemas.run import Run
from schemas.spec import DType, FeatureSpec, InputGroup
from selection_ops.batching import collate
from selection_ops.dense import DensePlan, dense_gradients, plan_dense
from selection_ops.encoding import Encoded
from selection_ops.engine import GradientEngine
from selection_ops.model import choose_attention, load_model
from selection_ops.preconditioning import Preconditioner
from selection_ops.quality import Products, choose_pairs, overlap, pair_errors, rms, spearman, top
from selection_ops.sketch_theory import float16_variance, fold_variance, projection_variance

ARITHMETIC = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.05}
"""How far the sketch of a sample may move, of its norm, in another batch or on another machine of the same arithmetic.

Measured: 7e-7 in float32 and 0.009 in bfloat16 on one machine; other kernels sum in another order."""
FLOAT16 = 2.0**-11
"""Rounding of a stored number, of itself; below 2^-14 numbers are 2^-24 apart."""
SPREAD_LIMIT = 3.0
"""Observed over predicted spread beyond which sketches do not keep what theory says.

All inner products share one draw of the signs, so that in the worst case they err as one normal number: beyond 3 in 1 of 370."""
THEORY_PAIRS = 32
THEORY_NORMS = 16
"""Pairs of samples, and rows, whose gradients theory looks at: each costs as much as some tokens."""
PROBES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckCost:
    """What the check will do, known before it does it."""

    rows: int
    target_rows: int
    tokens: int
    """Tokens of all of them."""
    numbers: int
    """Numbers in one exact gradient."""
    passes: int
    largest_pass: int
    """Bytes of exact gradients that stand at once."""

    @property
    def tokens_run(self) -> int:
        """Tokens run forward and backward in all: every pass, and three times the engine."""
        return self.tokens * (self.passes + 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What was found. `record` is what `--out` writes."""

    intact: bool
    """Whether stored rows are the recomputed ones, to rounding."""
    faithful: bool
    """Whether sketches keep inner products as theory says."""
    failures: tuple[str, ...]
    """What is not as it should be, a sentence each."""
    record: dict[str, Any]


def check(
    run: Run,
    scoring: str,
    options: CheckOptions,
    *,
    model: str | None = None,
    revision: str | None = None,
    on_start: Callable[[CheckCost], None] = lambda cost: None,
    tick: Callable[[int], None] = lambda tokens: None,
) -> CheckReport:
    """Recompute random rows of a finished scoring and compare. `tick` is told tokens run.

    Raises `InputError` where the scoring is not finished or its model is another, and what reading rows raises.
    """
    for stage in ("scoring", "score"):
        run.manifest(stage, scoring)  # says what to run where it is missing
    spec, location = scoring_spec(run, scoring, ScoringOptions(model=model, revision=revision))
    encoder = load_encoder(spec, location)
    target, target_rows = draw_target(run, scoring, spec, options)
    target_name = "" if target is None else target.spec["target"]
    rows = draw_rows(run, scoring, spec, encoder, options, target_name)
    mean_K = (
        None
        if all(row.unit_K is not None for row in rows)
        else read_target(run, target_name, scoring, spec).geometry.mean_K
    )
    stored = [*rows, *target_rows]
    encoded = [encoder.encode(row.sample.text, row.sample.loss_spans) for row in stored]

    threads = torch.get_num_threads()
    wide: DType = "float64" if spec.dtype == "float64" else "float32"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    exact_model = load_model(
        location.model,
        revision=location.revision,
        dtype=wide,
        attention=choose_attention(location.model, device, wide, revision=location.revision),
        device=device,
    ).model
    plan = plan_dense(exact_model, _groups(spec), len(stored), int(options.memory_gb * 1e9))
    cost = CheckCost(
        rows=len(rows),
        target_rows=len(target_rows),
        tokens=sum(len(item.ids) for item in encoded),
        numbers=plan.numbers,
        passes=len(plan.passes),
        largest_pass=plan.largest_pass,
    )
    on_start(cost)
    scored = _recompute(run, scoring, location, rows, target_rows, tick)
    torch.set_num_threads(threads)
    sides = _Sides(run, scoring, spec, location, exact_model, len(rows))
    failures, integrity = _integrity(spec, rows, target_rows, scored, mean_K)
    sketches = [_sketch(exact_model, dataclasses.replace(spec, k=k), sides, encoded, tick) for k in (0, spec.k)]
    pairs_P2 = torch.cat(
        [choose_pairs(len(stored), THEORY_PAIRS, options.seed), _diagonal(min(len(rows), THEORY_NORMS))]
    )
    exact_NN, projection_P = _exact(exact_model, spec, sides, encoded, plan, pairs_P2, tick)
    recomputed_NK = _recomputed(scored, stored)
    stored_NK = _full(stored, recomputed_NK)
    errors = _errors(
        exact_NN, projection_P, pairs_P2, sketches[0], sketches[1], recomputed_NK, stored_NK, len(rows), spec
    )
    faithful = all(not errors[name]["ratio"] > SPREAD_LIMIT for name in ("projection", "fold"))
    if not faithful:
        failures.append(
            "inner products of sketches are off by more than theory allows: projection "
            f"{errors['projection']['ratio']:.1f}, fold {errors['fold']['ratio']:.1f} of the predicted spread (limit {SPREAD_LIMIT:.0f}); "
            "other rows (--seed) tell whether it was chance"
        )
    record = {
        "run": run.run_id,
        "scoring": scoring,
        "spec": spec.fingerprint,
        "target": target_name or None,
        "kept": "all" if mean_K is None else "scalars",
        "options": plain(options),
        "cost": dataclasses.asdict(cost) | {"tokens_run": cost.tokens_run},
        "sketch": {
            "proj_rank": spec.proj_rank,
            "k": spec.sketch_size,
            "bytes_per_row": 4 + (2 * spec.sketch_size if mean_K is None else 0),
        },
        "rows": [{"sample_id": row.sample.sample_id, "place": row.place, "selected": row.selected} for row in rows],
        "integrity": integrity,
        "errors": errors,
        "decisions": _decisions(run, options, exact_NN, stored_NK, rows, target),
        "failures": failures,
    }
    return CheckReport(intact=integrity["intact"], faithful=faithful, failures=tuple(failures), record=record)


class _Sides:
    """What the gradients of rows and of target samples, which stand behind them, are multiplied by."""

    def __init__(
        self, run: Run, scoring: str, spec: FeatureSpec, location: ModelLocation, model: Any, rows: int
    ) -> None:
        self._factors = run.path(run.preconditioner_path(scoring))
        self._rows = rows
        self.candidate, self.target = (
            load_preconditioner(model, spec, side, factors=self._factors, optimizer_state=location.optimizer_state)
            for side in ("candidate", "target")
        )

    def spans(self, count: int) -> Iterator[tuple[slice, Preconditioner | None]]:
        """Which of `count` rows and target samples are of which side."""
        yield slice(0, self._rows), self.candidate
        yield slice(self._rows, count), self.target


def _recompute(
    run: Run,
    scoring: str,
    location: ModelLocation,
    rows: Sequence[StoredRow],
    target_rows: Sequence[StoredRow],
    tick: Callable[[int], None],
) -> Scored:
    """Both sides under the scoring's own spec, one behind the other."""
    sides: tuple[tuple[Side, Sequence[StoredRow]], ...] = (("candidate", rows), ("target", target_rows))
    found = [
        SampleScorer(run, scoring, location, side).score([row.sample for row in some], tick)
        for side, some in sides
        if some
    ]
    arrays = {
        name: np.concatenate([getattr(scored, name) for scored in found])
        for name in ("tokens_N", "loss_tokens_N", "loss_N", "grad_norm_N", "norm_N", "unit_NK")
    }
    return Scored(
        samples=tuple(sample for scored in found for sample in scored.samples),
        rejects=tuple(reject for scored in found for reject in scored.rejects),
        batch_halvings=sum(scored.batch_halvings for scored in found),
        **arrays,
    )


def _integrity(
    spec: FeatureSpec,
    rows: Sequence[StoredRow],
    target_rows: Sequence[StoredRow],
    scored: Scored,
    mean_K: torch.Tensor | None,
) -> tuple[list[str], dict[str, Any]]:
    """Sentences about rows that are not what the spec makes of their text, and the numbers.

    Of a row without its sketch the cosine with the mean target gradient `mean_K` is compared, which moves no more than the unit
    sketch does.
    """
    mean = None if mean_K is None else (mean_K / mean_K.norm()).numpy()
    again = {sample.sample_id: index for index, sample in enumerate(scored.samples)}
    refused = {(reject.path, reject.row, reject.window): reject for reject in scored.rejects}
    arithmetic = ARITHMETIC[spec.dtype]
    failures: list[str] = []
    largest = {"rows": 0.0, "target": 0.0}
    limits = {
        "rows": arithmetic + FLOAT16 + 2.0**-25 * math.sqrt(spec.sketch_size),
        "target": arithmetic + 2.0**-22,
    }
    for kind, some in (("rows", rows), ("target", target_rows)):
        for row in some:
            index = again.get(row.sample.sample_id)
            if index is None:
                reject = refused[row.sample.path, row.sample.row, row.sample.window]
                failures.append(f"{row.place}: stored, but recomputing it ends in {reject.reason} ({reject.detail})")
                continue
            unit_K, norm, loss = scored.unit_NK[index].astype(np.float64), scored.norm_N[index], scored.loss_N[index]
            if row.unit_K is None:
                distance = abs(row.alignment - float(unit_K @ mean))
                said = f"the stored alignment is {distance:.3g} from the recomputed one"
            else:
                distance = float(np.linalg.norm(row.unit_K.astype(np.float64) - unit_K))
                said = f"the stored sketch is {distance:.3g} of its norm from the recomputed one"
            largest[kind] = max(largest[kind], distance)
            if not distance <= limits[kind]:
                failures.append(f"{row.place}: {said} (limit {limits[kind]:.2g})")
            if not abs(row.norm / norm - 1) <= arithmetic + 1e-6:
                failures.append(f"{row.place}: sketch_norm is stored as {row.norm:.6g} and recomputed as {norm:.6g}")
            if math.isfinite(row.loss) and not abs(row.loss - loss) <= (arithmetic + 1e-6) * max(abs(loss), 1.0):
                failures.append(f"{row.place}: loss is stored as {row.loss:.6g} and recomputed as {loss:.6g}")
    found = {"intact": not failures, "largest_distance": largest, "limit": limits, "failures": len(failures)}
    return failures, found


def _sketch(
    model: Any, spec: FeatureSpec, sides: _Sides, encoded: Sequence[Encoded], tick: Callable[[int], None]
) -> torch.Tensor:
    """Sketches in the model's arithmetic, float64 [N, K]; one sample at a time."""
    device = next(model.parameters()).device
    rows = []
    for span, preconditioner in sides.spans(len(encoded)):
        with GradientEngine.from_spec(model, spec, preconditioner) as engine:
            for item in encoded[span]:
                rows.append(engine.features(collate([item], device=device)).sketch_BK[0].double().cpu())
                tick(len(item.ids))
    return torch.stack(rows)


def _exact(
    model: Any,
    spec: FeatureSpec,
    sides: _Sides,
    encoded: Sequence[Encoded],
    plan: DensePlan,
    pairs_P2: torch.Tensor,
    tick: Callable[[int], None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact Gram [N, N], and the variance of projected inner products of the pairs [P]; float64."""
    count = len(encoded)
    gram_NN = torch.zeros(count, count, dtype=torch.float64)
    variance_P = torch.zeros(len(pairs_P2), dtype=torch.float64)
    found = dense_gradients(model, encoded, plan, loss=spec.loss, tick=tick)
    for number, (group, gradients) in enumerate(found):
        for name, gradient in gradients.items():
            for span, preconditioner in sides.spans(count):
                if preconditioner is not None:
                    gradient[span] *= preconditioner.dense(name, group.name).to(gradient.device, gradient.dtype)
            flat = gradient.reshape(count, -1)
            gram_NN += (flat @ flat.T).double().cpu()
        matrices = {name: gradient for name, gradient in gradients.items() if gradient.dim() == 3}
        if matrices:  # small sites are folded as they are
            variance_P += projection_variance(matrices, pairs_P2, spec.proj_rank, probes=PROBES, seed=number)
    return gram_NN, variance_P


def _groups(spec: FeatureSpec) -> tuple[InputGroup, ...]:
    """Everything attributed, small sites as groups of one."""
    return (*spec.input_groups, *(InputGroup(name=site.name, sites=(site.name,)) for site in spec.small_sites))


def _full(stored: Sequence[StoredRow], recomputed_NK: torch.Tensor) -> torch.Tensor:
    """Stored sketches with their norms, [N, K] float64; for those not kept the recomputed ones, rounded as they would have been."""
    full_NK = recomputed_NK.clone()
    for place, row in enumerate(stored):
        if row.unit_K is not None:
            full_NK[place] = torch.from_numpy(row.unit_K.astype(np.float64) * row.norm)
        else:
            full_NK[place] = (full_NK[place] / full_NK[place].norm()).half().double() * row.norm
    return full_NK


def _recomputed(scored: Scored, stored: Sequence[StoredRow]) -> torch.Tensor:
    """Recomputed sketches in the order of `stored`; nan where a row is rejected now."""
    again = {sample.sample_id: index for index, sample in enumerate(scored.samples)}
    out = torch.full((len(stored), scored.unit_NK.shape[1]), float("nan"), dtype=torch.float64)
    for place, row in enumerate(stored):
        if row.sample.sample_id in again:
            index = again[row.sample.sample_id]
            out[place] = torch.from_numpy(scored.unit_NK[index].astype(np.float64) * float(scored.norm_N[index]))
    return out


def _diagonal(count: int) -> torch.Tensor:
    return torch.arange(count)[:, None].expand(count, 2)


def _errors(
    exact_NN: torch.Tensor,
    projection_P: torch.Tensor,
    pairs_P2: torch.Tensor,
    unfolded_NS: torch.Tensor,
    folded_NK: torch.Tensor,
    recomputed_NK: torch.Tensor,
    stored_NK: torch.Tensor,
    n_rows: int,
    spec: FeatureSpec,
) -> dict[str, Any]:
    """Observed and predicted error of inner products by where it arises, and of norms; all over the product of the exact norms."""
    norm_N = exact_NN.diagonal().sqrt()
    scale_P = (norm_N[pairs_P2[:, 0]] * norm_N[pairs_P2[:, 1]]).square()
    apart = pairs_P2[:, 0] != pairs_P2[:, 1]
    projection_P = projection_P / scale_P
    fold_P = fold_variance(unfolded_NS, pairs_P2, spec.k) / scale_P
    gram = {
        name: rows @ rows.T
        for name, rows in (
            ("unfolded", unfolded_NS), ("folded", folded_NK), ("recomputed", recomputed_NK), ("stored", stored_NK)
        )
    }  # fmt: skip
    every_P2 = torch.triu_indices(len(exact_NN), len(exact_NN), 1).T
    float16_P = float16_variance(torch.nn.functional.normalize(stored_NK, dim=1), pairs_P2)
    steps = {
        "projection": ("unfolded", None, projection_P),
        "fold": ("folded", "unfolded", fold_P),
        "arithmetic": ("recomputed", "folded", None),
        # In bfloat16 a sample moves with its batch by more than float16 rounds.
        "storage": ("stored", "recomputed", None if spec.dtype == "bfloat16" else float16_P),
        "stored": ("stored", None, projection_P + fold_P),
    }
    out: dict[str, Any] = {}
    for name, (after, before, variance_P) in steps.items():
        shift = gram[after] - (exact_NN if before is None else gram[before])
        # Spread over the pairs that theory looked at; the largest over all of them.
        observed = rms(pair_errors(exact_NN + shift, exact_NN, pairs_P2[apart]))
        theory = None if variance_P is None else float(variance_P[apart].mean().sqrt())
        out[name] = {
            "observed": observed,
            "theory": theory,
            "ratio": observed / theory if theory else (0.0 if theory is not None else None),
            "largest": float(pair_errors(exact_NN + shift, exact_NN, every_P2).abs().max()),
        }
    norm_error_N = (stored_NK.norm(dim=1) / norm_N - 1)[:n_rows]
    norm_theory = 0.5 * float((projection_P + fold_P)[~apart].mean().sqrt())
    out["norm"] = {
        "observed": rms(norm_error_N),
        "theory": norm_theory,
        "ratio": rms(norm_error_N) / norm_theory if norm_theory else 0.0,
        "largest": float(norm_error_N.abs().max()),
    }
    return out


def _decisions(
    run: Run,
    options: CheckOptions,
    exact_NN: torch.Tensor,
    stored_NK: torch.Tensor,
    rows: Sequence[StoredRow],
    target: Manifest | None,
) -> dict[str, Any]:
    """What is decided from the stored rows, against the same from exact gradients."""
    if target is None:
        return {}
    count = len(rows)
    half = count // 2
    exact, stored = Products.of_gram(exact_NN, count), Products.of_gram(stored_NK @ stored_NK.T, count)
    energy = target.spec["energy"]
    centred = target.spec.get("curvature", "centred") != "empirical"
    (exact_cost, exact_k), (stored_cost, stored_k) = (
        side.stiff_costs(centred=centred, energy=energy) for side in (exact, stored)
    )
    out: dict[str, Any] = {
        "spearman_gain": spearman(stored.alignment_N, exact.alignment_N),
        "spearman_stiff_cost": spearman(stored_cost, exact_cost) if exact_k and stored_k else None,
        "k_star": {"exact": exact_k, "stored": stored_k},
        "top_half_overlap": overlap(top(stored.alignment_N, half), top(exact.alignment_N, half)),
        "match_half_overlap": overlap(stored.match(half), exact.match(half)),
    }
    if options.selection:
        chosen = [index for index, row in enumerate(rows) if row.selected]
        settings = run.manifest("select", options.selection).spec["settings"]
        unit_rows = settings.get("rows") == "unit"
        again = {
            name: side.match(len(chosen), unit_rows=unit_rows) for name, side in (("exact", exact), ("stored", stored))
        }
        out["selection"] = {
            "name": options.selection,
            "selected": len(chosen),
            "match_overlap": overlap(again["stored"], again["exact"]),
            "exact_match_in_selection": overlap(again["exact"], chosen),
        }
    return out
