"""Token means and token masks: what is compared, what is trained on, against dense gradients and scores by module hooks."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from schemas.errors import InputError
from schemas.spec import BatchLayout
from selection_ops.encoding import Encoded
from selection_ops.online.options import PolicyOptions
from selection_ops.online.policies import Decision
from tests.reference.online import sample_gradients
from tests.trainer.test_step import Fixed, encoded, offer, trainable
from tests.trainer.test_step_geometry import BETA1, BETA2, EPS, POWERS, Oracle
from tests.trainer.test_step_modes import handed_over
from trainer.candidate import Candidate
from trainer.parallel import OneProcess
from trainer.step import OnlineStep
from trainer.token_scores import TokenScores, mask_tokens

UNEVEN = (1.0, 2.0, 0.5, 1.0, 1.0, 3.0)


def online(model: Any, policy: Any = "filter-then-weight", **changes: Any) -> OnlineStep:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(BETA1, BETA2), eps=EPS)
    given = {"dtype": "float64", "proj_rank": 4, "warmup_select": 1, "clip": 0.0, "batch_tokens": 40, **changes}
    return OnlineStep(model, optimizer, policy, **given)


def assert_handed_over(model: Any, found: list[torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """1e-10 of every parameter's norm; what is all rounding is measured against the whole gradient."""
    whole = float(torch.stack([gradient.norm() for gradient in wanted.values()]).norm())
    for gradient, (name, _) in zip(found, model.named_parameters(), strict=True):
        assert float((gradient - wanted[name]).norm()) <= 1e-10 * max(float(wanted[name].norm()), 1e-4 * whole), name


@pytest.mark.parametrize(
    "mode,gram", [("two-pass", "sketched"), ("one-pass", "sketched"), ("one-pass", "survivors"), ("one-pass", "exact")]
)
def test_token_means_are_compared_and_weighted(mode: Any, gram: Any) -> None:
    """K_ij / (n_i n_j) and b_i / n_i; the gradient handed over is sum v_i (g_i / n_i) / sum v_i, v the weights of the choice times the stream's."""
    model = trainable()
    step = online(model, mode=mode, gram=gram, options=PolicyOptions(n_keep=3, granularity="token-mean"))
    plain_model = trainable()
    plain = online(plain_model, mode=mode, gram=gram, options=PolicyOptions(n_keep=3))
    seen = handed_over(step.optimizer)  # type: ignore[arg-type]
    for number in range(2):
        plain_model.load_state_dict(model.state_dict())
        plain.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
        candidates, target = offer(6, number, UNEVEN), encoded(3, seed=50 + number)
        count_N = torch.tensor([item.loss_tokens for item in candidates], dtype=torch.float64)
        assert len(set(count_N.tolist())) > 2
        dense = [sample_gradients(model, item.encoded)[0] for item in candidates]
        result, sums = step.step(candidates, target), plain.step(candidates, target)
        space, summed = result.geometry, sums.geometry
        assert space is not None and summed is not None
        assert torch.allclose(space.gram_NN, summed.gram_NN / torch.outer(count_N, count_N), rtol=1e-12)
        assert torch.allclose(space.align_N, summed.align_N / count_N, rtol=1e-12)
        if gram == "survivors":
            assert space.exact_gram is not None and summed.exact_gram is not None
            whole = summed.exact_gram([4, 1]) / torch.outer(count_N[[4, 1]], count_N[[4, 1]])
            assert torch.allclose(space.exact_gram([4, 1]), whole, rtol=1e-12)
        raw = {i: w * UNEVEN[i] for i, w in zip(result.decision.kept, result.decision.weight_S.tolist(), strict=True)}
        assert sum(result.weight_N) == pytest.approx(len(raw), rel=1e-12)
        total = sum(raw.values())
        wanted = {
            name: sum(w * dense[i][name] / count_N[i] for i, w in raw.items()) / total
            for name, _ in model.named_parameters()
        }
        assert_handed_over(model, seen[number], wanted)  # type: ignore[arg-type]


def test_full_by_token_means_and_gradient_norms() -> None:
    """Policies without a target, too: every sample counts by its mean, and `grad-norm` ranks by norms over loss tokens."""
    model, candidates = trainable(), offer(6)
    counts = [item.loss_tokens for item in candidates]
    options = PolicyOptions(n_keep=6, granularity="token-mean")
    result = online(model, "full", options=options, selection_weights=False).step(candidates)
    shares = [weight * count for weight, count in zip(result.weight_N, counts)]
    assert shares == pytest.approx([shares[0]] * 6, rel=1e-12)
    scores: list[np.ndarray] = []
    for granularity in ("sample", "token-mean"):
        options = PolicyOptions(n_keep=6, granularity=granularity)
        found = online(trainable(), "grad-norm", options=options).step(candidates).decision.score_N
        assert found is not None
        scores.append(found.numpy())
    assert scores[1] == pytest.approx(scores[0] / np.array(counts), rel=1e-12)


def scores_by_hooks(model: Any, item: Encoded, directions: dict[str, np.ndarray]) -> np.ndarray:
    """sum over sites of delta_t' D a_t of every position, by hooks around one forward and backward of one sample."""
    ids = torch.tensor([item.ids])
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    hooks = []
    for name in directions:

        def note(module: Any, args: Any, output: torch.Tensor, name: str = name) -> None:
            inputs[name], outputs[name] = args[0].detach()[0], output
            output.retain_grad()

        hooks.append(model.get_submodule(name).register_forward_hook(note))
    logits = model(input_ids=ids, use_cache=False).logits[0]
    places = [place for place in range(1, len(item.ids)) if item.loss_mask[place]]
    losses = -torch.log_softmax(logits, 1)
    sum(losses[place - 1, item.ids[place]] for place in places).backward()  # type: ignore[union-attr]
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    score_T = np.zeros(len(item.ids))
    for name, direction in directions.items():
        delta_TO = outputs[name].grad[0].numpy()  # type: ignore[index]
        score_T += np.einsum("to,oi,ti->t", delta_TO, direction, inputs[name].numpy())
    return score_T


@pytest.mark.parametrize("kind,layout,metric", [("llama", "padded", "update"), ("gpt2", "packed", "target")])
def test_tokens_behind_positions_of_negative_score_carry_no_loss(kind: str, layout: BatchLayout, metric: str) -> None:
    """The gradient handed over is autograd's of the masked losses, over as many tokens as remain; 1e-10 in float64."""
    model = trainable(kind)
    options = PolicyOptions(n_keep=3, metric=metric, granularity="token-mask")
    step = online(model, options=options, alignment="exact", batch_layout=layout)
    seen = handed_over(step.optimizer)  # type: ignore[arg-type]
    for number in range(3):
        candidates, target = offer(6, number, UNEVEN), encoded(3, seed=50 + number)
        acting = metric if number else "sgd"
        truth = Oracle(model, step.optimizer, candidates, target, metric=acting, form="exact")
        directions = truth.moved(truth.u, 1, POWERS[acting][0])
        masks = []
        for item in candidates:
            score_T = scores_by_hooks(model, item.encoded, directions)
            mask = list(item.encoded.loss_mask)
            for place in range(1, len(mask)):
                mask[place] = mask[place] and not score_T[place - 1] < 0
            masks.append(mask if any(mask) else list(item.encoded.loss_mask))
        dense = [
            sample_gradients(model, Encoded(ids=item.encoded.ids, loss_mask=mask))
            for item, mask in zip(candidates, masks)
        ]
        result = step.step(candidates, target)
        assert result.metric == acting
        kept = result.decision.kept
        cleared = tuple(
            item.loss_tokens - sum(mask) if place in kept else 0
            for place, (item, mask) in enumerate(zip(candidates, masks))
        )
        assert result.masked_N == cleared and sum(cleared) > 0
        assert result.trained_tokens == sum(candidates[place].tokens for place in kept)
        total = sum(result.weight_N[place] * sum(masks[place]) for place in kept)
        wanted = {
            name: sum(result.weight_N[place] * dense[place][0][name] for place in kept) / total
            for name, _ in model.named_parameters()
        }
        assert_handed_over(model, seen[number], wanted)  # type: ignore[arg-type]
        loss = sum(result.weight_N[place] * dense[place][1] for place in kept) / total
        assert result.loss == pytest.approx(loss, rel=1e-10)


def test_a_sample_that_would_be_left_without_loss_is_trained_on_whole() -> None:
    """And the reason says so; a position's score decides about the token behind it, and none about the first."""
    masks = [
        [False, True, True, True],
        [False, True, True, False],
        [False, False, True, True],
        [False, True, False, False],
    ]
    scores = [[1.0, -1.0, 0.0, -9.0], [-1.0, -2.0, 3.0, 4.0], [-5.0, -1.0, -1.0, 2.0], [-1.0, 1.0, 1.0, 1.0]]
    items = [
        Candidate(sample_id=str(i), encoded=Encoded(ids=[5, 6, 7, 8], loss_mask=mask)) for i, mask in enumerate(masks)
    ]
    decision = Decision(kept=(0, 1), weight_S=torch.ones(2), reasons=("kept", "kept", "left", "left"))
    found = mask_tokens(items, [torch.tensor(row) for row in scores], decision)
    assert [item.encoded.loss_mask for item in found.candidates] == [[False, True, False, True], *masks[1:]]
    assert found.masked_N == (1, 0, 0, 0)
    whole = "kept; no token would be left: trained on whole"
    assert found.decision.reasons == ("kept", whole, "left", "left")
    assert found.decision.kept == (0, 1)


def test_scores_of_all_processes_are_put_together() -> None:
    """Each fills in its share; padding behind a sample is dropped."""

    class Other(OneProcess):
        def sum(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor + torch.tensor([7.0, 8.0, 0, 0, 0, 9.0])

    scores = TokenScores([2, 3, 1])
    scores.take([1], torch.tensor([[1.0, 2.0, 3.0, 0.0], [4.0, 4.0, 4.0, 4.0]]))
    assert [score_T.tolist() for score_T in scores.of_all(Other())] == [[7.0, 8.0], [1.0, 2.0, 3.0], [9.0]]


def test_masks_are_refused_where_there_are_no_scores() -> None:
    model, options = trainable(), PolicyOptions(granularity="token-mask")
    for policy in ("full", "random", "loss", "grad-norm"):
        with pytest.raises(InputError, match=f"policy {policy} looks at none"):
            online(model, policy, options=options, alignment="exact")
    with pytest.raises(InputError, match="policy Fixed looks at none"):
        online(model, Fixed((0,), (1.0,)), options=options, alignment="exact")
    for given in ({"mode": "one-pass", "alignment": "exact"}, {"alignment": "sketched"}):
        with pytest.raises(InputError, match="needs mode two-pass and alignment exact"):
            online(model, options=options, **given)
    with pytest.raises(InputError, match="sample, token-mean, token-mask"):
        PolicyOptions(granularity="token")
