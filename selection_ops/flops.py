"""Floating point operations of a pass over tokens, by formula: what a model asks for, whatever the kernels do.

With N parameters that a token is multiplied by and A = layers x heads x head size, a token of a sample of T tokens costs

    forward                               2 N +  4 A T
    scored: forward and output gradients  4 N + 12 A T
    trained: and the weights' gradients   6 N + 12 A T    (with an adapter of n parameters in it, 4 N + 2 n + 12 A T)

(Kaplan et al., 2001.08361, section 2.1, and PaLM, 2204.02311, appendix B, which counts attention without its causal half.) Gradients that are formed from
factors which a scoring pass held cost the 2 N that it left out. Padding, norms, recomputed activations, projections and the optimizer are not counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from selection_ops.model import causal_model
from selection_ops.sites import Site

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k_experts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What the formulas need to know of a model."""

    parameters: int
    """Entries of the matrices that a token is multiplied by: not of tables that are only looked up; of experts, the share chosen."""
    trained_parameters: int
    """Those of them that require gradient: all, or an adapter's."""
    attention: int
    """Layers x heads x head size; 0 for a model without attention."""

    def forward(self, lengths: Iterable[int]) -> float:
        """FLOPs of a forward pass over samples of these lengths."""
        return self._over(lengths, 2 * self.parameters, 4)

    def scored(self, lengths: Iterable[int]) -> float:
        """FLOPs of a forward pass and one to output gradients, with frozen weights."""
        return self._over(lengths, 4 * self.parameters, 12)

    def trained(self, lengths: Iterable[int]) -> float:
        """FLOPs of a forward and backward pass."""
        return self._over(lengths, 4 * self.parameters + 2 * self.trained_parameters, 12)

    def formed(self, lengths: Iterable[int]) -> float:
        """FLOPs of the weights' gradients alone, from held inputs and output gradients."""
        return self._over(lengths, 2 * self.trained_parameters, 0)

    def scored_sums(self, tokens: float, squares: float) -> float:
        """As `scored`, from the sum of the lengths and that of their squares."""
        return 4.0 * self.parameters * tokens + 12.0 * self.attention * squares

    def _over(self, lengths: Iterable[int], products: int, attention: int) -> float:
        return float(sum(length * (products + attention * self.attention * length) for length in lengths))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapsSize:
    """The linear maps that samples are compared by, where whole gradients of them are used instead of sketches."""

    entries: int
    """Entries that a token is multiplied by; of experts, the share chosen."""

    def formed(self, lengths: Iterable[int]) -> float:
        """FLOPs of whole gradients from inputs and output gradients; aligning every token with a whole gradient takes as many."""
        return 2.0 * self.entries * sum(lengths)

    def interactions(self, lengths: Sequence[int]) -> float:
        """FLOPs of forming the whole gradient of every sample, and of the inner products of all pairs."""
        return self.formed(lengths) + 2.0 * self.entries * len(lengths) ** 2


def maps_size(model: Any, sites: Iterable[Site]) -> MapsSize:
    """Size of these sites of a causal language model."""
    share = _expert_share(causal_model(model).config.get_text_config())
    met = (site.numbers * (share if _of_expert(site.parameter) else 1.0) for site in sites)
    return MapsSize(entries=round(sum(met)))


def _expert_share(config: Any) -> float:
    """Share of a block's experts that a token meets; 1 without experts."""
    experts, chosen = _first(config, _EXPERTS), _first(config, _CHOSEN)
    return chosen / experts if experts and chosen else 1.0


def _of_expert(parameter: str) -> bool:
    return ".experts." in parameter


def _first(config: Any, names: Iterable[str]) -> int:
    return next((int(value) for name in names if (value := getattr(config, name, None))), 0)


def model_size(model: Any) -> ModelSize:
    """Size of a causal language model, from its parameters and its configuration."""
    model = causal_model(model)
    config = model.config.get_text_config()
    share = _expert_share(config)
    head = model.get_output_embeddings()
    multiplied = {id(head.weight)} if head is not None else set()
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} - multiplied
    total = trained = 0.0
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and id(parameter) not in tables:
            met = parameter.numel() * (share if _of_expert(name) else 1.0)
            total += met
            trained += met if parameter.requires_grad else 0.0
    heads = _first(config, ("num_attention_heads", "n_head"))
    width = _first(config, ("hidden_size", "n_embd"))
    layers = _first(config, ("num_hidden_layers", "n_layer"))
    each = _first(config, ("head_dim",)) or (width // heads if heads else 0)
    return ModelSize(parameters=round(total), trained_parameters=round(trained), attention=layers * heads * each)
