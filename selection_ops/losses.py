"""Losses of samples from hidden states, in chunks of tokens, so that the logits of a large vocabulary never stand whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from selection_ops.batching import Batch

CHUNK_TOKENS = 512


class _FrozenHeadLoss(torch.autograd.Function):
    """Per-token negative log likelihood under a frozen head; the gradient of the hidden states is formed in forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TI: torch.Tensor, weight_VI: torch.Tensor, bias_V: torch.Tensor | None, labels_T: torch.Tensor
    ):
        losses_T = torch.empty(len(labels_T), dtype=_wide(hidden_TI.dtype), device=hidden_TI.device)
        gradient_TI = torch.empty_like(hidden_TI)
        for start in range(0, len(labels_T), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            logits_TV = nn.functional.linear(hidden_TI[part], weight_VI, bias_V).to(losses_T.dtype)
            labels = labels_T[part, None]
            picked_T = logits_TV.gather(1, labels)[:, 0]
            normaliser_T = torch.logsumexp(logits_TV, 1)
            losses_T[part] = normaliser_T - picked_T
            softmax_TV = logits_TV.sub_(normaliser_T[:, None]).exp_()
            softmax_TV.scatter_add_(1, labels, softmax_TV.new_full(labels.shape, -1.0))
            gradient_TI[part] = softmax_TV.to(hidden_TI.dtype) @ weight_VI
        ctx.save_for_backward(gradient_TI)
        return losses_T

    @staticmethod
    def backward(ctx: Any, upstream_T: torch.Tensor):
        (gradient_TI,) = ctx.saved_tensors
        return gradient_TI * upstream_T[:, None].to(gradient_TI.dtype), None, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _positions(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask [B, T-1] of positions that predict a loss token, and the tokens they predict."""
    mask_BT = batch.loss_BT[:, 1:]
    return mask_BT, batch.ids_BT[:, 1:][mask_BT]


def _sum_by_sample(losses_T: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    spread_BT = losses_T.new_zeros(mask_BT.shape).masked_scatter(mask_BT, losses_T)
    return spread_BT.sum(1)


class HeadRoute:
    """How a model turns hidden states into logits: by its head alone, or in a way only the whole model knows."""

    def __init__(self, model: Any) -> None:
        self.model = model
        head = model.get_output_embeddings()
        base = model.base_model
        self.head = (
            head if isinstance(head, nn.Linear) and base is not model and self._plain(model, base, head) else None
        )

    @staticmethod
    def _plain(model: Any, base: Any, head: nn.Linear) -> bool:
        ids_BT = torch.arange(4, device=head.weight.device)[None]
        with torch.no_grad():
            whole = model(input_ids=ids_BT, use_cache=False).logits
            parts = head(base(input_ids=ids_BT, use_cache=False)[0])
        # Only rounding may differ: softcapping or scaling of logits moves them by far more.
        scale = whole.abs().max().clamp_min(1e-6)
        return bool(torch.isnan(whole).any()) or bool((whole - parts).abs().max() <= 1e-3 * scale)

    def sample_losses(self, batch: Batch, *, frozen: bool) -> torch.Tensor:
        """Sum of token losses of every sample [B], float32 or float64.

        `frozen`: the head gets no gradient, and logits stand for 512 tokens at a time. Otherwise ordinary autograd, with
        the chunks recomputed in backward.
        """
        mask_BT, labels_T = _positions(batch)
        inputs = {"input_ids": batch.ids_BT, "attention_mask": batch.attention_BT.to(torch.int64), "use_cache": False}
        if self.head is None:
            logits_TV = self.model(**inputs).logits[:, :-1][mask_BT]
            losses_T = nn.functional.cross_entropy(logits_TV.to(_wide(logits_TV.dtype)), labels_T, reduction="none")
            return _sum_by_sample(losses_T, mask_BT)
        hidden_TI = self.model.base_model(**inputs)[0][:, :-1][mask_BT]
        if frozen:
            losses_T = _FrozenHeadLoss.apply(hidden_TI, self.head.weight, self.head.bias, labels_T)
        else:
            losses_T = _checkpointed(self.head, hidden_TI, labels_T)
        return _sum_by_sample(losses_T, mask_BT)


def _chunk_losses(head: nn.Module, hidden_TI: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    logits_TV = head(hidden_TI)
    return nn.functional.cross_entropy(logits_TV.to(_wide(logits_TV.dtype)), labels_T, reduction="none")


def _checkpointed(head: nn.Module, hidden_TI: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    run: Callable[..., torch.Tensor] = torch.utils.checkpoint.checkpoint
    pieces = [
        run(
            _chunk_losses,
            head,
            hidden_TI[start : start + CHUNK_TOKENS],
            labels_T[start : start + CHUNK_TOKENS],
            use_reentrant=False,
        )
        for start in range(0, len(labels_T), CHUNK_TOKENS)
    ]
    return torch.cat(pieces) if pieces else hidden_TI.new_zeros(0)


def step_loss(route: HeadRoute, batch: Batch, weights_B: torch.Tensor) -> torch.Tensor:
    """sum of w_i l_i over sum of w_i n_i: with w = 1 exactly the token mean that transformers trains on. Nats per token."""
    losses_B = route.sample_losses(batch, frozen=False)
    counts_B = batch.loss_BT[:, 1:].sum(1)
    return (weights_B * losses_B).sum() / (weights_B * counts_B).sum()
