"""FLOPs by formula are those that torch counts in the products of a real pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM

from selection_ops.flops import ModelSize, model_size
from tests.tiny import MODELS

LENGTH = 48


def counted(model: Any, kind: str) -> float:
    """Operations of torch's own products in one pass over a sample of `LENGTH` tokens."""
    model.config._attn_implementation = "eager"
    ids_BT = torch.arange(LENGTH)[None] % 50 + 3
    for parameter in model.parameters():
        parameter.requires_grad_(kind == "trained")
    with FlopCounterMode(display=False) as counter:
        if kind == "scored":
            table = model.get_input_embeddings()
            out = model(inputs_embeds=table(ids_BT).detach().requires_grad_(True))
        else:
            out = model(input_ids=ids_BT)
        if kind != "forward":
            out.logits.sum().backward()
    return float(counter.get_total_flops())


@pytest.mark.parametrize("kind", ["forward", "scored", "trained"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "neox"])
def test_formula_is_what_torch_counts(family: str, kind: str) -> None:
    model = MODELS[family]()
    formula = getattr(model_size(model), kind)([LENGTH])
    # Rotary angles are a small product that the formula leaves out; GPT-NeoX and GPT-2 have nothing else either.
    assert counted(model, kind) == pytest.approx(formula, rel=0.01)


def test_a_token_meets_the_chosen_experts_only() -> None:
    config = MixtralConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    size = model_size(MixtralForCausalLM(config))
    attention = 2 * (32 * 32 * 2 + 32 * 16 * 2)
    experts, router = 2 * 2 * 3 * 32 * 48, 2 * 4 * 32
    total = attention + experts + router + 400 * 32
    assert size == ModelSize(parameters=total, trained_parameters=total, attention=2 * 32)


def test_a_tied_head_counts_once_and_a_free_table_not_at_all() -> None:
    from tests.tiny import tiny_llama

    assert model_size(tiny_llama(tied=True)) == model_size(tiny_llama(tied=False))


def test_costs_add_over_samples_and_grow_with_their_squares() -> None:
    size = ModelSize(parameters=10, trained_parameters=10, attention=3)
    assert size.trained([2, 5]) == size.trained([2]) + size.trained([5])
    assert size.trained([5]) == 6 * 10 * 5 + 12 * 3 * 25
    assert size.scored([5]) == 4 * 10 * 5 + 12 * 3 * 25
    assert size.formed([5]) == size.trained([5]) - size.scored([5])


def test_an_adapter_spares_the_gradients_of_what_is_frozen() -> None:
    from tests.tiny import tiny_llama
    from trainer.lora import add_lora

    model = add_lora(tiny_llama(), rank=4, alpha=8, dropout=0, targets=(), seed=0)
    size = model_size(model)
    base = model_size(tiny_llama())
    assert size.parameters - base.parameters == size.trained_parameters
    ids_BT = torch.arange(LENGTH)[None] % 50 + 3
    model.base_model.model.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counter:
        table = model.get_input_embeddings()
        model(inputs_embeds=table(ids_BT).detach().requires_grad_(True)).logits.sum().backward()
    assert counter.get_total_flops() == pytest.approx(size.trained([LENGTH]), rel=0.01)
