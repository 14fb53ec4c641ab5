"""Losses: equal to transformers', in chunks, with and without gradients of the head."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from selection_ops import losses
from selection_ops.batching import Batch, collate
from selection_ops.encoding import Encoded
from selection_ops.losses import HeadRoute, step_loss
from tests.reference.gradients import sample_loss
from tests.tiny import MODELS, tiny_llama, widen_norms


def samples(lengths: tuple[int, ...] = (9, 4, 13, 2), seed: int = 0) -> list[Encoded]:
    rng = random.Random(seed)
    made = []
    for length in lengths:
        mask = [False] + [rng.random() < 0.7 for _ in range(length - 2)] + [True]
        made.append(Encoded(ids=[rng.randrange(3, 400) for _ in range(length)], loss_mask=mask))
    return made


def hugging_face_loss(model: Any, batch: Batch) -> torch.Tensor:
    labels_BT = batch.ids_BT.masked_fill(~batch.loss_BT, -100)
    return model(
        input_ids=batch.ids_BT, attention_mask=batch.attention_BT.long(), labels=labels_BT, use_cache=False
    ).loss


def gemma() -> Any:
    """A model that caps its logits, so that its head alone does not give them."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, final_logit_softcapping=2.0, initializer_range=0.2,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize("chunk", [3, 512])
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_step_loss_with_equal_weights_is_the_token_mean_of_transformers(
    kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value and the gradient of every parameter, whatever the chunks."""
    monkeypatch.setattr(losses, "CHUNK_TOKENS", chunk)
    model: Any = MODELS[kind]()
    batch = collate(samples())
    theirs = hugging_face_loss(model, batch)
    theirs.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    ours = step_loss(model, batch, torch.ones(4))
    ours.backward()
    # float32: some twenty roundings of 6e-8 along the way of a mean of numbers of one sign.
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)
    scale = max(float(gradient.norm()) for gradient in wanted.values())
    for name, p in model.named_parameters():
        # 1e-5 of the tensor's norm (invariant 3). Tensors whose gradient cancels to nothing (key biases: the softmax does not
        # see them) hold rounding of the others.
        assert float((p.grad - wanted[name]).norm()) <= 1e-5 * float(wanted[name].norm()) + 1e-7 * scale, name


def test_weighted_step_loss_is_the_printed_quotient() -> None:
    model = widen_norms(tiny_llama(dtype=torch.float64))
    items, weights = samples(), [0.5, 0.0, 2.0, 1.25]
    sums = [float(sample_loss(model, item.ids, item.loss_mask).detach()) for item in items]
    counts = [sum(item.loss_mask) for item in items]
    wanted = sum(w * s for w, s in zip(weights, sums)) / sum(w * n for w, n in zip(weights, counts))
    found = step_loss(model, collate(items), torch.tensor(weights))
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-12)  # float64, some hundred additions
    parts = [
        step_loss(HeadRoute(model), collate([item]), torch.tensor([w]), normaliser=3.0)
        for item, w in zip(items, weights)
    ]
    assert float(torch.stack(parts).sum().detach()) == pytest.approx(
        sum(w * s for w, s in zip(weights, sums)) / 3.0, rel=1e-12
    )


@pytest.mark.parametrize("chunk", [1, 4, 512])
def test_frozen_head_gives_the_losses_and_input_gradients_of_autograd(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_TOKENS", chunk)
    model = widen_norms(tiny_llama(dtype=torch.float64))
    items = samples()
    route = HeadRoute(model)
    assert route.head is model.lm_head
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    upstream = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    exact_B = torch.stack([sample_loss(model, item.ids, item.loss_mask) for item in items])
    (wanted,) = torch.autograd.grad((exact_B * upstream).sum(), weight)
    found_B = route.sample_losses(collate(items))
    (found,) = torch.autograd.grad((found_B * upstream).sum(), weight)
    # float64, some hundred operations on numbers of size up to 10.
    assert torch.allclose(found_B, exact_B, rtol=1e-12, atol=0)
    assert float((found - wanted).norm()) < 1e-10 * float(wanted.norm())


@pytest.mark.parametrize("weighted", [True, False])
def test_a_model_that_caps_its_logits_takes_the_whole_route(weighted: bool) -> None:
    model, batch = gemma(), collate(samples())
    route = HeadRoute(model)
    assert route.head is None
    summed = route.weighted_loss(batch, torch.ones(4))[0] if weighted else route.sample_losses(batch).sum()
    found = summed / batch.loss_BT.sum()
    # float32 with a mean of some twenty losses.
    assert float(found.detach()) == pytest.approx(float(hugging_face_loss(model, batch).detach()), rel=1e-6)


def test_the_route_is_found_in_eval_mode_and_leaves_the_mode() -> None:
    model: Any = MODELS["gpt2"]()
    model.transformer.drop.p = 0.9  # in training mode two passes would differ
    model.train()
    assert HeadRoute(model).head is model.lm_head
    assert model.training
    assert model.transformer.drop.training


def test_samples_without_loss_tokens_have_loss_zero() -> None:
    model = tiny_llama()
    silent = Encoded(ids=[3, 4, 5], loss_mask=[False, False, False])
    route = HeadRoute(model)
    for losses_of in (route.sample_losses, lambda batch: route.weighted_loss(batch, torch.ones(len(batch.ids_BT)))[1]):
        loss_B = losses_of(collate([silent, *samples()]))
        assert loss_B[0] == 0
        assert (loss_B[1:] > 0).all()
        assert losses_of(collate([silent])).tolist() == [0.0]
