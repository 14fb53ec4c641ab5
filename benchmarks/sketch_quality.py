"""What projection rank and sketch dimension cost in truth: sketches against exact gradients of a trained model, and bytes a row.

    python benchmarks/sketch_quality.py --run runs/demo --rows 48 --target-rows 24 --out sketch_quality.json

Rows and target samples are drawn from a scored run and cut to `max_tokens`. Their exact gradients are made once, by plain autograd,
and every sketch (rank x k x seed) is taken from them by its definition. A round is a seed of the signs; a figure is the median over
rounds. Per sketch:

    error     root mean square error of the inner products of all pairs, over the product of the exact norms
    theory    the same as predicted (`selection_ops/sketch_theory.py`), from 32 of the pairs
    gain      Spearman of the alignments with the mean target gradient, against exact
    stiff     Spearman of the stiff costs, against exact
    overlap   share of the better half by gain that is also the exact one
    match     share of the half chosen by greedy `match` that is also the exact one
    bytes     stored bytes of sketch and norm a row
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import common
from pipelines.check_rows import StoredRow, draw_rows, draw_target
from pipelines.options import CheckOptions, ScoringOptions
from pipelines.scorer import load_encoder
from pipelines.scoring import scoring_spec
from schemas.run import Run
from schemas.spec import InputGroup
from selection_ops.dense import dense_gradients, plan_dense
from selection_ops.encoding import Encoded, Encoder
from selection_ops.model import default_attention, load_model
from selection_ops.projections import ProjectionSpec, input_signs, output_signs
from selection_ops.quality import Products, choose_pairs, overlap, pair_errors, rms, spearman, top
from selection_ops.signs import buckets
from selection_ops.sketch_theory import fold_variance, projection_variance


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the benchmark."""

    run: Path
    """Run directory with a finished scoring and a target."""
    scoring: str = "base"
    """Name of the scoring."""
    model: str | None = None
    """Where the model of the scoring lies, if not where it was."""
    rows: int = 48
    """Scored rows."""
    target_rows: int = 24
    """Target samples."""
    max_tokens: int = 128
    """Samples are cut to this many tokens; those left with fewer than 16 loss tokens are not taken."""
    ranks: tuple[int, ...] = (4, 8, 16, 32)
    """Projection ranks."""
    ks: tuple[int, ...] = (512, 2048, 8192, 0)
    """Sketch dimensions; 0 keeps everything."""
    rounds: int = 3
    """Seeds of the signs."""
    memory_gb: float = 4.0
    """Memory for exact gradients."""
    threads: int = 1
    """Threads."""
    out: Path | None = None
    """JSON file for the result; without it, it is printed."""


def cut(rows: list[StoredRow], encoder: Encoder, count: int, max_tokens: int) -> list[Encoded]:
    """The first `count` of the rows that keep 16 loss tokens when cut."""
    found: list[Encoded] = []
    for row in rows:
        item = encoder.encode(row.sample.text, row.sample.loss_spans)
        item = Encoded(ids=item.ids[:max_tokens], loss_mask=item.loss_mask[:max_tokens])
        if sum(item.loss_mask) >= 16 and len(found) < count:
            found.append(item)
    return found


class Sketches:
    """Unfolded sketches of every rank and seed, gathered group by group."""

    def __init__(self, settings: Settings, pairs_P2: torch.Tensor) -> None:
        self.settings, self.pairs_P2 = settings, pairs_P2
        self.pieces: dict[tuple[int, int], list[torch.Tensor]] = {}
        self.sites: list[str] = []
        self.variance = {rank: torch.zeros(len(pairs_P2), dtype=torch.float64) for rank in settings.ranks}

    def add(self, group: InputGroup, gradients: dict[str, torch.Tensor]) -> None:
        """Sketch one input group at every rank and seed."""
        self.sites += list(gradients)
        for rank in self.settings.ranks:
            self.variance[rank] += projection_variance(gradients, self.pairs_P2, rank, probes=4, seed=len(self.sites))
            for seed in range(self.settings.rounds):
                spec = ProjectionSpec(proj_rank=rank, seed=seed, version=1, k=0)
                for site, gradient_NOI in gradients.items():
                    _, outputs, inputs = gradient_NOI.shape
                    p_out = output_signs(spec, site, outputs).to(gradient_NOI)
                    p_in = input_signs(spec, group.name, inputs).to(gradient_NOI)
                    sketch_NRR = (p_out @ gradient_NOI) @ p_in.T / rank
                    self.pieces.setdefault((rank, seed), []).append(sketch_NRR.flatten(1).double())

    def folded(self, rank: int, seed: int, k: int) -> torch.Tensor:
        """Sketches [N, K] of one rank, seed and dimension."""
        x_NS = torch.cat(self.pieces[rank, seed], dim=1)
        if not k:
            return x_NS
        placed = [buckets(seed, 1, site, rank**2, k) for site in self.sites]
        bucket_S = torch.cat([bucket for bucket, _ in placed])
        sign_S = torch.cat([sign for _, sign in placed]).double()
        return torch.zeros(len(x_NS), k, dtype=torch.float64).index_add_(1, bucket_S, x_NS * sign_S)


def compare(
    exact_NN: torch.Tensor, sketches: Sketches, rank: int, k: int, n_rows: int, rounds: int
) -> dict[str, list[float]]:
    """Figures of one rank and dimension, a value per seed."""
    pairs_P2, half = sketches.pairs_P2, n_rows // 2
    every_P2 = torch.triu_indices(len(exact_NN), len(exact_NN), 1).T
    norm_N = exact_NN.diagonal().sqrt()
    scale_P = (norm_N[pairs_P2[:, 0]] * norm_N[pairs_P2[:, 1]]).square()
    exact = Products.of_gram(exact_NN, n_rows)
    cost_N, _ = exact.stiff_costs()
    found: dict[str, list[float]] = {name: [] for name in ("error", "theory", "gain", "stiff", "overlap", "match")}
    for seed in range(rounds):
        z_NK = sketches.folded(rank, seed, k)
        # Stored as Lehr stores it: unit rows in float16, the norm beside them.
        norms_N1 = z_NK.norm(dim=1, keepdim=True)
        z_NK = (z_NK / norms_N1).half().double() * norms_N1
        gram_NN = z_NK @ z_NK.T
        side = Products.of_gram(gram_NN, n_rows)
        fold_P = fold_variance(sketches.folded(rank, seed, 0), pairs_P2, k)
        found["error"].append(rms(pair_errors(gram_NN, exact_NN, every_P2)))
        found["theory"].append(float(((sketches.variance[rank] + fold_P) / scale_P).mean().sqrt()))
        found["gain"].append(spearman(side.alignment_N, exact.alignment_N))
        found["stiff"].append(spearman(side.stiff_costs()[0], cost_N))
        found["overlap"].append(overlap(top(side.alignment_N, half), top(exact.alignment_N, half)))
        found["match"].append(overlap(side.match(half), exact.match(half)))
    return found


def measure(settings: Settings) -> dict[str, Any]:
    """Medians over rounds for every rank and dimension, and every round's figures."""
    torch.set_num_threads(settings.threads)
    run = Run.open(str(settings.run))
    spec, location = scoring_spec(run, settings.scoring, ScoringOptions(model=settings.model))
    encoder = load_encoder(spec, location)
    options = CheckOptions(rows=4 * settings.rows, target_rows=0)
    rows = cut(draw_rows(run, settings.scoring, spec, encoder, options), encoder, settings.rows, settings.max_tokens)
    target = draw_target(run, settings.scoring, spec, options)[1]
    samples = [*rows, *cut(target, encoder, settings.target_rows, settings.max_tokens)]
    loaded = load_model(
        location.model, revision=location.revision, dtype="float32", attention=default_attention("cpu", "float32")
    )
    plan = plan_dense(loaded.model, spec.input_groups, len(samples), int(settings.memory_gb * 1e9))
    tokens = sum(len(item.ids) for item in samples)
    print(
        f"{len(rows)} rows, {len(samples) - len(rows)} target samples, {tokens} tokens, {len(plan.passes)} passes",
        flush=True,
    )
    started = time.time()
    sketches = Sketches(settings, choose_pairs(len(samples), 32, 0))
    exact_NN = torch.zeros(len(samples), len(samples), dtype=torch.float64)
    for number, (group, gradients) in enumerate(dense_gradients(loaded.model, samples, plan, loss=spec.loss)):
        for gradient in gradients.values():
            flat = gradient.flatten(1)
            exact_NN += (flat @ flat.T).double()
        sketches.add(group, gradients)
        if number % 10 == 0:
            print(f"group {number} of {len(spec.input_groups)}, {time.time() - started:.0f} s", flush=True)
    ratios, rounds = [], []
    for rank in settings.ranks:
        for k in settings.ks:
            found = compare(exact_NN, sketches, rank, k, len(rows), settings.rounds)
            size = k or len(sketches.sites) * rank**2
            medians = {name: round(statistics.median(values), 5) for name, values in found.items()}
            ratios.append({"rank": rank, "k": k, **medians, "bytes": 2 * size + 4})
            rounds.append({"rank": rank, "k": k, **found})
            print(ratios[-1], flush=True)
    return {"ratios": ratios, "rounds": rounds, "tokens": tokens, "environment": common.environment(settings)}


if __name__ == "__main__":
    common.main(Settings, measure, __doc__)
