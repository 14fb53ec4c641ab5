"""Optimizer states as trainers really save them: what is read is what the optimizer holds, under the right names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.optimization import Adafactor
from transformers.trainer_pt_utils import get_parameter_names

from schemas.errors import CorruptFile, InputError
from selection_ops.optimizer_state import AdamNumbers, OptimizerState, read_optimizer
from selection_ops.preconditioning import preconditioner_of
from tests.tiny import tiny_gpt2, tiny_llama

BETAS, EPS = (0.8, 0.95), 1e-6


def stepped(model: Any, optimizer: torch.optim.Optimizer, steps: int = 2) -> torch.optim.Optimizer:
    """An optimizer that has seen a few real gradients."""
    for seed in range(steps):
        ids = torch.randint(3, 400, (2, 12), generator=torch.Generator().manual_seed(seed))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def decayed(model: Any) -> list[str]:
    """As transformers' Trainer chooses what is decayed."""
    forbidden = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    return get_parameter_names(model, [nn.LayerNorm], forbidden)


def trainer_groups(model: Any) -> list[dict[str, Any]]:
    names = decayed(model)
    parameters = dict(model.named_parameters())
    return [
        {"params": [p for name, p in parameters.items() if name in names], "weight_decay": 0.1},
        {"params": [p for name, p in parameters.items() if name not in names], "weight_decay": 0.0},
    ]


def agrees(state: OptimizerState, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Every second moment under the name of its parameter."""
    for name, parameter in model.named_parameters():
        held = optimizer.state[parameter]
        assert torch.equal(state.tensors[f"{name}:exp_avg_sq"], held["exp_avg_sq"]), name
        assert int(state.tensors[f"{name}:step"]) == int(held["step"]) == state.steps


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("form", ["one group", "trainer", "by rank", "named", "nested"])
def test_moments_of_torch_files_have_the_names_of_their_parameters(tmp_path: Path, make: Any, form: str) -> None:
    model = make()
    parameters = list(model.parameters())
    groups: Any = {
        "one group": parameters,
        "trainer": trainer_groups(model),
        "by rank": [{"params": [p for p in parameters if p.dim() >= 2]}, {"params": [p for p in parameters if p.dim() < 2]}],
        "named": list(model.named_parameters())[::-1],  # an order that only the names can tell
        "nested": parameters,
    }[form]  # fmt: skip
    optimizer = stepped(model, torch.optim.AdamW(groups, lr=1e-3, betas=BETAS, eps=EPS))
    record = optimizer.state_dict()
    torch.save({"optimizer": record, "step": 7} if form == "nested" else record, tmp_path / "optimizer.pt")
    state = read_optimizer(str(tmp_path), make(seed=3))
    assert state.optimizer == "adamw"
    agrees(state, model, optimizer)
    assert set(state.numbers.values()) == {AdamNumbers(beta1=0.8, beta2=0.95, eps=EPS)}


def test_the_format_before_zip_files_is_read(tmp_path: Path) -> None:
    model = tiny_llama()
    optimizer = stepped(model, torch.optim.AdamW(model.parameters(), betas=BETAS))
    torch.save(optimizer.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    agrees(read_optimizer(str(tmp_path / "old.pt"), model), model, optimizer)


def test_safetensors_and_torch_files_of_one_state_are_one_state(tmp_path: Path) -> None:
    model = tiny_llama()
    optimizer = stepped(model, torch.optim.AdamW(model.parameters()))
    tensors = {
        f"{name}:{moment}": value
        for name, parameter in model.named_parameters()
        for moment, value in optimizer.state[parameter].items()
    }
    save_file(tensors, tmp_path / "moments.safetensors")
    torch.save(optimizer.state_dict(), tmp_path / "moments.pt")
    named, numbered = (read_optimizer(str(tmp_path / f"moments.{kind}"), model) for kind in ("safetensors", "pt"))
    assert named.fingerprint == numbered.fingerprint
    tensors["lm_head.weight:exp_avg_sq"][0, 0] += 1e-3
    save_file(tensors, tmp_path / "other.safetensors")
    assert read_optimizer(str(tmp_path / "other.safetensors")).fingerprint != named.fingerprint


@pytest.mark.parametrize("kind", ["transformers", "torch"])
def test_adafactor_has_one_form(tmp_path: Path, kind: str) -> None:
    """torch and transformers name and lay out the same factors differently."""
    model = tiny_llama()
    if kind == "torch":
        optimizer: torch.optim.Optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-3)
    else:
        optimizer = Adafactor(model.parameters())
    torch.save(stepped(model, optimizer).state_dict(), tmp_path / "optimizer.pt")
    state = read_optimizer(str(tmp_path), model)
    assert state.optimizer == "adafactor"
    for name, parameter in model.named_parameters():
        held = optimizer.state[parameter]
        if parameter.dim() == 1:
            assert torch.equal(
                state.tensors[f"{name}:exp_avg_sq"], held["variance" if kind == "torch" else "exp_avg_sq"]
            )
            continue
        row = held["row_var"][:, 0] if kind == "torch" else held["exp_avg_sq_row"]
        column = held["col_var"][0] if kind == "torch" else held["exp_avg_sq_col"]
        assert row.shape == parameter.shape[:1] and column.shape == parameter.shape[1:]
        assert torch.equal(state.tensors[f"{name}:exp_avg_sq_row"], row)
        assert torch.equal(state.tensors[f"{name}:exp_avg_sq_col"], column)


def test_muon_has_no_second_moment(tmp_path: Path) -> None:
    """A checkpoint of matrices alone is a state to go on from, and none to precondition a scoring with."""
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({f"{name}:momentum_buffer": torch.ones(3, 2)}, tmp_path / "optimizer.safetensors")
    state = read_optimizer(str(tmp_path))
    assert state.optimizer == "muon" and state.steps == 0
    with pytest.raises(InputError, match=rf"Muon's momentum of {name}.*metric sgd"):
        preconditioner_of(state, name)


def test_amsgrad_divides_by_the_largest(tmp_path: Path) -> None:
    model = tiny_llama()
    optimizer = stepped(model, torch.optim.AdamW(model.parameters(), amsgrad=True))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    found = read_optimizer(str(tmp_path), model).tensors["lm_head.weight:exp_avg_sq"]
    assert torch.equal(found, optimizer.state[model.lm_head.weight]["max_exp_avg_sq"])


def test_what_is_no_state_of_this_model_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    optimizer = stepped(model, torch.optim.AdamW(model.parameters()))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match=r"in no known order.*param_names"):
        read_optimizer(str(tmp_path), tiny_gpt2())
    with pytest.raises(InputError, match=r"no model is at hand"):
        read_optimizer(str(tmp_path))
    torch.save(torch.optim.SGD(model.parameters(), lr=1.0).state_dict(), tmp_path / "sgd.pt")
    with pytest.raises(InputError, match=r"keeps no second moments"):
        read_optimizer(str(tmp_path / "sgd.pt"), model)
    torch.save({"weights": torch.ones(2)}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=r"no state_dict of a torch optimizer"):
        read_optimizer(str(tmp_path / "weights.pt"), model)
    with pytest.raises(InputError, match=r"does not exist"):
        read_optimizer(str(tmp_path / "missing.pt"), model)
    whole = (tmp_path / "optimizer.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptFile, match=r"cut\.pt"):
        read_optimizer(str(tmp_path / "cut.pt"), model)
    (tmp_path / "noise.pt").write_bytes(b"\x00\xff" * 500)
    with pytest.raises((CorruptFile, InputError), match=r"noise\.pt"):
        read_optimizer(str(tmp_path / "noise.pt"), model)


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def test_invariant_8_code_in_an_optimizer_file_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "was-run"
    torch.save({"state": {}, "param_groups": [], "hook": _Payload(marker)}, tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match=r"holds more than tensors"):
        read_optimizer(str(tmp_path), tiny_llama())
    assert not marker.exists()
