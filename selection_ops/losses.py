"""Losses of samples from hidden states, in chunks of tokens, so that the logits of a large vocabulary never stand whole.

Legend: B samples, T tokens (positions that predict a loss token, of all samples in a row), I hidden size, V vocabulary.
Losses are sums over the loss tokens of a sample, in nats; logits become float32 (float64 for float64 models) before the softmax.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from selection_ops.batching import Batch
from selection_ops.model import causal_model, evaluating

log = logging.getLogger(__name__)

CHUNK_TOKENS = 256
"""Tokens whose logits stand at a time, on CPU; accelerators, which want large products, take four times as many."""

_ROWS = 16
"""Tokens whose softmax is taken at a time on CPU, in float32 that fits its cache: 4 ms of 1,024 tokens' 350, against 120."""


class _Softmax:
    """Losses of tokens and the softmax of their logits, a chunk at a time, in buffers that are made once.

    The gradient of a token's loss with respect to its logits is softmax - onehot(label). The label's share is left to the caller, who
    takes it off exactly, row by row: in bfloat16 the softmax keeps eight bits of every probability, where softmax - 1 loses those of
    a small loss. Fresh buffers for every chunk cost as much as the products of a large vocabulary (page faults).
    """

    def __init__(self, hidden_TI: torch.Tensor, weight_VI: torch.Tensor, bias_V: torch.Tensor | None) -> None:
        kind = hidden_TI.device.type
        narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_VI.dtype
        self.hidden_TI, self.weight_VI = hidden_TI.to(narrow), weight_VI.to(narrow)
        self._bias_V = None if bias_V is None else bias_V.to(narrow)
        self.wide = _wide(narrow)
        self._chunk = min(CHUNK_TOKENS if kind == "cpu" else 4 * CHUNK_TOKENS, max(len(hidden_TI), 1))
        self._rows = min(_ROWS, self._chunk) if kind == "cpu" else self._chunk
        self._buffer_TV = hidden_TI.new_empty(self._chunk, len(weight_VI), dtype=narrow)
        self._wide_TV = hidden_TI.new_empty(self._rows, len(weight_VI), dtype=self.wide)

    def chunks(self, labels_T: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """(tokens, their losses, their softmax [t, V]); the softmax stands until the next chunk is asked for."""
        for start in range(0, len(labels_T), self._chunk):
            part = slice(start, start + self._chunk)
            hidden_tI = self.hidden_TI[part]
            logits_tV = torch.mm(hidden_tI, self.weight_VI.T, out=self._buffer_TV[: len(hidden_tI)])
            if self._bias_V is not None:
                logits_tV += self._bias_V
            picked_t = logits_tV.gather(1, labels_T[part, None])[:, 0].to(self.wide)
            largest_t = logits_tV.amax(1).to(self.wide)
            top_t = torch.empty_like(largest_t)
            for row in range(0, len(logits_tV), self._rows):
                block_rV = logits_tV[row : row + self._rows]
                softmax_rV = torch.softmax(block_rV, 1, dtype=self.wide, out=self._wide_TV[: len(block_rV)])
                torch.amax(softmax_rV, 1, out=top_t[row : row + self._rows])
                block_rV.copy_(softmax_rV)
            # log sum exp = largest logit - log of its probability, which is at least 1/V.
            yield part, largest_t - top_t.log() - picked_t, logits_tV


Watch = Callable[[slice, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Called for every chunk of a frozen head with (loss tokens, their hidden states [t, I], softmax [t, V], labels [t])."""


class _FrozenHeadLoss(torch.autograd.Function):
    """Per-token negative log likelihood under a frozen head; the gradient of the hidden states is formed in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TI: torch.Tensor,
        weight_VI: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_T: torch.Tensor,
        watch: Watch | None,
    ) -> torch.Tensor:
        losses_T = hidden_TI.new_empty(len(labels_T), dtype=_wide(hidden_TI.dtype))
        gradient_TI = torch.empty_like(hidden_TI) if ctx.needs_input_grad[0] else None
        head = _Softmax(hidden_TI, weight_VI, bias_V)
        with torch.autocast(hidden_TI.device.type, enabled=False):
            for part, loss_t, softmax_tV in head.chunks(labels_T):
                losses_T[part] = loss_t
                if watch is not None:
                    watch(part, head.hidden_TI[part], softmax_tV, labels_T[part])
                if gradient_TI is not None:
                    gradient_TI[part] = (softmax_tV @ head.weight_VI).sub_(head.weight_VI[labels_T[part]])
        ctx.save_for_backward(gradient_TI)
        return losses_T

    @staticmethod
    def backward(ctx: Any, upstream_T: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (gradient_TI,) = ctx.saved_tensors
        return gradient_TI * upstream_T[:, None].to(gradient_TI.dtype), None, None, None, None


class _WeightedHeadLoss(torch.autograd.Function):
    """Weighted sum of the tokens' losses, with every gradient formed in forward: no chunk's logits are made twice.

    Returns that sum and the losses themselves, through which nothing flows back. The weight gradient is summed over chunks in
    the precision of the weights.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TI: torch.Tensor,
        weight_VI: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_T: torch.Tensor,
        weight_T: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        losses_T = hidden_TI.new_empty(len(labels_T), dtype=_wide(hidden_TI.dtype))
        wanted = zip((hidden_TI, weight_VI, bias_V), ctx.needs_input_grad)
        hidden_grad_TI, grad_VI, grad_V = (
            torch.zeros_like(x) if needed and x is not None else None for x, needed in wanted
        )
        head = _Softmax(hidden_TI, weight_VI, bias_V)
        with torch.autocast(hidden_TI.device.type, enabled=False):
            for part, loss_t, softmax_tV in head.chunks(labels_T):
                losses_T[part] = loss_t
                labels_t, weight_t1 = labels_T[part], weight_T[part, None]
                if hidden_grad_TI is not None:
                    pulled_tI = (softmax_tV @ head.weight_VI).sub_(head.weight_VI[labels_t])
                    hidden_grad_TI[part] = pulled_tI * weight_t1
                _add_head_gradient(grad_VI, grad_V, softmax_tV, head.hidden_TI[part], labels_t, weight_t1)
        ctx.save_for_backward(hidden_grad_TI, grad_VI, grad_V)
        ctx.mark_non_differentiable(losses_T)
        return (losses_T * weight_T).sum(), losses_T

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        grads = (None if grad is None else grad * upstream.to(grad.dtype) for grad in ctx.saved_tensors)
        return (*grads, None, None)


def head_gradient(
    head: nn.Linear, name: str, hidden_TI: torch.Tensor, labels_T: torch.Tensor, weight_T: torch.Tensor
) -> torch.Tensor:
    """Gradient of the weighted sum of tokens' losses with respect to the head's `weight` [V, I] or `bias` [V], from hidden states."""
    parameter = getattr(head, name)
    gradient = torch.zeros_like(parameter)
    made = _Softmax(hidden_TI, head.weight, head.bias)
    with torch.no_grad(), torch.autocast(hidden_TI.device.type, enabled=False):
        for part, _, softmax_tV in made.chunks(labels_T):
            _add_head_gradient(
                gradient if name == "weight" else None,
                gradient if name == "bias" else None,
                softmax_tV,
                made.hidden_TI[part],
                labels_T[part],
                weight_T[part, None].to(made.wide),
            )
    return gradient


def _add_head_gradient(
    grad_VI: torch.Tensor | None,
    grad_V: torch.Tensor | None,
    softmax_tV: torch.Tensor,
    hidden_tI: torch.Tensor,
    labels_t: torch.Tensor,
    weight_t1: torch.Tensor,
) -> None:
    """Add a chunk's share, sum of w (softmax - onehot(label)) hidden', to the gradients that are wanted."""
    if grad_VI is not None:
        weighted_tI = (hidden_tI * weight_t1).to(hidden_tI.dtype)
        grad_VI += softmax_tV.T @ weighted_tI
        grad_VI.index_add_(0, labels_t, -weighted_tI.to(grad_VI.dtype))
    if grad_V is not None:
        grad_V += (weight_t1.to(softmax_tV.dtype).T @ softmax_tV)[0]
        grad_V.index_add_(0, labels_t, -weight_t1[:, 0].to(grad_V.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sum_by_sample(losses_T: torch.Tensor, mask_BT: torch.Tensor, batch: Batch) -> torch.Tensor:
    return batch.sum_by_sample(losses_T.new_zeros(mask_BT.shape).masked_scatter(mask_BT, losses_T))


class HeadRoute:
    """How a model turns hidden states into logits: by its head alone, or in a way only the whole model knows.

    Found on four tokens at construction: where head(base model) is not what the model returns (softcapping, scaling), whole
    logits are taken from the model, at the price of memory. `enter(call, *arguments)` is how the model is entered: a call, unless
    whoever spreads it over processes puts another in its place.
    """

    def __init__(self, model: Any) -> None:
        self.model = model = causal_model(model)
        self.enter: Callable[..., Any] = _call
        head = model.get_output_embeddings()
        base = model.base_model
        self.head: nn.Linear | None = None
        if type(head) is nn.Linear and base is not model and _plain_head(model, base, head):
            self.head = head
        else:
            log.info("%s does more than apply its head: whole logits are formed", type(model).__name__)

    def sample_losses(self, batch: Batch, watch: Watch | None = None) -> torch.Tensor:
        """Sum of token losses of every sample [B], float32 (float64 for float64 models); gradients reach the blocks, not the head.

        `watch` sees what the head does, chunk by chunk; where whole logits are formed it is not called.
        """
        loss_B: torch.Tensor = self.enter(self._sample_losses, batch, watch)
        return loss_B

    def weighted_loss(self, batch: Batch, weight_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of w_i l_i with gradients to every parameter, sums of token losses l_i [B] without any), as `sample_losses`."""
        total, loss_B = self.enter(self._weighted_loss, batch, weight_B)
        return total, loss_B

    def _sample_losses(self, batch: Batch, watch: Watch | None) -> torch.Tensor:
        mask_BT, labels_T = _labels(batch)
        if self.head is None:
            losses_T = self._whole(batch)
        else:
            hidden_TI = self._hidden(batch)
            losses_T = _FrozenHeadLoss.apply(hidden_TI, self.head.weight, self.head.bias, labels_T, watch)
        return _sum_by_sample(losses_T, mask_BT, batch)

    def _weighted_loss(self, batch: Batch, weight_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask_BT, labels_T = _labels(batch)
        weight_T = weight_B[batch.sample_of_loss()]
        if self.head is None:
            losses_T = self._whole(batch)
            total = (losses_T * weight_T.to(losses_T)).sum()
        else:
            hidden_TI, head = self._hidden(batch), self.head
            weight_T = weight_T.to(_wide(hidden_TI.dtype))
            total, losses_T = _WeightedHeadLoss.apply(hidden_TI, head.weight, head.bias, labels_T, weight_T)
        return total, _sum_by_sample(losses_T.detach(), mask_BT, batch)

    def _hidden(self, batch: Batch) -> torch.Tensor:
        # Positions that predict no loss token never reach the head.
        return self.model.base_model(**_inputs(batch))[0][:, :-1][batch.loss_BT[:, 1:]]

    def _whole(self, batch: Batch) -> torch.Tensor:
        logits_TV = self.model(**_inputs(batch)).logits[:, :-1][batch.loss_BT[:, 1:]]
        labels_T = _labels(batch)[1]
        return nn.functional.cross_entropy(logits_TV.to(_wide(logits_TV.dtype)), labels_T, reduction="none")


def _call(call: Callable[..., Any], *arguments: Any) -> Any:
    return call(*arguments)


def _inputs(batch: Batch) -> dict[str, Any]:
    if batch.segments is not None:
        # Positions that restart, and no mask: transformers' sign of packed samples, which do not attend to one another.
        return {"input_ids": batch.ids_BT, "position_ids": batch.segments.position_T[None], "use_cache": False}
    return {"input_ids": batch.ids_BT, "attention_mask": batch.attention_BT.to(torch.int64), "use_cache": False}


def _labels(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(which positions predict a loss token [B, T - 1], those tokens [T])."""
    mask_BT = batch.loss_BT[:, 1:]
    labels_BT = batch.ids_BT if batch.labels_BT is None else batch.labels_BT
    return mask_BT, labels_BT[:, 1:][mask_BT]


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


def step_loss(
    model: Any, batch: Batch, weights_B: torch.Tensor, *, normaliser: torch.Tensor | float | None = None
) -> torch.Tensor:
    """sum of w_i l_i over sum of w_i n_i: with w = 1 exactly the token mean that transformers trains on. Nats per token.

    `model` is a causal language model or its `HeadRoute` (cheaper: found once). `normaliser` replaces sum w_i n_i where the batch
    is a part of a larger one. Gradients reach every parameter; the mode of the model is the caller's.
    """
    route = model if isinstance(model, HeadRoute) else HeadRoute(model)
    weights_B = weights_B.to(batch.loss_BT.device, torch.float64)
    if normaliser is None:
        normaliser = (weights_B * batch.sum_by_sample(batch.loss_BT[:, 1:])).sum()
    return route.weighted_loss(batch, weights_B / normaliser)[0]
