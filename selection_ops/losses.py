"""Losses of samples from hidden states, in chunks of tokens, so that the logits of a large vocabulary never stand whole.

Legend: B samples, T tokens (positions that predict a loss token, of all samples in a row), I hidden size, V vocabulary.
Losses are sums over the loss tokens of a sample, in nats; logits become float32 (float64 for float64 models) before the softmax.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from selection_ops.batching import Batch
from selection_ops.model import evaluating

log = logging.getLogger(__name__)

CHUNK_TOKENS = 512


class _FrozenHeadLoss(torch.autograd.Function):
    """Per-token negative log likelihood under a frozen head; the gradient of the hidden states is formed in forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TI: torch.Tensor, weight_VI: torch.Tensor, bias_V: torch.Tensor | None, labels_T: torch.Tensor
    ) -> torch.Tensor:
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
            gradient_TI[part] = softmax_TV.to(weight_VI.dtype) @ weight_VI
        ctx.save_for_backward(gradient_TI)
        return losses_T

    @staticmethod
    def backward(ctx: Any, upstream_T: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        (gradient_TI,) = ctx.saved_tensors
        return gradient_TI * upstream_T[:, None].to(gradient_TI.dtype), None, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sum_by_sample(losses_T: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    return losses_T.new_zeros(mask_BT.shape).masked_scatter(mask_BT, losses_T).sum(1)


class HeadRoute:
    """How a model turns hidden states into logits: by its head alone, or in a way only the whole model knows.

    Found on four tokens at construction: where head(base model) is not what the model returns (softcapping, scaling), whole
    logits are taken from the model, at the price of memory.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        head = model.get_output_embeddings()
        base = model.base_model
        self.head: nn.Linear | None = None
        if type(head) is nn.Linear and base is not model and _plain_head(model, base, head):
            self.head = head
        else:
            log.info("%s does more than apply its head: whole logits are formed", type(model).__name__)

    def sample_losses(self, batch: Batch, *, frozen: bool) -> torch.Tensor:
        """Sum of token losses of every sample [B], float32 (float64 for float64 models).

        `frozen`: the head gets no gradient, and logits stand for 512 tokens at a time. Otherwise ordinary autograd through
        every parameter, with the chunks recomputed in backward.
        """
        mask_BT = batch.loss_BT[:, 1:]
        labels_T = batch.ids_BT[:, 1:][mask_BT]
        inputs = {"input_ids": batch.ids_BT, "attention_mask": batch.attention_BT.to(torch.int64), "use_cache": False}
        if self.head is None:
            logits_TV = self.model(**inputs).logits[:, :-1][mask_BT]
            losses_T = nn.functional.cross_entropy(logits_TV.to(_wide(logits_TV.dtype)), labels_T, reduction="none")
            return _sum_by_sample(losses_T, mask_BT)
        # Positions that predict no loss token never reach the head.
        hidden_TI = self.model.base_model(**inputs)[0][:, :-1][mask_BT]
        if frozen:
            losses_T = _FrozenHeadLoss.apply(hidden_TI, self.head.weight, self.head.bias, labels_T)
        else:
            losses_T = _checkpointed(self.head, hidden_TI, labels_T)
        return _sum_by_sample(losses_T, mask_BT)


@torch.no_grad()
def _plain_head(model: Any, base: Any, head: nn.Linear) -> bool:
    # Two samples: where weights hold NaN, what is finite still decides.
    ids_BT = torch.arange(4, device=head.weight.device).repeat(2, 1) % head.weight.shape[0]
    with evaluating(model):
        whole = model(input_ids=ids_BT, use_cache=False).logits
        parts = head(base(input_ids=ids_BT, use_cache=False)[0])
    if whole.shape != parts.shape:
        return False
    known = torch.isfinite(whole) & torch.isfinite(parts)
    if not known.any():
        return True  # every loss is non-finite on either route
    # Only rounding may differ: softcapping or scaling of logits moves them by far more.
    return bool((whole - parts)[known].abs().max() <= 1e-3 * whole[known].abs().max().clamp_min(1e-6))


def _chunk_losses(head: nn.Module, hidden_TI: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    logits_TV = head(hidden_TI)
    return nn.functional.cross_entropy(logits_TV.to(_wide(logits_TV.dtype)), labels_T, reduction="none")


def _checkpointed(head: nn.Module, hidden_TI: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    run: Callable[..., torch.Tensor] = torch.utils.checkpoint.checkpoint
    if len(labels_T) <= CHUNK_TOKENS or not torch.is_grad_enabled():
        run = lambda function, *args, use_reentrant: function(*args)  # noqa: E731
    pieces = [
        run(
            _chunk_losses,
            head,
            hidden_TI[start : start + CHUNK_TOKENS],
            labels_T[start : start + CHUNK_TOKENS],
            use_reentrant=False,
        )
        for start in range(0, max(len(labels_T), 1), CHUNK_TOKENS)
    ]
    return torch.cat(pieces)


def step_loss(
    model: Any, batch: Batch, weights_B: torch.Tensor, *, normaliser: torch.Tensor | float | None = None
) -> torch.Tensor:
    """sum of w_i l_i over sum of w_i n_i: with w = 1 exactly the token mean that transformers trains on. Nats per token.

    `model` is a causal language model or its `HeadRoute` (cheaper: found once). `normaliser` replaces sum w_i n_i where the batch
    is a part of a larger one. Ordinary autograd through every parameter; the mode of the model is the caller's.
    """
    route = model if isinstance(model, HeadRoute) else HeadRoute(model)
    losses_B = route.sample_losses(batch, frozen=False)
    weights_B = weights_B.to(losses_B)
    if normaliser is None:
        normaliser = (weights_B * batch.loss_BT[:, 1:].sum(1)).sum()
    return (weights_B * losses_B).sum() / normaliser
