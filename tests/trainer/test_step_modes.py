"""The modes of a step: the gradient that reaches the optimizer, how many forward passes it took, and what acts together with what."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from selection_ops.online.options import PolicyOptions
from tests.reference.online import sample_gradients
from tests.tiny import MODELS
from tests.trainer.test_step import encoded, offer, trainable
from trainer.optimizers import muon
from trainer.step import OnlineStep

MODES: dict[str, dict[str, Any]] = {
    "two-pass": {"mode": "two-pass"},
    "two-pass, exact b": {"mode": "two-pass", "alignment": "exact"},
    "one-pass": {"mode": "one-pass"},
    "one-pass, exact K": {"mode": "one-pass", "gram": "exact"},
    "one-pass, exact K of survivors, exact b": {"mode": "one-pass", "gram": "survivors", "alignment": "exact"},
    "one-pass, candidates preconditioned": {"mode": "one-pass", "options": PolicyOptions(n_keep=3, metric="update")},
}


def handed_over(optimizer: torch.optim.Optimizer) -> list[list[torch.Tensor]]:
    """Copies of the gradients that every step of the optimizer gets, taken from outside."""
    seen: list[list[torch.Tensor]] = []

    def note(*_: Any) -> None:
        groups = optimizer.param_groups
        seen.append([p.grad.clone() for group in groups for p in group["params"] if p.grad is not None])

    optimizer.register_step_pre_hook(note)
    return seen


@pytest.mark.parametrize("how", sorted(MODES))
@pytest.mark.parametrize(
    ("kind", "dtype", "close"),
    [("llama", torch.float64, 1e-10), ("gpt2", torch.float64, 1e-10), ("llama", torch.float32, 1e-5)],
)
@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_the_optimizer_gets_autograds_weighted_gradient(
    kind: str, dtype: torch.dtype, close: float, how: str, clip: float
) -> None:
    """Of every parameter, relative to its norm, over three steps in several batches each, clipped where it is asked for.

    The reference is autograd, one sample at a time, with the weights that the step says it gave. What is all rounding (a key's bias) is
    measured against the whole gradient.
    """
    model = trainable(kind, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    settings = {"options": PolicyOptions(n_keep=3), **MODES[how]}
    name = "float64" if dtype == torch.float64 else "float32"
    online = OnlineStep(
        model, optimizer, warmup_select=1, clip=clip, batch_tokens=40, dtype=name, proj_rank=4, **settings
    )
    seen = handed_over(optimizer)
    for step in range(3):
        candidates, target = offer(6, step, (1.0, 2.0, 0.5, 1.0, 1.0, 3.0)), encoded(3, seed=50 + step)
        dense = [sample_gradients(model, item.encoded)[0] for item in candidates]
        result = online.step(candidates, target)
        assert result.mode == settings["mode"] and (result.clip_factor < 1) == bool(clip)
        total = sum(weight * item.loss_tokens for weight, item in zip(result.weight_N, candidates))
        factor = result.clip_factor / total
        wanted = [
            factor * sum(weight * part[name] for weight, part in zip(result.weight_N, dense) if weight)
            for name, _ in model.named_parameters()
        ]
        whole = float(torch.stack([g.norm() for g in wanted]).norm())
        for gradient, true in zip(seen[step], wanted, strict=True):
            assert float((gradient - true).norm()) <= close * max(float(true.norm()), 1e-4 * whole)


@pytest.mark.parametrize("how", sorted(MODES))
def test_one_pass_is_one_pass(how: str) -> None:
    """Rows that go through the model are counted from outside: candidates and target once, and in two passes the kept once more."""
    model = trainable()
    rows: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    settings = {"options": PolicyOptions(n_keep=3), **MODES[how]}
    online = OnlineStep(model, optimizer, warmup_select=1, batch_tokens=40, dtype="float64", proj_rank=4, **settings)
    for step in range(3):
        rows.clear()
        result = online.step(offer(6, step), encoded(3, seed=50 + step))
        again = len(result.decision.kept) if settings["mode"] == "two-pass" else 0
        assert sum(rows) == 6 + 3 + again
        assert result.mode == settings["mode"]


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_bfloat16_forms_nearly_the_same_gradient_in_both_modes(kind: str) -> None:
    """Autocast rounds factors to 2^-9 and products in other places; as a whole the gradients differ by a per cent or two."""
    found = []
    for mode in ("one-pass", "two-pass"):
        model = trainable(kind, torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        seen = handed_over(optimizer)
        options = PolicyOptions(n_keep=6, metric="sgd", weights="uniform")
        online = OnlineStep(model, optimizer, options=options, dtype="bfloat16", proj_rank=4, clip=0.0, mode=mode)  # type: ignore[arg-type]
        result = online.step(offer(6), encoded(3, seed=9))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        found.append((result.decision.kept, torch.cat([g.flatten() for g in seen[0]])))
    (kept, one), (other, two) = found
    assert kept == other
    assert float((one - two).norm() / two.norm()) < 0.03


def test_activation_checkpointing_changes_no_bit() -> None:
    """Blocks run once more in backward; dropout would draw the same again."""
    moved, ran = [], []
    for checkpointed in (False, True):
        model = trainable("gpt2", torch.float32)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        calls: list[int] = []
        model.transformer.h[0].attn.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        online = OnlineStep(model, torch.optim.AdamW(model.parameters(), lr=1e-3), warmup_select=1, proj_rank=4)
        for step in range(2):
            torch.manual_seed(step)
            online.step(offer(6, step), encoded(3, seed=50 + step))
        moved.append([p.detach().clone() for p in model.parameters()])
        ran.append(len(calls))
    assert ran[1] > ran[0]
    assert all(torch.equal(one, other) for one, other in zip(*moved))


def test_muon_takes_the_matrices_of_the_blocks() -> None:
    """And AdamW the rest; rates are written into the groups of both, and a step moves every parameter."""
    model = trainable("llama", torch.float32)
    optimizer = muon(model, lr=1e-2, weight_decay=0.0, beta1=0.9, beta2=0.99, eps=1e-8)
    online = OnlineStep(model, optimizer, warmup_select=1, proj_rank=4, mode="one-pass")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    metrics = [online.step(offer(6, step), encoded(3, seed=50 + step)).metric for step in range(2)]
    assert metrics == ["sgd", "target"]
    for name, parameter in model.named_parameters():
        assert not torch.equal(before[name], parameter)
        inside = "layers" in name and "norm" not in name
        assert ("momentum_buffer" in optimizer.state[parameter]) == inside
        assert ("exp_avg_sq" in optimizer.state[parameter]) != inside
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    held = {name: p.detach().clone() for name, p in model.named_parameters()}
    online.step(offer(6, 3), encoded(3, seed=53))
    assert all(torch.equal(held[name], p) for name, p in model.named_parameters())
