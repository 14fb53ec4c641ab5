"""Packed samples: what a sample gives alone and padded, or the reason why not."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import transformers

from schemas.errors import InputError
from selection_ops.batching import Batch, Segments, collate
from selection_ops.encoding import Encoded
from selection_ops.engine import GradientEngine, SampleFeatures
from selection_ops.losses import HeadRoute, step_loss
from selection_ops.model import causal_model
from selection_ops.packing import packing_refusal, require_packing
from selection_ops.sites import find_sites
from tests.families import _BLOCK, FAMILIES, _built, wide_arithmetic

LENGTHS = (9, 4, 13, 2, 9)
ASIDE = "depends on the samples before it or on its place"
REFUSED = {
    # They form their masks without the positions.
    "opt": {"blocks": ASIDE, "all": "OPTLearnedPositionalEmbedding runs sample by sample"},
    "gpt-oss": {"blocks": ASIDE, "all": "GptOssAttention runs sample by sample"},
    # A state and a convolution run over the ends of samples.
    "mamba": {"blocks": ASIDE, "all": "MambaMixer runs sample by sample"},
    "mamba2": {"blocks": ASIDE, "all": "Mamba2Mixer runs sample by sample"},
}

EXPANDED = {"lora-ends", "unfrozen-lora-ends"}
"""With every parameter: their embedding's adapter has no site type of its own, so its module runs sample by sample."""


def samples(lengths: tuple[int, ...] = LENGTHS) -> list[Encoded]:
    """Every last token carries loss, so that a loss at the border of two samples would show."""
    rng = random.Random(0)
    made = []
    for length in lengths:
        mask = [False] + [rng.random() < 0.7 for _ in range(length - 2)] + [True]
        made.append(Encoded(ids=[rng.randrange(3, 400) for _ in range(length)], loss_mask=mask))
    return made


def engine_of(model: Any, attribute: Any = "all", **changes: Any) -> GradientEngine:
    report = find_sites(model, attribute)
    return GradientEngine(model, report.input_groups, report.small, proj_rank=3, k=0, seed=11, **changes)


def gap(found_BK: torch.Tensor, wanted_BK: torch.Tensor) -> float:
    """Largest relative error of a row."""
    return float(((found_BK - wanted_BK).norm(dim=1) / wanted_BK.norm(dim=1)).max())


def same(found: SampleFeatures, wanted: SampleFeatures, tolerance: float) -> None:
    assert gap(found.sketch_BK, wanted.sketch_BK) < tolerance
    assert gap(found.loss_B[:, None], wanted.loss_B[:, None]) < tolerance
    assert gap(found.grad_norm_B[:, None], wanted.grad_norm_B[:, None]) < tolerance
    assert torch.equal(found.loss_tokens_B, wanted.loss_tokens_B)


def alone(engine: GradientEngine, items: list[Encoded]) -> SampleFeatures:
    found = [engine.features(collate([item])) for item in items]
    return SampleFeatures(
        loss_B=torch.cat([part.loss_B for part in found]),
        loss_tokens_B=torch.cat([part.loss_tokens_B for part in found]),
        sketch_BK=torch.cat([part.sketch_BK for part in found]),
        grad_norm_B=torch.cat([part.grad_norm_B for part in found]),
    )


def phi_with_normalised_queries(dtype: torch.dtype, heads: int = 4) -> Any:
    """Its query norm is called with [B, heads, T, .]."""
    changes = {"num_attention_heads": heads, "num_key_value_heads": heads, "hidden_size": 8 * heads}
    return _built(
        transformers.PhiConfig(**{**_BLOCK, **changes}, qk_layernorm=True), transformers.PhiForCausalLM, dtype
    )


@pytest.mark.parametrize("family", [*sorted(FAMILIES.keys() - REFUSED.keys() - EXPANDED), "phi-normalised"])
def test_invariant_1_packed_is_padded_is_alone(family: str) -> None:
    """Every parameter of every family that keeps samples apart, in float64. 1e-10: the same products of some ten terms of 1e-16 in
    another order, amplified by two blocks (invariant 3)."""
    items = samples()
    with wide_arithmetic():
        make = FAMILIES.get(family, phi_with_normalised_queries)
        engine = engine_of(make(torch.float64))
        assert packing_refusal(engine) == ""
        with engine:
            packed = engine.features(collate(items, layout="packed"))
            padded = engine.features(collate(items))
            single = alone(engine, items)
            turned = engine.features(collate(items[::-1], layout="packed"))
    same(packed, padded, 1e-10)
    same(packed, single, 1e-10)
    assert gap(turned.sketch_BK.flip(0), single.sketch_BK) < 1e-10


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral"])
def test_invariant_1_packed_by_either_attention(family: str, attention: str) -> None:
    """float32, 1e-5 (invariant 3); gemma3's layers have a sliding window too."""
    model = FAMILIES[family](torch.float32)
    model.set_attn_implementation(attention)
    items = samples((40, 7, 90, 23))
    with engine_of(model, "blocks") as engine:
        same(engine.features(collate(items, layout="packed")), alone(engine, items), 1e-5)


@pytest.mark.parametrize("loss", ["sum", "mean"])
def test_packed_labels_and_loss(loss: str) -> None:
    """Labels of another source lie as the ids do."""
    items = samples()
    labels = [[(token + 5) % 400 for token in item.ids] for item in items]
    with wide_arithmetic(), engine_of(FAMILIES["llama"](torch.float64), "blocks", loss=loss) as engine:
        padded = engine.features(collate(items, labels=labels))
        same(engine.features(collate(items, labels=labels, layout="packed")), padded, 1e-10)
        assert gap(padded.sketch_BK, engine.features(collate(items)).sketch_BK) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("attribute", ["blocks", "all"])
@pytest.mark.parametrize("family", sorted(REFUSED))
def test_what_mixes_samples_is_refused_with_the_reason(family: str, attribute: str, dtype: torch.dtype) -> None:
    engine = engine_of(FAMILIES[family](dtype), attribute)
    assert REFUSED[family][attribute] in packing_refusal(engine)
    with pytest.raises(InputError, match=rf"{type(engine.model).__name__} \(.* attention\).*layout packed"):
        require_packing(engine)


@pytest.mark.parametrize("family", sorted(EXPANDED))
def test_an_adapted_embedding_is_packed_where_it_is_not_attributed(family: str) -> None:
    assert "Embedding runs sample by sample" in packing_refusal(engine_of(FAMILIES[family](torch.float32)))
    require_packing(engine_of(FAMILIES[family](torch.float32), "blocks"))


@pytest.mark.parametrize("family", ["llama", "mixtral", "neox", "gemma2"])
def test_bfloat16_is_no_reason(family: str) -> None:
    require_packing(engine_of(FAMILIES[family](torch.bfloat16)))


def test_a_model_that_does_not_look_at_positions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken and dropped, or not taken at all; and the model is as before."""
    model: Any = FAMILIES["llama"](torch.float32)
    forward = type(model.model).forward

    def deaf(self: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return forward(self, **kwargs)

    def strict(self: Any, input_ids: Any, attention_mask: Any = None, use_cache: bool = False) -> Any:
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    engine = engine_of(model)
    assert packing_refusal(engine) == ""
    monkeypatch.setattr(type(model.model), "forward", deaf)
    assert ASIDE in packing_refusal(engine)
    monkeypatch.setattr(type(model.model), "forward", strict)
    assert "unexpected keyword argument 'position_ids'" in packing_refusal(engine)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_positions_without_a_mask_of_their_own_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions restart, and attention reaches over the border all the same."""
    from transformers import masking_utils

    engine = engine_of(FAMILIES["gpt2"](torch.float32))
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    assert ASIDE in packing_refusal(engine)


def test_as_many_heads_as_the_tokens_of_the_search_are_refused_not_mixed_up() -> None:
    """[B, 3, T, .] of three heads looks like [B, T, ., .] of three tokens when sites are searched."""
    assert "no axis of the row's" in packing_refusal(engine_of(phi_with_normalised_queries(torch.float32, heads=3)))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_step_loss_of_packed_samples(family: str) -> None:
    """Weighted losses and their gradients with respect to every parameter; gemma2 forms whole logits. 1e-10 as above."""
    items, weight_B = samples(), torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0])
    with wide_arithmetic():
        model = causal_model(FAMILIES[family](torch.float64))
        route = HeadRoute(model)
        found = []
        for layout in ("padded", "packed"):
            batch = collate(items, layout=layout)  # type: ignore[arg-type]
            loss = step_loss(route, batch, weight_B)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            _, loss_B = route.weighted_loss(batch, weight_B)
            found.append([loss.detach()[None], loss_B, *(gradient.reshape(-1) for gradient in gradients)])
    for one, other in zip(*found):
        assert float((one - other).norm()) <= 1e-10 * float(one.norm())


def test_collate_packs_one_behind_another() -> None:
    items = [
        Encoded(ids=[7, 8, 9], loss_mask=[False, False, True]),
        Encoded(ids=[5], loss_mask=[False]),
        Encoded(ids=[4, 6], loss_mask=[True, True]),  # the first token of a sample is never predicted
    ]
    batch: Batch = collate(items, layout="packed", labels=[[1, 2, 3], [4], [5, 6]])
    assert batch.ids_BT.tolist() == [[7, 8, 9, 5, 4, 6]]
    assert batch.labels_BT is not None and batch.labels_BT.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch.loss_BT.tolist() == [[False, False, True, False, False, True]]
    assert batch.segments is not None
    assert batch.segments.position_T.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.segments.sample_T.tolist() == [0, 0, 0, 1, 2, 2]
    assert [batch.segments.rows(sample) for sample in range(3)] == [slice(0, 3), slice(3, 4), slice(4, 6)]
    assert (batch.samples, batch.tokens) == (3, 6)
    assert batch.sample_of_loss().tolist() == [0, 2]
    assert batch.sum_by_sample(torch.tensor([[1.0, 2.0, 0.0, 0.0, 8.0]])).tolist() == [3.0, 0.0, 8.0]
    assert batch.sum_by_sample(batch.loss_BT[:, 1:]).tolist() == [1, 0, 1]
    assert collate(items).samples == 3
    assert collate(items).sample_of_loss().tolist() == [0, 2]


def test_segments_split_every_form_that_tokens_come_in() -> None:
    segments = Segments([3, 1, 2])
    values = torch.arange(1.0, 6 * 2 * 5 + 1).reshape(6, 2, 5)
    forms = {
        0: values.reshape(6, 10),
        1: values[None],
        2: values.transpose(0, 1)[None],
    }
    for axis, tensor in forms.items():
        last = tensor.shape[-1]
        for zero in (True, False):
            found = segments.split(tensor, axis, zero=zero)
            for sample, (start, length) in enumerate(zip((0, 3, 4), (3, 1, 2))):
                own = values[start : start + length].reshape(-1, last)
                first = values[start].reshape(-1, last)
                filled = torch.cat([own, *[torch.zeros_like(first) if zero else first] * (3 - length)])
                assert torch.equal(found[sample], filled)
    with pytest.raises(ValueError, match=r"\[1, 5, 2\] has no axis of the row's 6 tokens"):
        segments.split(torch.zeros(1, 5, 2), 1, zero=False)
