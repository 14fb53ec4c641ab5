"""One optimizer step that chooses what it trains on: choose -> weight -> form the gradient -> clip -> optimizer.

Three modes. `plain` (policies that need no sketches): one forward and backward over the kept. `two-pass`: the target's gradient
and the candidates' sketches with the live weights, then the choice, then an ordinary weighted backward over the kept. `one-pass`: the
same, but the weighted gradient is formed from the factors that the candidates' backward had (`selection_ops/held.py`).
With several processes each computes losses and sketches of its share of the candidates, process 0 decides, each forms the gradient of its
share of the kept with the normaliser of all, and the sums are clipped and stepped everywhere (`trainer/parallel.py`).
Legend: N candidates, S kept, M target samples, K sketch dimension.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from schemas.errors import InputError, LehrError
from schemas.spec import PROJECTION_VERSION, BatchLayout
from selection_ops.encoding import Encoded
from selection_ops.engine import GradientEngine
from selection_ops.losses import HeadRoute
from selection_ops.model import causal_model
from selection_ops.online.filters import Draw
from selection_ops.online.metrics import Diagnostics, Geometry, geometry, get_metric, nearest_target
from selection_ops.online.options import PolicyOptions
from selection_ops.online.oracle import OracleReport
from selection_ops.online.policies import Candidates, Decision, Policy, check_granularity, make_policy, resolve_options
from selection_ops.online.weights import effective_sample_size, normalise
from selection_ops.sites import Site, find_sites
from trainer.batches import StepBatches
from trainer.candidate import Candidate, StepResult
from trainer.candidate_pass import CandidatePass
from trainer.clipping import clip_gradients, names_of, not_finite
from trainer.live_preconditioner import Form, LivePreconditioner
from trainer.modes import Mode, require_one_pass
from trainer.optimizers import AnyOptimizer
from trainer.oracle import one_step_oracle
from trainer.sharding import WholeModel
from trainer.target_direction import TargetPass
from trainer.target_memory import Directions, Several, TargetMemory, Targets, all_samples
from trainer.token_scores import mask_tokens

_DEFAULTS = PolicyOptions()
Alignment = Literal["sketched", "exact"]
Gram = Literal["sketched", "survivors", "exact"]


class OnlineStep:
    """Steps `optimizer` on a chosen and weighted part of the candidates it is given. Works in any training loop.

    The learning rate is the caller's business (the optimizer's parameter groups). Every trainable parameter takes part in
    the update; the linear maps of the blocks take part in choosing.
    """

    def __init__(
        self,
        model: Any,
        optimizer: AnyOptimizer,
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
        precondition: Form = "auto",
        gram: Gram = "sketched",
        alignment: Alignment = "sketched",
        reference_model: Any = None,
        layout: WholeModel | None = None,
        batch_layout: BatchLayout = "padded",
        oracle_every: int = 0,
        oracle_draws: int = 8,
        target_decay: float = 0.0,
        target_refresh: int = 1,
        targets: Several = "together",
    ) -> None:
        """`layout` says which processes train together and where the model lies; one process and all of it if left out. `batch_layout`
        packed is for models that keep packed samples apart (`trainer.modes.choose_layout`)."""
        self.model, self.optimizer = model, optimizer
        self.layout = layout or WholeModel(model)
        self._processes = processes = self.layout.processes
        if isinstance(policy, str):
            options = resolve_options(policy, options)
        self.policy = make_policy(policy, options) if isinstance(policy, str) else policy
        self._named, self._options = policy if isinstance(policy, str) else None, options
        self._policies: dict[int, Policy] = {}
        self._granularity = options.granularity
        check_granularity(self._named or type(policy).__name__, self.policy, options.granularity)
        if options.granularity == "token-mask" and (mode != "two-pass" or alignment != "exact"):
            raise InputError(
                f"granularity token-mask needs mode two-pass and alignment exact, not {mode} and {alignment}: the scores of tokens are exact, "
                "and without a token's loss every earlier position has another output gradient than the one held in one pass"
            )
        self.metric = get_metric(options.metric)
        self.steps_taken = 0
        self._oracle_every, self._oracle_draws = oracle_every, oracle_draws
        self._seed, self._clip = seed, clip
        self._selection_weights = selection_weights
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._device = self._parameters[0].device
        self._batches = StepBatches(
            batch_tokens=batch_tokens, dtype=dtype, device=self._device, processes=processes, even=self.layout.even,
            layout=batch_layout,
        )  # fmt: skip
        self._mode, self._warmup_select, self._gram = mode, warmup_select, gram
        self._engine: GradientEngine | None = None
        self._target: TargetMemory | None = None
        self._sketching: CandidatePass | None = None
        self._reference: HeadRoute | None = None
        if reference_model is not None and self.policy.needs_reference_losses:
            self._reference = HeadRoute(reference_model)
        if self.policy.needs_sketches or self.policy.needs_norms:
            if mode == "one-pass":
                require_one_pass(model)
            # Of a model that PEFT has wrapped, what it trains; else the linear maps of the blocks.
            groups = find_sites(model, "adapters").input_groups if model is not causal_model(model) else None
            if groups == ():
                raise InputError("the adapter has no linear map to compare candidates by; use policy full or random")
            self._engine = self.layout.engine(
                groups, proj_rank=proj_rank, k=0, seed=seed, version=PROJECTION_VERSION, hold=mode == "one-pass"
            )
            wide = torch.float64 if self._parameters[0].dtype == torch.float64 else torch.float32
            by_token = options.granularity == "token-mask"
            self._sketching = CandidatePass(self._engine, self._batches, processes, wide=wide, by_token=by_token)
        if self._engine is not None and self.policy.needs_sketches:
            self._preconditioner = LivePreconditioner(
                model,
                self._engine,
                optimizer,
                self.metric,
                asked=options.preconditioner,  # type: ignore[arg-type]
                form=precondition,
            )
            if gram != "sketched" and (mode != "one-pass" or processes.count > 1):
                raise InputError(
                    f"gram {gram} forms whole gradients from what one pass holds, in one process; use mode one-pass there, or gram sketched"
                )
            exact = alignment == "exact"
            if exact and self._preconditioner.is_less:
                raise InputError(
                    "alignments with the LESS form are no inner products of gradients; use alignment sketched"
                )
            if exact and (target_decay or targets != "together"):
                raise InputError(
                    "an average of target directions, or several targets, are compared by sketches; use alignment sketched"
                )
            taking = TargetPass(
                self.layout,
                self._engine,
                self._preconditioner,
                exact=exact,
                proj_rank=proj_rank,
                seed=seed,
            )
            self._target = TargetMemory(taking, refresh=target_refresh, decay=target_decay, several=targets)

    def step(
        self,
        candidates: Sequence[Candidate],
        target: Targets = (),
        *,
        token_limit: int | None = None,
        n_keep: int | None = None,
    ) -> StepResult:
        """Choose among `candidates`, against `target` where the policy looks at it, and take one optimizer step.

        `target` holds samples, or with `targets` mean or max those of several targets by name. `n_keep` takes the place of that of the options in this step, of a policy that was given by name.
        Every process is given the same candidates and target. Figures of the choice (geometry) stand in the result of process 0.
        Nothing is stepped where nothing is kept (a token limit can do that). Raises `LehrError` naming step and samples
        where a loss or gradient is not finite; the parameters are then untouched.
        """
        if not candidates:
            raise InputError("a step needs at least one candidate")
        number = self.steps_taken + 1
        self._batches.reset()
        started = time.perf_counter()
        space: Geometry | None = None
        summed: Geometry | None = None
        score_NT: list[Tensor] | None = None
        target_loss: float | None = None
        loss_N: list[float | None] = [None] * len(candidates)
        reference_N: list[float | None] | None = None
        norm_N: list[float] | None = None
        wanted: Directions | None = None
        formed = False
        metric = get_metric("sgd")
        if self._engine is not None and self._sketching is not None:
            if self._target is not None:
                self._preconditioner.refresh()
                metric = self._preconditioner.acting(self.steps_taken, self._warmup_select)
                wanted = self._target(metric, target, self._batches, number)
                folded = self._preconditioner.folds(metric)
                preconditioner = self._preconditioner.of_power(metric.candidate_power, folded=folded)
                formed = preconditioner is not None and bool(preconditioner.exact or preconditioner.less)
                self._engine.precondition(preconditioner)
                self._engine.align_with(wanted.parts[0].whole)
            sketched = self._sketching(candidates, number)
            loss_N, norm_N = sketched.loss_N, sketched.sketch_NK.double().norm(dim=1).tolist()
            score_NT = sketched.score_NT
            if wanted is not None:
                target_loss = wanted.loss
                if self._processes.leads:
                    space = nearest_target(
                        [
                            geometry(metric.name, sketched.sketch_NK, part.sketch_K, sketched.align_N, part.square)
                            for part in wanted.parts
                        ]
                    )
                    gram = self._sketching.interactions(candidates, self._preconditioner, metric.candidate_power)
                    if self._gram == "exact":
                        space = dataclasses.replace(space, gram_NN=gram(range(len(candidates))))
                    elif self._gram == "survivors":
                        space = dataclasses.replace(space, exact_gram=gram)
                    summed = space
            if self._granularity == "token-mean":
                counts = [item.loss_tokens for item in candidates]
                space = None if summed is None else summed.per_token(counts)
                norm_N = [norm / max(count, 1) for norm, count in zip(norm_N, counts)]
        elif self.measures_losses:
            loss_N = self._losses(self.layout.route, [item.encoded for item in candidates])
            bad = [item for item, value in zip(candidates, loss_N) if not math.isfinite(value or 0.0)]
            if bad:
                raise LehrError(not_finite(number, "loss", bad))
        if self._reference is not None:
            reference_N = self._losses(self._reference, [item.encoded for item in candidates])

        def choose() -> tuple[Decision, Tensor]:
            decision = self._policy_of(n_keep).choose(
                Candidates(
                    step=number,
                    seed=self._seed,
                    sample_ids=[item.sample_id for item in candidates],
                    tokens_N=[item.tokens for item in candidates],
                    token_limit=token_limit,
                    geometry=space,
                    loss_tokens_N=[item.loss_tokens for item in candidates],
                    loss_N=loss_N,
                    reference_loss_N=reference_N,
                    norm_N=norm_N,
                )
            )
            return decision, self._weights_of(candidates, decision.kept, decision.weight_S)

        decision, weight_S = self._processes.decide(choose, kinds=(Decision, Diagnostics))
        selecting = time.perf_counter() - started
        trained: Sequence[Candidate] = candidates
        masked_N: tuple[int, ...] = ()
        if score_NT is not None:
            masking = mask_tokens(candidates, score_NT, decision)
            trained, decision, masked_N = masking.candidates, masking.decision, masking.masked_N
        kept = [trained[index] for index in decision.kept]
        weight_N = [0.0] * len(candidates)
        for index, weight in zip(decision.kept, weight_S.tolist()):
            weight_N[index] = weight
        loss = grad_norm = grad_norm_l1 = float("nan")
        clip_factor = 1.0
        report: OracleReport | None = None
        tried = 0.0
        if kept and self._asks_oracle(number):
            trying = time.perf_counter()
            report = self._oracle(trained, target, decision, weight_S, summed, number)
            tried = time.perf_counter() - trying
        if kept:
            if self._sketching is not None and self._mode == "one-pass":
                loss = self._form(self._sketching, candidates, weight_N, loss_N, number)
            else:
                loss, kept_loss_S = self._backward(kept, weight_S, number)
                for index, value in zip(decision.kept, kept_loss_S):
                    loss_N[index] = value if loss_N[index] is None else loss_N[index]
            self.layout.sum_gradients(self._parameters)
            grad_norm, grad_norm_l1, clip_factor = clip_gradients(self._parameters, self._clip, kept, number)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.steps_taken = number
        exact_rows = self._sketching.release() if self._sketching is not None else ()
        return StepResult(
            step=number,
            decision=decision,
            weight_N=tuple(weight_N),
            mode=self._mode if self._engine is not None else "plain",
            metric=metric.name if wanted is not None else "",
            loss=loss,
            target_loss=target_loss,
            sample_loss_N=tuple(loss_N),
            grad_norm=grad_norm,
            grad_norm_l1=grad_norm_l1,
            clip_factor=clip_factor,
            effective_sample_size=effective_sample_size(weight_S),
            padding_share=self._batches.padding_share,
            trained_tokens=sum(item.tokens for item in kept),
            masked_N=masked_N,
            geometry=space,
            sketched_target=wanted is not None and not wanted.parts[0].formed,
            formed_candidates=formed,
            exact_gram=exact_rows,
            oracle=report,
            selection_seconds=selecting,
            oracle_seconds=tried,
        )

    def _policy_of(self, n_keep: int | None) -> Policy:
        """The policy, keeping as many as a step is told to."""
        if n_keep is None or n_keep == self._options.n_keep or self._named is None:
            return self.policy
        if n_keep not in self._policies:
            self._policies[n_keep] = make_policy(self._named, dataclasses.replace(self._options, n_keep=n_keep))
        return self._policies[n_keep]

    def _weights_of(self, candidates: Sequence[Candidate], places: Sequence[int], weight_S: Tensor) -> Tensor:
        """Weights of the losses of a choice: those of token means shared out over tokens, and the stream's where they are asked for."""
        if self._granularity == "token-mean":
            count_S = torch.tensor([candidates[place].loss_tokens for place in places], dtype=torch.float64)
            weight_S = normalise(weight_S / count_S.clamp_min(1))
        if self._selection_weights:
            given_S = torch.tensor([candidates[place].selection_weight for place in places], dtype=torch.float64)
            weight_S = normalise(weight_S * given_S)
        return weight_S

    def target_state(self) -> dict[str, Tensor]:
        """What of the target's direction survives this step, by name; empty where nothing does."""
        return self._target.state() if self._target is not None else {}

    def load_target_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a `target_state`."""
        if self._target is not None:
            self._target.restore(tensors, self._device)

    @property
    def measures_losses(self) -> bool:
        """Whether losses of the candidates are taken by a forward pass before the choice."""
        return self.policy.needs_losses and self._engine is None

    @property
    def compared_sites(self) -> Sequence[Site]:
        """The linear maps that candidates are compared by; none under a policy that looks at no gradients."""
        return () if self._engine is None else self._engine.matrix_sites

    def wants_target(self, number: int) -> bool:
        """Whether step `number` looks at target samples: a policy that compares with them does, and the oracle."""
        return self.policy.needs_sketches or self._asks_oracle(number)

    def _asks_oracle(self, number: int) -> bool:
        return bool(self._oracle_every) and number % self._oracle_every == 0

    def _oracle(
        self,
        candidates: Sequence[Candidate],
        target: Targets,
        decision: Decision,
        weight_S: Tensor,
        space: Geometry | None,
        number: int,
    ) -> OracleReport:
        """What this step would do to the loss of `target`, and what random ones would; nothing changes."""
        samples = all_samples(target)
        if not samples:
            raise InputError("the oracle measures the loss of target samples; give the step some")
        tokens = sum(sum(item.loss_mask) for item in samples)

        def update(places: Sequence[int], weight_S: Tensor) -> None:
            kept = [candidates[place] for place in places]
            self._backward(kept, weight_S, number)
            self.layout.sum_gradients(self._parameters)
            clip_gradients(self._parameters, self._clip, kept, number)
            self.optimizer.step()

        counted, self._batches = self._batches, copy.copy(self._batches)  # what is tried out is not part of the step
        try:
            return one_step_oracle(
                self.model,
                self.optimizer,
                chosen=(decision.kept, weight_S),
                draw=Draw(seed=self._seed, step=number, sample_ids=[item.sample_id for item in candidates]),
                draws=self._oracle_draws,
                loss_tokens_N=[item.loss_tokens for item in candidates],
                weigh=lambda places: self._weights_of(candidates, places, torch.ones(len(places), dtype=torch.float64)),
                update=update,
                target_loss=lambda: sum(value or 0.0 for value in self._losses(self.layout.route, samples)) / tokens,
                space=space,
            )
        finally:
            self._batches = counted

    def _losses(self, route: HeadRoute, items: Sequence[Encoded]) -> list[float | None]:
        """Losses of samples under a model, sums over their loss tokens, by a forward pass without dropout."""
        loss_N = torch.zeros(len(items), dtype=torch.float64)
        route.model.eval()
        with torch.no_grad():
            for indices, batch in self._batches(items):
                with self._batches.arithmetic():
                    loss_B = route.sample_losses(batch)
                loss_N[indices] = loss_B[: len(indices)].double().cpu()
        return list(self._processes.sum(loss_N).tolist())

    def _form(
        self,
        sketching: CandidatePass,
        candidates: Sequence[Candidate],
        weight_N: Sequence[float],
        loss_N: Sequence[float | None],
        number: int,
    ) -> float:
        """The gradient of the step loss sum w l / sum |w| n from the factors held in `sketching`, into the parameters' `grad`; returns that loss."""
        normaliser = sum(abs(weight) * item.loss_tokens for weight, item in zip(weight_N, candidates))
        if normaliser <= 0:
            kept = [item for item, weight in zip(candidates, weight_N) if weight]
            raise LehrError(f"step {number}: no kept sample has a token that carries loss: {names_of(kept)}")
        self.optimizer.zero_grad(set_to_none=True)
        named = {name: p for name, p in causal_model(self.model).named_parameters() if p.requires_grad}
        gradients = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
        sketching.add_weighted([weight / normaliser for weight in weight_N], gradients)
        for name, parameter in named.items():
            parameter.grad = gradients[name]
        return sum(weight * (loss or 0.0) for weight, loss in zip(weight_N, loss_N) if weight) / normaliser

    def _backward(self, items: Sequence[Candidate], weight_S: Tensor, number: int) -> tuple[float, list[float]]:
        """Gradient of the step loss sum w l / sum |w| n, from this process's share of `items`, accumulated over batches of bounded tokens.

        Returns the step loss and every item's loss (a sum over its tokens), of all shares.
        """
        self.optimizer.zero_grad(set_to_none=True)
        weights = weight_S.tolist()
        normaliser = sum(abs(weight) * item.loss_tokens for weight, item in zip(weights, items))
        if normaliser <= 0:
            raise LehrError(f"step {number}: no kept sample has a token that carries loss: {names_of(items)}")
        loss_S = torch.zeros(len(items), dtype=torch.float64)
        self.model.train()
        for indices, batch in self._batches([item.encoded for item in items]):
            share_B = torch.zeros(batch.samples, dtype=torch.float64)
            share_B[: len(indices)] = torch.tensor([weights[i] / normaliser for i in indices], dtype=torch.float64)
            with self._batches.arithmetic():
                loss, loss_B = self.layout.route.weighted_loss(batch, share_B.to(self._device))
            loss_S[indices] = loss_B[: len(indices)].double().cpu()
            loss.backward()
        losses = self._processes.sum(loss_S).tolist()
        bad = [item for item, value in zip(items, losses) if not math.isfinite(value)]
        if bad:
            self.optimizer.zero_grad(set_to_none=True)
            raise LehrError(not_finite(number, "loss", bad))
        return sum(weight * value for weight, value in zip(weights, losses)) / normaliser, losses
