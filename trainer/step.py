"""One optimizer step that chooses what it trains on: choose -> weight -> form the gradient -> clip -> optimizer.

Three modes. `plain` (policies that need no sketches): one forward and backward over the kept. `two-pass`: the target's gradient
and the candidates' sketches with the live weights, then the choice, then an ordinary weighted backward over the kept. `one-pass`: the
same, but the weighted gradient is formed from the factors that the candidates' backward had (`selection_ops/held.py`).
Legend: N candidates, S kept, M target samples, K sketch dimension.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from schemas.errors import InputError, LehrError
from schemas.spec import PROJECTION_VERSION, PreconditionForm
from selection_ops.batching import collate, length_batches
from selection_ops.encoding import Encoded
from selection_ops.engine import GradientEngine
from selection_ops.held import HeldBatch
from selection_ops.losses import HeadRoute
from selection_ops.model import causal_model
from selection_ops.online.metrics import Geometry, Metric, geometry, get_metric
from selection_ops.online.options import PolicyOptions
from selection_ops.online.policies import Candidates, Decision, Policy, make_policy
from selection_ops.online.weights import effective_sample_size, normalise
from selection_ops.preconditioning import Preconditioner, adamw_preconditioner, fit_rank_one
from selection_ops.sites import MatrixParameter, search


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """An encoded sample that is offered to a step."""

    sample_id: str
    encoded: Encoded
    position: int = -1
    """Position in the order of the stream, -1 outside of one."""
    rank: int = -1
    """Rank in the stream, -1 outside of one."""
    selection_weight: float = 1.0

    @property
    def tokens(self) -> int:
        """Length in tokens."""
        return len(self.encoded.ids)

    @property
    def loss_tokens(self) -> int:
        """Tokens that carry loss."""
        return sum(self.encoded.loss_mask)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step did. `weight_N` has mean 1 over the kept and is 0 elsewhere; losses are before the update."""

    step: int
    decision: Decision
    weight_N: tuple[float, ...]
    mode: str
    metric: str
    loss: float
    """Step loss, nats per token."""
    target_loss: float | None
    sample_loss_N: tuple[float | None, ...]
    """Sums over the loss tokens, nats; None for a candidate that was not computed."""
    grad_norm: float
    clip_factor: float
    effective_sample_size: float
    padding_share: float
    trained_tokens: int
    geometry: Geometry | None = None
    selection_seconds: float = 0.0

    @property
    def applied(self) -> bool:
        """Whether the optimizer stepped; it does not where nothing was kept."""
        return bool(self.decision.kept)


_DEFAULTS = PolicyOptions()
Mode = Literal["one-pass", "two-pass"]


def one_pass_refusal(model: Any) -> str:
    """Why the gradient of a step cannot be formed from the factors of the pass that the choice was made from; empty where it can."""
    model = causal_model(model)
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        return "it has dropout, and the choice is made without"
    if getattr(model, "is_activation_checkpointing", False):
        return "it checkpoints activations, whose factors are not kept"
    missing = {
        name: reason for name, reason in search(model).reasons.items() if model.get_parameter(name).requires_grad
    }
    if missing:
        name, reason = next(iter(missing.items()))
        return f"the factors of {len(missing)} parameters are not known, such as {name} ({reason})"
    return ""


def held_bytes_per_token(model: Any, dtype: str) -> int:
    """Bytes that one pass holds of every token: inputs (shared ones once) and output gradients of the matrices of the blocks, and
    what reaches embedding and head."""
    model = causal_model(model)
    found = search(model)
    shapes = {site.name: site.shape for site in found.matrices if site.blocks}
    numbers = 2 * model.get_input_embeddings().weight.shape[1]
    for group in found.groups:
        held = [shapes[name] for name in group.sites if name in shapes]
        numbers += sum(shape.outputs for shape in held if isinstance(shape, MatrixParameter))
        numbers += next((shape.inputs for shape in held if isinstance(shape, MatrixParameter)), 0)
    return numbers * {"float64": 8, "float32": 4, "bfloat16": 2}[dtype]


def require_one_pass(model: Any) -> None:
    """Raises `InputError` with the reason where a step of this model takes two passes."""
    reason = one_pass_refusal(model)
    if reason:
        raise InputError(f"{type(model).__name__} cannot be trained in one pass: {reason}. Use mode two-pass")


class _Padding:
    """Counts tokens that are computed and those of them that are padding."""

    def __init__(self) -> None:
        self.computed = self.real = 0

    def add(self, items: Sequence[Encoded]) -> None:
        self.computed += max(len(item.ids) for item in items) * len(items)
        self.real += sum(len(item.ids) for item in items)

    @property
    def share(self) -> float:
        return 1 - self.real / self.computed if self.computed else 0.0


class OnlineStep:
    """Steps `optimizer` on a chosen and weighted part of the candidates it is given. Works in any training loop.

    The learning rate is the caller's business (the optimizer's parameter groups). Every trainable parameter takes part in
    the update; the linear maps of the blocks take part in choosing.
    """

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        policy: str | Policy = "filter-then-weight",
        *,
        options: PolicyOptions = _DEFAULTS,
        seed: int = 0,
        proj_rank: int = 16,
        warmup_select: int = 4,
        clip: float = 1.0,
        batch_tokens: int = 4096,
        dtype: str = "float32",
        selection_weights: bool = True,
        mode: Mode = "two-pass",
        precondition: PreconditionForm = "exact",
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.policy = make_policy(policy, options) if isinstance(policy, str) else policy
        self.metric = get_metric(options.metric)
        if self.metric.candidate_power:
            raise InputError(
                f"metric {self.metric.name} preconditions the candidates, which scoring does (lehr score --metric) and a step does not; "
                "use target or sgd"
            )
        self.steps_taken = 0
        self._seed, self._clip, self._batch_tokens = seed, clip, batch_tokens
        self._warmup_select, self._selection_weights = warmup_select, selection_weights
        self._autocast = torch.bfloat16 if dtype == "bfloat16" else None
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._device = self._parameters[0].device
        self._route = HeadRoute(model)
        self._engine: GradientEngine | None = None
        self._mode, self._precondition = mode, precondition
        self._target_engine: GradientEngine | None = None
        self._held: list[tuple[list[int], HeldBatch]] = []
        self._weights: dict[str, nn.Parameter] = {}
        if self.policy.needs_sketches:
            if mode == "one-pass":
                require_one_pass(model)
            self._engine = GradientEngine(
                model, proj_rank=proj_rank, k=0, seed=seed, version=PROJECTION_VERSION, hold=mode == "one-pass"
            )
            if self.metric.needs_preconditioner and precondition == "rank-one":
                self._target_engine = GradientEngine(
                    model, proj_rank=proj_rank, k=0, seed=seed, version=PROJECTION_VERSION
                )
            self._weights = {site.parameter: model.get_parameter(site.parameter) for site in self._engine.matrix_sites}

    def step(
        self, candidates: Sequence[Candidate], target: Sequence[Encoded] = (), *, token_limit: int | None = None
    ) -> StepResult:
        """Choose among `candidates`, against `target` where the policy looks at it, and take one optimizer step.

        Nothing is stepped where nothing is kept (a token limit can do that). Raises `LehrError` naming step and samples
        where a loss or gradient is not finite; the parameters are then untouched.
        """
        if not candidates:
            raise InputError("a step needs at least one candidate")
        number, padding = self.steps_taken + 1, _Padding()
        self._held = []
        started = time.perf_counter()
        space: Geometry | None = None
        target_loss: float | None = None
        loss_N: list[float | None] = [None] * len(candidates)
        if self._engine is not None:
            metric, direction_K, target_loss = self._target_direction(self._engine, target, number, padding)
            sketch_NK, loss_N = self._sketches(self._engine, candidates, number, padding)
            space = geometry(metric, sketch_NK, direction_K)
        decision = self.policy.choose(
            Candidates(
                step=number,
                seed=self._seed,
                sample_ids=[item.sample_id for item in candidates],
                tokens_N=[item.tokens for item in candidates],
                token_limit=token_limit,
                geometry=space,
            )
        )
        selecting = time.perf_counter() - started
        weight_S = self._final_weights(candidates, decision)
        kept = [candidates[index] for index in decision.kept]
        weight_N = [0.0] * len(candidates)
        for index, weight in zip(decision.kept, weight_S.tolist()):
            weight_N[index] = weight
        loss = grad_norm = float("nan")
        clip_factor = 1.0
        if kept:
            if self._held:
                loss = self._form(candidates, weight_N, loss_N, number)
            else:
                loss, kept_loss_S = self._backward(kept, weight_S, number, padding)
                for index, value in zip(decision.kept, kept_loss_S):
                    loss_N[index] = value if loss_N[index] is None else loss_N[index]
            grad_norm, clip_factor = self._clip_gradients(kept, number)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.steps_taken = number
        self._held = []
        return StepResult(
            step=number,
            decision=decision,
            weight_N=tuple(weight_N),
            mode=self._mode if self._engine is not None else "plain",
            metric=space.metric if space else "",
            loss=loss,
            target_loss=target_loss,
            sample_loss_N=tuple(loss_N),
            grad_norm=grad_norm,
            clip_factor=clip_factor,
            effective_sample_size=effective_sample_size(weight_S),
            padding_share=padding.share,
            trained_tokens=sum(item.tokens for item in kept),
            geometry=space,
            selection_seconds=selecting,
        )

    def _final_weights(self, candidates: Sequence[Candidate], decision: Decision) -> Tensor:
        weight_S = decision.weight_S
        if self._selection_weights:
            weight_S = normalise(
                weight_S
                * torch.tensor([candidates[index].selection_weight for index in decision.kept], dtype=torch.float64)
            )
        return weight_S

    @contextlib.contextmanager
    def _arithmetic(self) -> Iterator[None]:
        with torch.autocast(
            self._device.type, dtype=self._autocast or torch.bfloat16, enabled=self._autocast is not None
        ):
            yield

    def _target_direction(
        self, engine: GradientEngine, target: Sequence[Encoded], number: int, padding: _Padding
    ) -> tuple[str, Tensor, float]:
        """(metric that acts, sketch of the preconditioned gradient of the target's token mean, that mean)."""
        if not target:
            raise InputError("this policy compares candidates with target samples; give the step some")
        acting = self._acting_metric()
        if self._target_engine is not None and acting.needs_preconditioner:
            return self._sketched_direction(self._target_engine, acting, target, number, padding)
        weights = list(self._weights.values())
        sums: list[Tensor] = [torch.zeros_like(weight) for weight in weights]
        tokens, total = sum(sum(item.loss_mask) for item in target), 0.0
        self.model.eval()
        for indices in length_batches([len(item.ids) for item in target], self._batch_tokens):
            batch = [target[index] for index in indices]
            padding.add(batch)
            with self._arithmetic():
                loss = self._route.sample_losses(collate(batch, device=self._device)).sum() / tokens
            for held, gradient in zip(sums, torch.autograd.grad(loss, weights)):
                held += gradient
            total += float(loss.detach())
        if not math.isfinite(total):
            raise LehrError(f"step {number}: the loss of the target batch is {total}; nothing was updated")
        metric = acting
        gradients = dict(zip(self._weights, sums))
        if metric.needs_preconditioner:
            for name, weight in self._weights.items():
                gradients[name] = metric.precondition_target(gradients[name], self._preconditioner(weight))
        pieces = [engine.project_dense(site.name, gradients[site.parameter]).flatten() for site in engine.matrix_sites]
        return metric.name, torch.cat(pieces), total

    def _sketched_direction(
        self, engine: GradientEngine, metric: Metric, target: Sequence[Encoded], number: int, padding: _Padding
    ) -> tuple[str, Tensor, float]:
        """As `_target_direction`, through the rank-one fit of the preconditioner: no gradient of the target is formed."""
        outputs: dict[str, Tensor] = {}
        inputs: dict[str, Tensor] = {}
        shapes = {site.name: site for site in engine.matrix_sites}
        for group in engine.input_groups:
            exact = []
            for name in group.sites:
                site = shapes[name]
                assert isinstance(site.shape, MatrixParameter)
                held = self._preconditioner(self._weights[site.parameter]) ** metric.target_power
                exact.append(site.shape.matrix(held))
            fit = fit_rank_one(exact, measured=False)
            outputs.update(zip(group.sites, fit.outputs))
            inputs[group.name] = fit.inputs
        engine.precondition(Preconditioner(outputs=outputs, inputs=inputs))
        tokens, total, direction_K = sum(sum(item.loss_mask) for item in target), 0.0, torch.zeros(())
        with engine:
            for indices in length_batches([len(item.ids) for item in target], self._batch_tokens):
                batch = [target[index] for index in indices]
                padding.add(batch)
                with self._arithmetic():
                    found = engine.features(collate(batch, device=self._device))
                direction_K = direction_K.to(found.sketch_BK) + found.sketch_BK.sum(0) / tokens
                total += float(found.loss_B.sum()) / tokens
        if not math.isfinite(total):
            raise LehrError(f"step {number}: the loss of the target batch is {total}; nothing was updated")
        return metric.name, direction_K, total

    def _acting_metric(self) -> Metric:
        """The metric asked for, or `sgd` until the second moment has seen enough gradients."""
        if not self.metric.needs_preconditioner:
            return self.metric
        seen = min(self._seen(weight) for weight in self._weights.values())
        return self.metric if seen >= self._warmup_select else get_metric("sgd")

    def _seen(self, parameter: Tensor) -> int:
        """Gradients that the second moment of a parameter has seen."""
        state = self.optimizer.state.get(parameter)
        if not state:
            return 0
        if "exp_avg_sq" not in state:
            raise InputError(
                f"metric {self.metric.name} needs the second moment of AdamW, and {type(self.optimizer).__name__} keeps none; "
                "use metric sgd"
            )
        return int(state["step"])

    def _preconditioner(self, parameter: Tensor) -> Tensor:
        group = next(g for g in self.optimizer.param_groups if any(p is parameter for p in g["params"]))
        beta1, beta2 = group["betas"]
        return adamw_preconditioner(
            self.optimizer.state[parameter]["exp_avg_sq"],
            step=self._seen(parameter) + 1,
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
        )

    def _sketches(
        self, engine: GradientEngine, candidates: Sequence[Candidate], number: int, padding: _Padding
    ) -> tuple[Tensor, list[float | None]]:
        """Sketches [N, K] of the candidates under the live weights, and their losses, in the order given."""
        rows: dict[int, Tensor] = {}
        loss_N: list[float | None] = [None] * len(candidates)
        with engine:
            for indices in length_batches([item.tokens for item in candidates], self._batch_tokens):
                batch = [candidates[index].encoded for index in indices]
                padding.add(batch)
                with self._arithmetic():
                    found = engine.features(collate(batch, device=self._device))
                if found.held is not None:
                    self._held.append((indices, found.held))
                for place, index in enumerate(indices):
                    rows[index] = found.sketch_BK[place]
                    loss_N[index] = float(found.loss_B[place])
        sketch_NK = torch.stack([rows[index] for index in range(len(candidates))])
        bad = [
            item
            for item, loss, row in zip(candidates, loss_N, sketch_NK)
            if not (math.isfinite(loss or 0.0) and bool(torch.isfinite(row).all()))
        ]
        if bad:
            raise LehrError(_not_finite(number, "loss or gradient", bad))
        return sketch_NK, loss_N

    def _form(
        self, candidates: Sequence[Candidate], weight_N: Sequence[float], loss_N: Sequence[float | None], number: int
    ) -> float:
        """The gradient of the step loss sum w l / sum w n from held factors, into the parameters' `grad`; returns that loss."""
        normaliser = sum(weight * item.loss_tokens for weight, item in zip(weight_N, candidates))
        if normaliser <= 0:
            kept = [item for item, weight in zip(candidates, weight_N) if weight]
            raise LehrError(f"step {number}: no kept sample has a token that carries loss: {_ids(kept)}")
        self.optimizer.zero_grad(set_to_none=True)
        named = {name: p for name, p in causal_model(self.model).named_parameters() if p.requires_grad}
        gradients = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
        share_N = torch.tensor(weight_N, dtype=torch.float64, device=self._device) / normaliser
        with torch.no_grad():
            for indices, held in self._held:
                if any(weight_N[index] for index in indices):
                    held.add_weighted(share_N[torch.tensor(indices, device=self._device)], gradients)
        for name, parameter in named.items():
            parameter.grad = gradients[name]
        return sum(weight * (loss or 0.0) for weight, loss in zip(weight_N, loss_N) if weight) / normaliser

    def _backward(
        self, items: Sequence[Candidate], weight_S: Tensor, number: int, padding: _Padding
    ) -> tuple[float, list[float]]:
        """Gradient of the step loss sum w l / sum w n over all of `items`, accumulated over batches of bounded tokens.

        Returns the step loss and every item's loss (a sum over its tokens).
        """
        self.optimizer.zero_grad(set_to_none=True)
        weights = weight_S.tolist()
        normaliser = sum(weight * item.loss_tokens for weight, item in zip(weights, items))
        if normaliser <= 0:
            raise LehrError(f"step {number}: no kept sample has a token that carries loss: {_ids(items)}")
        total, loss_S = 0.0, [0.0] * len(items)
        self.model.train()
        for indices in length_batches([item.tokens for item in items], self._batch_tokens):
            batch = [items[index].encoded for index in indices]
            padding.add(batch)
            share_B = torch.tensor([weights[index] / normaliser for index in indices], dtype=torch.float64)
            with self._arithmetic():
                loss, loss_B = self._route.weighted_loss(collate(batch, device=self._device), share_B.to(self._device))
            for index, value in zip(indices, loss_B.tolist()):
                loss_S[index] = value
            bad = [items[index] for index in indices if not math.isfinite(loss_S[index])]
            if bad:
                self.optimizer.zero_grad(set_to_none=True)
                raise LehrError(_not_finite(number, "loss", bad))
            loss.backward()
            total += float(loss.detach())
        return total, loss_S

    def _clip_gradients(self, kept: Sequence[Candidate], number: int) -> tuple[float, float]:
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not norm < float("inf"):
            self.optimizer.zero_grad(set_to_none=True)
            raise LehrError(_not_finite(number, f"norm of the gradient ({norm})", kept))
        # The constant is torch's and transformers': a zero gradient is not divided by zero.
        factor = min(1.0, self._clip / (norm + 1e-6)) if self._clip else 1.0
        if factor < 1.0:
            for gradient in gradients:
                gradient.mul_(factor)
        return norm, factor


def _not_finite(number: int, what: str, items: Sequence[Candidate]) -> str:
    return (
        f"step {number}: {what} is not finite; nothing was updated. Samples: {_ids(items)}. Lower the learning rate, use "
        "--dtype float32, or leave these samples out"
    )


def _ids(items: Sequence[Candidate], most: int = 8) -> str:
    names = [item.sample_id for item in items]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
