"""One step: the gradient it applies, the geometry it chooses by, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from schemas.errors import InputError, LehrError
from selection_ops.encoding import Encoded, Encoder
from selection_ops.online.options import PolicyOptions
from selection_ops.online.policies import Candidates, Decision, Policy
from tests.reference.online import sample_gradients
from tests.tiny import MODELS, tiny_llama, tiny_tokenizer
from tests.trainer.streams import ENCODING, texts
from trainer.candidate import Candidate, StepResult
from trainer.modes import held_bytes_per_token
from trainer.step import OnlineStep


@dataclasses.dataclass
class Fixed(Policy):
    """A policy that keeps what it was told, with the weights it was told."""

    kept: tuple[int, ...]
    weights: tuple[float, ...]
    needs_sketches: bool = False

    def choose(self, candidates: Candidates) -> Decision:
        reasons = ("",) * len(candidates.sample_ids)
        return Decision(kept=self.kept, weight_S=torch.tensor(self.weights, dtype=torch.float64), reasons=reasons)


def encoded(count: int, seed: int = 0) -> list[Encoded]:
    encoder = Encoder(tiny_tokenizer(), ENCODING)
    return [encoder.encode(text, ((len(text) // 4, len(text)),)) for text in texts(count, seed=seed, low=4)]


def offer(count: int = 6, seed: int = 0, weights: tuple[float, ...] = ()) -> list[Candidate]:
    return [
        Candidate(
            sample_id=f"id-{i}", encoded=item, position=i, rank=i, selection_weight=weights[i] if weights else 1.0
        )
        for i, item in enumerate(encoded(count, seed))
    ]


class WideNorm(torch.nn.Module):
    """RMS normalisation in the model's own width: transformers' takes it in float32, whose rounding float64 would show."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)


def trainable(kind: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    model = MODELS[kind](dtype=dtype, seed=seed).requires_grad_(True)
    if dtype == torch.float64:
        for name, module in list(model.named_modules()):
            if type(module).__name__.endswith("RMSNorm"):
                model.set_submodule(name, WideNorm(module.weight))
    return model


def applied_gradient(model: Any, online: OnlineStep, candidates: list[Candidate]) -> dict[str, torch.Tensor]:
    """What plain SGD at rate 1 moves: minus the gradient that the step handed to the optimizer."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    online.step(candidates)
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", sorted(MODELS))
@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
def test_weighted_gradient_is_the_weighted_sum_of_dense_gradients(kind: str, batch_tokens: int) -> None:
    """For every parameter, sum_i w_i g_i / sum_i w_i n_i, however the step is cut into batches."""
    model = trainable(kind)
    candidates = offer()
    kept, weights = (4, 0, 3), (0.5, 2.0, 0.25)
    parts = [sample_gradients(model, candidates[i].encoded) for i in kept]
    normaliser = sum(w * candidates[i].loss_tokens for i, w in zip(kept, weights))
    online = OnlineStep(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        Fixed(kept, weights),
        clip=0.0,
        batch_tokens=batch_tokens,
        dtype="float64",
        selection_weights=False,
    )
    found = applied_gradient(model, online, candidates)
    for name, gradient in found.items():
        true = sum(w * part[name] for w, (part, _) in zip(weights, parts)) / normaliser
        # float64: 1e-10 of the tensor's norm (contractions of some hundred terms of 1e-16); the parameter itself, of
        # norm up to 20, is subtracted from itself, which leaves 20 * 1e-16 absolute.
        assert float((gradient - true).norm()) <= 1e-10 * float(torch.as_tensor(true).norm()) + 1e-13, name


def test_losses_are_those_before_the_update() -> None:
    model = trainable()
    candidates, target = offer(), encoded(3, seed=5)
    losses = [sample_gradients(model, item.encoded)[1] for item in candidates]
    target_loss = sum(sample_gradients(model, item)[1] for item in target) / sum(sum(item.loss_mask) for item in target)
    online = OnlineStep(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.1),
        options=PolicyOptions(n_keep=2),
        dtype="float64",
        proj_rank=4,
    )
    result = online.step(candidates, target)
    # float64 sums of some ten logarithms.
    assert result.sample_loss_N == pytest.approx(losses, rel=1e-11)
    assert result.target_loss == pytest.approx(target_loss, rel=1e-11)
    weighted = sum(weight * loss for weight, loss in zip(result.weight_N, losses))
    normaliser = sum(w * item.loss_tokens for w, item in zip(result.weight_N, candidates))
    assert result.loss == pytest.approx(weighted / normaliser, rel=1e-11)


def test_keeps_what_resembles_the_target() -> None:
    """Candidates drawn like the target against candidates of other words, 8 each, keep 8: chance would keep 4 of the kind."""
    encoder = Encoder(tiny_tokenizer(), ENCODING)
    kind = [encoder.encode(text, ((0, len(text)),)) for text in ["glass is heated annealed and slowly cooled"] * 8]
    other = [encoder.encode(text, ((0, len(text)),)) for text in [f"{i}{i} 7%&{i} #@! {i}" for i in range(8)]]
    candidates = [Candidate(sample_id=str(i), encoded=item) for i, item in enumerate([*other, *kind])]
    model = tiny_llama(dtype=torch.float64).requires_grad_(True)
    for filter_score in ("decrease", "residual"):
        online = OnlineStep(
            copy.deepcopy(model),
            torch.optim.SGD(model.parameters(), lr=0.0),
            options=PolicyOptions(n_keep=8, metric="sgd", filter_score=filter_score),
            dtype="float64",
        )
        result = online.step(candidates, kind[:2])
        assert sum(index >= 8 for index in result.decision.kept) >= len(result.decision.kept) - 2
        assert result.decision.diagnostics is not None
        assert (result.decision.diagnostics.update_target_cosine or 0) > 0.5


def one_step(**changes: Any) -> tuple[Any, StepResult]:
    """A step of a fresh model under default options, changed by `changes`."""
    model = trainable()
    weights = tuple(changes.pop("candidate_weights", ()))
    settings = {"options": PolicyOptions(n_keep=3), "dtype": "float64", "proj_rank": 4, **changes}
    policy = settings.pop("policy", "full")
    online = OnlineStep(model, torch.optim.SGD(model.parameters(), lr=1.0), policy, **settings)
    return model, online.step(offer(weights=weights), encoded(2, seed=9))


def test_clip_bounds_the_norm_and_zero_never_clips() -> None:
    free, tight = one_step(clip=0.0)[1], one_step(clip=0.01)[1]
    assert free.clip_factor == 1.0
    assert tight.grad_norm == pytest.approx(free.grad_norm, rel=1e-12)
    assert tight.clip_factor == pytest.approx(0.01 / (free.grad_norm + 1e-6), rel=1e-12)
    still = trainable()
    moved = [p.detach() - q.detach() for p, q in zip(one_step(clip=0.01)[0].parameters(), still.parameters())]
    # The update of SGD at rate 1 has the norm that clipping left: float64, and the constant 1e-6 beside the norm.
    assert float(torch.cat([m.flatten() for m in moved]).norm()) == pytest.approx(0.01, rel=1e-5)


def test_selection_weights_multiply_and_can_be_switched_off() -> None:
    given = (1.0, 2.0, 1.0, 1.0, 4.0, 3.0)
    on = one_step(candidate_weights=given)[1]
    assert on.weight_N == pytest.approx([w / 2 for w in given], rel=1e-15)
    off = one_step(candidate_weights=given, selection_weights=False)[1]
    assert off.weight_N == (1.0,) * 6
    assert off.loss != on.loss


def test_token_limit_is_never_exceeded_and_nothing_steps_where_nothing_fits() -> None:
    model = trainable()
    before = [p.detach().clone() for p in model.parameters()]
    online = OnlineStep(model, torch.optim.SGD(model.parameters(), lr=1.0), "full", dtype="float64")
    candidates = offer()
    result = online.step(candidates, token_limit=min(item.tokens for item in candidates) - 1)
    assert not result.applied
    assert online.steps_taken == 0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    assert online.step(candidates, token_limit=20).trained_tokens <= 20


@pytest.mark.parametrize("policy", ["full", "filter-then-weight"])
def test_a_sample_without_finite_loss_is_named_and_nothing_moves(policy: str) -> None:
    """One token's embedding is NaN; it stands in one candidate alone."""
    model = trainable()
    candidates = offer()
    counts = [{*item.encoded.ids} for item in candidates]
    poison = next(t for t in sorted(counts[2]) if not any(t in other for i, other in enumerate(counts) if i != 2))
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = float("nan")
    before = [p.detach().clone() for p in model.parameters()]
    online = OnlineStep(model, torch.optim.AdamW(model.parameters()), policy, dtype="float64", proj_rank=4)
    target = [Encoded(ids=[5, 6, 7], loss_mask=[False, True, True])]
    with pytest.raises(LehrError, match=r"step 1: .*not finite.*id-2\. ") as caught:
        online.step(candidates, target)
    assert "id-1" not in str(caught.value)
    assert all(
        torch.equal(
            p,
            q,
        )
        or torch.isnan(q).any()
        for p, q in zip(model.parameters(), before)
    )
    assert not online.optimizer.state


def test_infinite_gradient_is_an_error() -> None:
    model = trainable()
    online = OnlineStep(model, torch.optim.SGD(model.parameters(), lr=1.0), Fixed((0,), (1.0,)), dtype="float64")
    parameter = model.lm_head.weight
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(LehrError, match=r"step 1: norm of the gradient .*id-0"):
        online.step(offer())


def test_a_policy_that_compares_needs_a_target() -> None:
    model = trainable()
    online = OnlineStep(model, torch.optim.AdamW(model.parameters()), dtype="float64", proj_rank=4)
    with pytest.raises(InputError, match="target samples"):
        online.step(offer())
    with pytest.raises(InputError, match="at least one candidate"):
        online.step([])


def test_nothing_is_left_on_the_model() -> None:
    """Its forwards, modes of gradient and hooks are the user's own again after a step."""
    model = trainable()
    online = OnlineStep(model, torch.optim.AdamW(model.parameters()), dtype="float64", proj_rank=4)
    online.step(offer(), encoded(2))
    assert all(p.requires_grad for p in model.parameters())
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert all(not module._forward_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_bfloat16_stays_near_float32() -> None:
    """Autocast over float32 weights: relative rounding 2^-9 a product, some twenty in a row: 10 % bounds the loss's and
    the norm's difference."""
    found = []
    for dtype in ("float32", "bfloat16"):
        model = trainable(dtype=torch.float32)
        online = OnlineStep(
            model, torch.optim.AdamW(model.parameters()), options=PolicyOptions(n_keep=6), dtype=dtype, proj_rank=4
        )
        result = online.step(offer(), encoded(2))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert result.geometry is not None
        found.append((result.loss, result.target_loss, result.geometry.gram_NN.diagonal()))
    assert found[0][0] == pytest.approx(found[1][0], rel=0.1)
    assert found[0][1] == pytest.approx(found[1][1], rel=0.1)
    assert found[0][0] != found[1][0]
    assert float((found[0][2] - found[1][2]).norm() / found[0][2].norm()) < 0.1


def both_modes(
    kind: str, dtype: torch.dtype, weights: tuple[float, ...] = (), batch_tokens: int = 10_000
) -> tuple[Any, Any]:
    """(model after a step and its result) in one pass and in two, over the same candidates, target and state."""
    found = []
    for mode in ("one-pass", "two-pass"):
        model = trainable(kind, dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        online = OnlineStep(model, optimizer, warmup_select=1, clip=0.0, batch_tokens=batch_tokens, mode=mode)  # type: ignore[arg-type]
        results = [online.step(offer(6, seed, weights), encoded(3, seed=50 + seed)) for seed in range(3)]
        found.append((model, results))
    return found[0], found[1]


@pytest.mark.parametrize("kind", sorted(MODELS))
@pytest.mark.parametrize(("dtype", "close", "far"), [(torch.float64, 1e-8, 1e-8), (torch.float32, 1e-3, 0.02)])
def test_one_pass_moves_the_parameters_as_two_do(kind: str, dtype: torch.dtype, close: float, far: float) -> None:
    """After three steps, the journal's numbers and every parameter's move: autograd's second pass is the reference.

    float64 1e-8. In float32 gradients agree to 1e-5, and AdamW's quotient of moments passes that on; an entry whose gradient is all
    rounding moves by chance, so what a parameter moved is compared as a whole.
    """
    (one, results), (two, wanted) = both_modes(kind, dtype, weights=(1.0, 2.0, 0.5, 1.0, 1.0, 3.0), batch_tokens=60)
    start = trainable(kind, dtype)
    for result, other in zip(results, wanted):
        assert (result.mode, other.mode) == ("one-pass", "two-pass")
        assert result.decision.kept == other.decision.kept
        assert result.weight_N == pytest.approx(other.weight_N, rel=close)
        assert result.loss == pytest.approx(other.loss, rel=close)
        assert result.grad_norm == pytest.approx(other.grad_norm, rel=close)
    before = dict(start.named_parameters())
    named = dict(two.named_parameters())
    moved = torch.cat([(p - before[name]).flatten() for name, p in two.named_parameters()]).norm()
    apart = torch.cat([(p - named[name]).flatten() for name, p in one.named_parameters()]).norm()
    assert float((apart / moved).detach()) < far


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_one_pass_hands_over_the_weighted_gradient(kind: str) -> None:
    """By SGD at rate 1, and against dense gradients sample by sample: 1e-10 of every parameter's."""
    moves = []
    for mode in ("one-pass", "two-pass"):
        model = trainable(kind)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        options = PolicyOptions(metric="sgd", n_keep=3)
        online = OnlineStep(model, optimizer, options=options, clip=0.0, batch_tokens=60, mode=mode)  # type: ignore[arg-type]
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        result = online.step(offer(6), encoded(3, seed=9))
        assert result.mode == mode and 0 < len(result.decision.kept) <= 3
        moves.append({name: before[name] - p.detach() for name, p in model.named_parameters()})
    whole = torch.stack([g.norm() for g in moves[1].values()]).norm()
    for name, wanted in moves[1].items():
        assert float((moves[0][name] - wanted).norm()) <= 1e-10 * float(torch.maximum(wanted.norm(), 1e-6 * whole)), (
            name
        )


def test_one_pass_is_refused_with_the_reason() -> None:
    model = trainable("gpt2")
    model.transformer.h[0].mlp.dropout.p = 0.1
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(InputError, match="cannot be trained in one pass: it has dropout"):
        OnlineStep(model, optimizer, mode="one-pass")
    model = trainable("llama")
    model.gradient_checkpointing_enable()
    with pytest.raises(InputError, match="checkpoints activations"):
        OnlineStep(model, torch.optim.AdamW(model.parameters()), mode="one-pass")


def test_the_estimate_of_what_one_pass_holds() -> None:
    """Within a third of what is held: norms keep their inputs too, and tokens that carry no loss reach no head."""
    model = trainable("llama", torch.float32)
    online = OnlineStep(model, torch.optim.AdamW(model.parameters()), mode="one-pass")
    items = offer(6)
    assert online._sketching is not None
    online._sketching(items, 1)
    held = online._sketching.held_bytes
    padded = max(item.tokens for item in items) * len(items)
    assert held / (held_bytes_per_token(model, "float32") * padded) == pytest.approx(1.0, abs=0.34)
