"""Sites: nothing attributed silently."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from schemas.errors import InputError
from selection_ops.sites import base, find, find_sites, site_type, type_of
from selection_ops.sites.linear import Linear
from tests.tiny import MODELS, tiny_gpt2, tiny_llama, tiny_neox


@pytest.mark.parametrize("kind", [*sorted(MODELS), "tied"])
def test_invariant_4_nothing_attributed_silently(kind: str) -> None:
    """Every parameter is a site's weight or listed with a reason, and the share covered is counted from the parameters."""
    model: Any = tiny_llama(tied=True) if kind == "tied" else MODELS[kind]()
    report = find_sites(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    weights = [f"{site}.weight" for site in report.sites]
    assert len(set(weights)) == len(weights)
    assert set(weights).isdisjoint(report.unattributed)
    assert set(weights) | set(report.unattributed) == set(sizes)
    assert all(report.unattributed.values())
    assert report.parameters == sum(sizes.values())
    assert report.attributed_parameters == sum(sizes[name] for name in weights)
    assert report.coverage == pytest.approx(report.attributed_parameters / report.parameters)
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    assert not {id(model.get_parameter(name)) for name in weights} & {id(head.weight), id(embedding.weight)}


def test_sites_that_read_the_same_input_form_a_group() -> None:
    llama = [group.sites for group in find_sites(tiny_llama()).input_groups][:4]
    block = "model.layers.0"
    assert llama == [
        tuple(f"{block}.self_attn.{name}_proj" for name in "qkv"),
        (f"{block}.self_attn.o_proj",),
        (f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj"),
        (f"{block}.mlp.down_proj",),
    ]
    assert all(len(group.sites) == 1 for group in find_sites(tiny_gpt2()).input_groups)
    # The parallel residual of NeoX normalises twice: the two maps read different inputs.
    assert all(len(group.sites) == 1 for group in find_sites(tiny_neox()).input_groups)
    for group in find_sites(tiny_llama()).input_groups:
        assert group.name == group.sites[0]


def test_finding_sites_leaves_the_model_as_it_was() -> None:
    model = tiny_llama()
    model.train()
    model.model.layers[0].eval()
    before = [(dict(module.__dict__), module.training, len(module._forward_pre_hooks)) for module in model.modules()]
    find_sites(model)
    after = [(dict(module.__dict__), module.training, len(module._forward_pre_hooks)) for module in model.modules()]
    assert [(sorted(d), t, h) for d, t, h in after] == [(sorted(d), t, h) for d, t, h in before]


class Toy(nn.Module):
    """A base whose forward is given; with the surface of a causal language model that `find_sites` needs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9)
        self.good, self.idle, self.flat = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.halves, self.mixed, self.turned = nn.Linear(2, 2), nn.Linear(4, 4), nn.Linear(4, 4)
        self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.two.weight = self.one.weight
        self.still = nn.Linear(4, 4, bias=False)
        self.still.weight.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> torch.Tensor:
        hidden = self.good(input=self.embedding(input_ids))
        hidden = self.flat(hidden.reshape(-1, 4)).reshape(hidden.shape)
        hidden = self.halves(hidden.reshape(*hidden.shape[:2], 2, 2)).reshape(hidden.shape)
        hidden = self.turned(hidden.transpose(0, 1)).transpose(0, 1)
        hidden = hidden + 0 * self.mixed(hidden + hidden.flip(0))
        return self.head(self.still(self.two(self.one(hidden))))


def test_what_cannot_be_a_site_is_listed_with_its_reason() -> None:
    report = find_sites(Toy())
    assert report.sites == ("good", "flat", "halves", "one")
    reasons = report.unattributed
    assert "did not run" in reasons["idle.weight"]
    assert "[3, 2, 4] for 2 samples of 3 tokens" in reasons["turned.weight"]
    assert "[2, 3, 4]" in reasons["mixed.weight"]
    assert "samples do not keep" in reasons["mixed.weight"]
    assert reasons["still.weight"] == "frozen: its requires_grad is False"
    assert "bias" in reasons["good.bias"]
    assert "embedding or head" in reasons["embedding.weight"]
    assert "embedding or head" in reasons["head.bias"]


def test_all_attributes_everything_that_can_be() -> None:
    report = find_sites(Toy(), "all")
    assert report.sites == ("embedding", "head", "good", "flat", "halves", "one")
    assert [site.name for site in report.small] == ["head.bias", "good.bias", "flat.bias", "halves.bias"]
    out = {f"{name}.{part}" for name in ("idle", "turned", "mixed") for part in ("weight", "bias")} | {"still.weight"}
    assert set(report.unattributed) == out


class Scaled(nn.Linear):
    """A subclass that computes something else than its base."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def test_subclasses_are_no_sites_until_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_llama()
    old = model.model.layers[0].mlp.down_proj
    model.model.layers[0].mlp.down_proj = Scaled(old.in_features, old.out_features, bias=False)
    name = "model.layers.0.mlp.down_proj"
    assert name not in find_sites(model).sites
    assert "Scaled" in find_sites(model).unattributed[f"{name}.weight"]
    # Under "all" it is taken sample by sample, as any module that nobody knows.
    assert f"{name}.weight" in [site.name for site in find_sites(model, "all").small]
    monkeypatch.setattr(base, "_BY_CLASS", dict(base._BY_CLASS))

    @site_type(Scaled)
    class _Scaled(Linear):
        pass

    assert type_of(Scaled(2, 3)) is _Scaled
    assert name in find_sites(model).sites


def test_too_large_a_parameter_is_not_copied_for_every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_llama()
    old = model.model.layers[0].mlp.down_proj
    model.model.layers[0].mlp.down_proj = Scaled(old.in_features, old.out_features, bias=False)
    monkeypatch.setattr(find, "MOST_NUMBERS", 100)
    reason = find_sites(model, "all").unattributed["model.layers.0.mlp.down_proj.weight"]
    assert "Scaled: no site type registered" in reason
    assert "1,536 numbers are too many" in reason


def test_a_model_without_linear_maps_is_an_error() -> None:
    class Bare(Toy):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> torch.Tensor:
            return self.head(self.embedding(input_ids))

    with pytest.raises(InputError, match=r"no linear map.*Linear, Conv1D.*frozen"):
        find_sites(Bare())


def test_a_model_of_unknown_linear_maps_is_an_error_that_names_them() -> None:
    class Strange(nn.Linear):
        """A subclass may compute something else."""

    model: Any = tiny_llama()
    for module in list(model.model.layers.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Strange(child.in_features, child.out_features, bias=False))
    with pytest.raises(InputError, match=r"matrices of its blocks belong to Strange; register a site type"):
        find_sites(model)


def test_coverage_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="selection_ops.sites"):
        report = find_sites(tiny_llama())
    assert f"{100 * report.coverage:.1f} %" in caplog.text
    assert "LlamaRMSNorm" in caplog.text
