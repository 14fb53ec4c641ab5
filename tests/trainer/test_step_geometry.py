"""What a step chooses by: K, b and the scale of the target's direction, against dense gradients and the optimizer's state."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from schemas.errors import InputError
from selection_ops.encoding import Encoded
from selection_ops.flops import maps_size
from selection_ops.online.metrics import Geometry
from selection_ops.online.options import PolicyOptions
from selection_ops.online.policies import Candidates, Decision, Policy, make_policy
from tests.reference.gradients import projection
from tests.reference.online import sample_gradients
from tests.reference.preconditioning import adamw, less, log_rank_one, muon, power
from tests.trainer.test_step import encoded, offer, trainable
from trainer.candidate import Candidate, StepResult
from trainer.optimizers import AnyOptimizer, JoinedOptimizer
from trainer.step import Gram, OnlineStep

RANK, SEED, BETA1, BETA2, EPS, MOMENTUM = 4, 3, 0.8, 0.99, 1e-6, 0.9
POWERS = {"sgd": (0, 0), "natural": (0.5, 0.5), "target": (0, 1), "update": (1, 1), "opus": (1, 0)}


class Oracle:
    """Gradients of samples and target, one by one, multiplied by powers of P in numpy."""

    def __init__(
        self,
        model: Any,
        optimizer: AnyOptimizer,
        candidates: list[Candidate],
        target: list[Encoded],
        *,
        metric: str,
        form: str,
        asked: str = "auto",
    ) -> None:
        self.optimizer, self.form, self.asked, self.metric = optimizer, form, asked, metric
        self.modules = dict(model.named_modules())
        engine = OnlineStep(model, torch.optim.SGD(model.parameters(), lr=0.0), dtype="float64", proj_rank=RANK)._engine
        assert engine is not None
        self.groups = [(group.name, list(group.sites)) for group in engine.input_groups]
        parts = [sample_gradients(model, item)[0] for item in target]
        tokens = sum(sum(item.loss_mask) for item in target)
        target_power, candidate_power = POWERS[metric][1], POWERS[metric][0]
        v: dict[str, Any] = {
            site: sum(self.matrix(site, part[f"{site}.weight"]) for part in parts) / tokens for site in self.sites
        }
        gradients = [(sample_gradients(model, item.encoded)[0], item.loss_tokens) for item in candidates]
        self.u = self.moved(v, 1, target_power)
        self.z = [
            self.moved({site: self.matrix(site, g[f"{site}.weight"]) for site in self.sites}, count, candidate_power)
            for g, count in gradients
        ]

    @property
    def sites(self) -> list[str]:
        return [site for _, sites in self.groups for site in sites]

    def turned(self, site: str) -> bool:
        return type(self.modules[site]).__name__ == "Conv1D"

    def matrix(self, site: str, stored: torch.Tensor) -> np.ndarray:
        found = stored.detach().numpy()
        return found.T if self.turned(site) else found

    def state(self, site: str) -> dict[str, Any]:
        found: dict[str, Any] = self.optimizer.state[self.modules[site].weight]
        return found

    def moved(self, gradients: dict[str, np.ndarray], tokens: int, exponent: float) -> dict[str, np.ndarray]:
        """P^exponent of the gradients of every site."""
        if not exponent:
            return gradients
        out: dict[str, np.ndarray] = {}
        for _, sites in self.groups:
            exact = []
            for site in sites:
                state = self.state(site)
                if "momentum_buffer" in state:
                    s, left = muon(state["momentum_buffer"].numpy(), MOMENTUM)
                    g = gradients[site].T if self.turned(site) else gradients[site]
                    moved = power(s, exponent) @ g if left else g @ power(s, exponent)
                    out[site] = moved.T if self.turned(site) else moved
                    continue
                second = self.matrix(site, state["exp_avg_sq"])
                steps = int(state["step"])
                if self.asked == "less":
                    first = self.matrix(site, state["exp_avg"])
                    out[site] = less(gradients[site], tokens, first, second, BETA1, BETA2, EPS)
                elif self.asked == "scalar":
                    scale = (1 - BETA1) / (1 - BETA1 ** (steps + 1))
                    root = np.sqrt(np.mean(second / (1 - BETA2**steps)))
                    out[site] = gradients[site] * (scale / (root + EPS)) ** exponent
                else:
                    exact.append(adamw(second, steps, BETA1, BETA2, EPS) ** exponent)
            for site, factor in zip(sites, log_rank_one(exact) if exact and self.form == "rank-one" else exact):
                out[site] = factor * gradients[site]
        return out

    @staticmethod
    @functools.cache
    def projection(name: str, side: str, size: int) -> np.ndarray:
        return projection(SEED, 1, name, side, RANK, size)

    def sketch(self, gradients: dict[str, np.ndarray]) -> np.ndarray:
        pieces = []
        for group, sites in self.groups:
            for site in sites:
                rows, columns = gradients[site].shape
                p_out = self.projection(site, "out", rows)
                p_in = self.projection(group, "in", columns)
                pieces.append((p_out @ gradients[site] @ p_in.T).ravel())
        return np.concatenate(pieces)

    def flat(self, gradients: dict[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([gradients[site].ravel() for site in self.sites])

    def geometry(self, *, gram: str = "sketched", alignment: str = "sketched") -> tuple[np.ndarray, np.ndarray, float]:
        """K, b and |u|^2."""
        found = {}
        for name in {gram, alignment}:
            view = self.flat if name == "exact" else self.sketch
            z, u = np.stack([view(item) for item in self.z]), view(self.u)
            found[name] = z @ z.T, z @ u, float(u @ u)
        return found[gram][0], found[alignment][1], found[alignment][2]


def optimizer_of(model: Any, kind: str) -> AnyOptimizer:
    if kind == "muon":
        hidden = [p for n, p in model.named_parameters() if p.dim() == 2 and ("layers" in n or ".h." in n)]
        ids = {id(p) for p in hidden}
        rest = [p for p in model.parameters() if id(p) not in ids]
        return JoinedOptimizer([torch.optim.Muon(hidden, lr=1e-3, momentum=MOMENTUM), torch.optim.AdamW(rest, lr=1e-3)])
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(BETA1, BETA2), eps=EPS)


def compare(
    kind: str, metric: str, form: Any, mode: Any, *, asked: Any = "auto", optimizer: str = "adamw", **exactness: Any
) -> None:
    """Four steps: `sgd` until the state has seen two gradients, then the metric; 1e-10 of the largest entry in float64."""
    model = trainable(kind)
    state = optimizer_of(model, optimizer)
    online = OnlineStep(
        model, state, options=PolicyOptions(n_keep=3, metric=metric, preconditioner=asked), proj_rank=RANK, warmup_select=2, dtype="float64",
        batch_tokens=40, mode=mode, precondition=form, seed=SEED, **exactness,
    )  # fmt: skip
    acted = []
    for step in range(4):
        candidates, target = offer(5, seed=10 * step), encoded(3, seed=10 * step + 1)
        acts = metric if step >= 2 else "sgd"
        oracle = Oracle(model, state, candidates, target, metric=acts, form=form, asked=asked)
        gram, align, square = oracle.geometry(**exactness)
        result = online.step(candidates, target)
        assert result.geometry is not None
        acted.append(result.metric)
        # float64 throughout; contractions of at most some thousand terms: 1e-10 of the largest entry.
        assert np.abs(result.geometry.gram_NN.numpy() - gram).max() <= 1e-10 * np.abs(gram).max()
        assert np.abs(result.geometry.align_N.numpy() - align).max() <= 1e-10 * np.abs(align).max()
        assert result.geometry.target_square == pytest.approx(square, rel=1e-10)
    assert acted == ["sgd", "sgd", metric, metric]


@pytest.mark.parametrize("form", ["exact", "rank-one"])
@pytest.mark.parametrize("metric", sorted(POWERS))
@pytest.mark.parametrize(("kind", "mode"), [("llama", "one-pass"), ("gpt2", "two-pass")])
def test_geometry_is_that_of_dense_gradients_under_the_live_state(kind: str, metric: str, form: str, mode: str) -> None:
    compare(kind, metric, form, mode)


@pytest.mark.parametrize(
    ("kind", "metric"), [("llama", "update"), ("gpt2", "natural"), ("gpt2", "target"), ("neox", "opus")]
)
def test_muon_multiplies_by_its_polynomial_from_the_shorter_side(kind: str, metric: str) -> None:
    compare(kind, metric, "auto", "one-pass", optimizer="muon")


@pytest.mark.parametrize("asked", ["scalar", "less"])
@pytest.mark.parametrize("metric", ["update", "opus"])
def test_other_preconditioners_of_adam(asked: str, metric: str) -> None:
    compare("llama", metric, "auto", "two-pass", asked=asked)


@pytest.mark.parametrize("mode", ["two-pass", "one-pass"])
@pytest.mark.parametrize(("metric", "optimizer"), [("target", "adamw"), ("update", "adamw"), ("natural", "muon")])
def test_exact_alignments_take_no_projection(metric: str, optimizer: str, mode: str) -> None:
    """K stays that of sketches, through the exact P of the candidates."""
    compare("gpt2", metric, "exact", mode, optimizer=optimizer, alignment="exact")


@pytest.mark.parametrize(
    ("metric", "settings"),
    [
        ("target", {}),
        ("update", {}),
        ("natural", {"optimizer": "muon"}),
        ("opus", {"asked": "less"}),
        ("opus", {"asked": "scalar"}),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_exact_interactions_take_no_projection(kind: str, metric: str, settings: dict[str, str]) -> None:
    """From what one pass holds, through P without a fit."""
    exactness = {"gram": "exact", **({} if settings.get("asked") == "less" else {"alignment": "exact"})}
    compare(kind, metric, "exact", "one-pass", **settings, **exactness)


def test_survivors_are_weighted_by_exact_interactions() -> None:
    """The filter sees sketches; what it has kept sees the whole gradients of one another, and nothing else has changed."""
    seen: list[Geometry] = []

    class Watching(Policy):
        needs_sketches = True

        def choose(self, candidates: Candidates) -> Decision:
            assert candidates.geometry is not None
            seen[:] = [candidates.geometry, candidates.geometry.refined((4, 1))]
            return inner.choose(candidates)

    model = trainable()
    optimizer = optimizer_of(model, "adamw")
    options = PolicyOptions(n_keep=3)
    inner = make_policy("filter-then-weight", options)
    settings: dict[str, Any] = {"proj_rank": RANK, "dtype": "float64", "mode": "one-pass", "seed": SEED}
    online = OnlineStep(model, optimizer, Watching(), options=options, gram="survivors", **settings)
    candidates, target = offer(5), encoded(3, seed=1)
    oracle = Oracle(model, optimizer, candidates, target, metric="sgd", form="exact")
    (sketched, align, square), (exact, _, _) = oracle.geometry(), oracle.geometry(gram="exact")
    result = online.step(candidates, target)
    plain, refined = (item.gram_NN.numpy() for item in seen)
    pair = np.ix_((4, 1), (4, 1))
    assert np.abs(plain - sketched).max() <= 1e-10 * np.abs(sketched).max()
    assert np.abs(refined[pair] - exact[pair]).max() <= 1e-10 * np.abs(exact).max()
    assert (np.abs(refined - plain) > 0).sum() == 4
    # The diagnostics of the weights are those of the survivors' exact interactions.
    chosen = list(result.decision.kept)
    weight = np.zeros(5)
    weight[chosen] = result.decision.weight_S.numpy()
    cosine = weight @ align / np.sqrt(weight @ exact @ weight * square)
    assert result.decision.diagnostics is not None
    assert result.decision.diagnostics.update_target_cosine == pytest.approx(cosine, rel=1e-9)


def test_exact_interactions_cost_what_torch_counts() -> None:
    """The operations of a step with exact interactions beyond those of a step with sketched ones."""

    def counted(gram: Gram) -> tuple[float, StepResult, OnlineStep]:
        model = trainable()
        online = OnlineStep(
            model, torch.optim.SGD(model.parameters(), lr=0.1), "filter-then-weight", options=PolicyOptions(n_keep=3), mode="one-pass",
            gram=gram, proj_rank=RANK, dtype="float64", seed=SEED,
        )  # fmt: skip
        # Torch leaves the product that adds in place uncounted.
        in_place = {torch.ops.aten.addmm_: lambda out, a, b, *_, **__: 2 * a[0] * a[1] * b[1]}
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            result = online.step(offer(5), encoded(3, seed=1))
        return float(counter.get_total_flops()), result, online

    plain, sketched, _ = counted("sketched")
    assert sketched.exact_gram == ()
    cases: dict[Gram, tuple[int, ...]] = {"exact": (0, 1, 2, 3, 4), "survivors": ()}
    for gram, rows in cases.items():
        operations, result, online = counted(gram)
        assert set(result.exact_gram) == set(rows or result.decision.kept)
        # All lie in one padded batch, and padding is multiplied too.
        lengths = [max(item.tokens for item in offer(5))] * len(result.exact_gram)
        maps = maps_size(online.model, online.compared_sites)
        assert operations - plain == maps.interactions(lengths)


def test_exact_interactions_want_one_pass() -> None:
    refused(torch.optim.AdamW, "use mode one-pass there, or gram sketched", gram="exact")


def refused(
    optimizer: Any, message: str, metric: str = "target", preconditioner: str = "auto", **settings: Any
) -> None:
    model = trainable()
    with pytest.raises(InputError, match=message):
        OnlineStep(
            model, optimizer(model.parameters()), options=PolicyOptions(metric=metric, preconditioner=preconditioner),
            dtype="float64", proj_rank=RANK,
            **settings,
        )  # fmt: skip


def test_an_optimizer_that_no_preconditioner_fits_is_named() -> None:
    refused(torch.optim.RMSprop, "no preconditioner fits RMSprop.*use preconditioner none, or metric sgd")
    refused(torch.optim.NAdam, "no preconditioner fits NAdam")
    refused(torch.optim.SGD, "preconditioner adamw does not fit SGD; use scalar, or auto", preconditioner="adamw")
    refused(torch.optim.AdamW, "preconditioner muon does not fit AdamW", preconditioner="muon")
    refused(torch.optim.AdamW, "unknown preconditioner 'newton': choose one of auto, adamw", preconditioner="newton")
    refused(torch.optim.AdamW, "takes a root of the preconditioner", metric="natural", preconditioner="less")
    refused(torch.optim.AdamW, "use alignment sketched", preconditioner="less", alignment="exact")


def test_none_and_sgd_need_no_state() -> None:
    """RMSprop under `none` acts as `sgd`; SGD's own step is a number: from the first step on, with nothing to wait for."""
    for kind, asked, acts, factor in (
        (torch.optim.RMSprop, "none", "sgd", 1.0),
        (torch.optim.SGD, "auto", "target", 1.0 + 0.9),
    ):
        model = trainable()
        more: dict[str, Any] = {"momentum": 0.9, "nesterov": True} if kind is torch.optim.SGD else {}
        optimizer = kind(model.parameters(), lr=0.0, **more)
        options = PolicyOptions(preconditioner=asked)
        online = OnlineStep(model, optimizer, options=options, dtype="float64", proj_rank=RANK, seed=SEED)
        candidates, target = offer(5), encoded(3, seed=1)
        _, align, _ = Oracle(model, optimizer, candidates, target, metric="sgd", form="exact").geometry()
        result = online.step(candidates, target)
        assert result.geometry is not None and result.metric == acts
        assert np.abs(result.geometry.align_N.numpy() - factor * align).max() <= 1e-10 * np.abs(align).max()
