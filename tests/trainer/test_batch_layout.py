"""Packed batches of a training: the step of padded ones, in one row without padding, where the model keeps samples apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.errors import InputError
from schemas.run import Run
from selection_ops.online.options import PolicyOptions
from tests.families import FAMILIES, wide_arithmetic
from tests.trainer.streams import make_run
from tests.trainer.test_loop import settings
from tests.trainer.test_lora import adapted
from tests.trainer.test_step import encoded, offer, trainable
from trainer.loop import train
from trainer.modes import choose_layout
from trainer.step import OnlineStep
from trainer.trainee import trained_parameters


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    return make_run(tmp_path_factory.mktemp("layout"))


def stepped(
    model: Any, layout: Any, mode: Any, **changes: Any
) -> tuple[dict[str, torch.Tensor], Any, list[tuple[int, ...]]]:
    """What a step of rate 1 moves, its result, and the shapes of ids that the model was given."""
    parameters = trained_parameters(model)
    online = OnlineStep(
        model, torch.optim.SGD(list(parameters.values()), lr=1.0), "filter-then-weight",
        options=PolicyOptions(n_keep=4, metric="sgd"), dtype="float64", batch_tokens=120, mode=mode, batch_layout=layout, **changes,
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in parameters.items()}
    shapes: list[tuple[int, ...]] = []
    watched = model.get_base_model() if hasattr(model, "get_base_model") else model
    handle = watched.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: shapes.append(tuple(args[0].shape))
    )
    result = online.step(offer(7), encoded(3, seed=5))
    handle.remove()
    return {name: before[name] - p.detach() for name, p in parameters.items()}, result, shapes


@pytest.mark.parametrize("mode", ["two-pass", "one-pass"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "lora"])
def test_packed_and_padded_steps_are_the_same(kind: str, mode: str) -> None:
    """Decisions, losses and every parameter's gradient; 1e-10 of its norm in float64."""

    def model() -> Any:
        return adapted() if kind == "lora" else FAMILIES[kind](torch.float64).requires_grad_(True)

    with wide_arithmetic():
        padded, first, wide = stepped(model(), "padded", mode)
        packed, second, long = stepped(model(), "packed", mode)
    assert second.decision.kept == first.decision.kept and len(first.decision.kept) > 1
    assert second.weight_N == pytest.approx(first.weight_N, rel=1e-8)
    assert second.loss == pytest.approx(first.loss, rel=1e-10)
    for name, gradient in padded.items():
        assert float((packed[name] - gradient).norm()) <= 1e-10 * float(gradient.norm()) + 1e-14, name
    assert first.padding_share > 0.0 == second.padding_share
    longest = max(item.tokens for item in offer(7))
    assert max(tokens for rows, tokens in long if rows == 1) > longest >= max(tokens for _, tokens in wide)


def test_a_model_that_mixes_packed_samples_is_refused_by_name() -> None:
    model = FAMILIES["mamba"](torch.float32).requires_grad_(True)
    with pytest.raises(InputError, match=r"MambaForCausalLM .*layout packed"):
        choose_layout("packed", model, "eager", "two-pass")
    layout, why = choose_layout("auto", model, "flash_attention_2", "two-pass")
    assert layout == "padded" and "depends on the samples before it" in why


def test_auto_packs_where_attention_skips_what_a_mask_would_hide() -> None:
    model = trainable("llama", torch.float32)
    assert choose_layout("auto", model, "sdpa", "one-pass")[0] == "padded"
    assert choose_layout("auto", model, "flex_attention", "one-pass")[0] == "packed"
    assert choose_layout("padded", model, "flex_attention", "one-pass")[0] == "padded"
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_packed_training_is_the_padded_one_to_rounding(world: tuple[Run, Path]) -> None:
    run, folder = world
    found = {}
    for layout in ("padded", "packed"):
        name = f"layout-{layout}"
        found[layout] = train(run, settings(folder, name, policy="filter-then-weight", layout=layout))
        assert run.manifest("train", name).spec["layout"] == layout
    assert found["packed"]["eval_loss"] == pytest.approx(found["padded"]["eval_loss"], rel=1e-4)
    with pytest.raises(InputError, match="layout was 'packed' and is now 'padded'"):
        train(run, settings(folder, "layout-packed", policy="filter-then-weight", layout="padded"))
