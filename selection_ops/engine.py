"""The gradient engine: low-rank projected per-sample gradients by one forward and one backward without weight gradients.

For a site y = W a, the gradient of a sample's loss with respect to W is the sum over its tokens of d a^T, d being the gradient
of y. Its sketch P_out (sum d a^T) P_in^T = sum (P_out d)(P_in a)^T is formed in backward from factors of R numbers each
(LoGra, arXiv 2405.13954, section 3). The weight gradients themselves, 2 of the 6 FLOPs per parameter and token, are never formed.

Where the time goes (one core with AVX-512 bf16, random Llamas of 35M and 135M, `benchmarks/scoring.py`): of a plain forward + backward
in float32, a forward with a backward that only reaches the inputs is 0.69 and 0.63; projecting, contracting and folding add 0.03. bfloat16
takes a third of the time of float32, and the same share of its own plain pass. So the engine stands at its bound, and what is left
to gain lies in the arithmetic, the attention backward (`model.default_attention`) and padding, not here.

Legend: B samples, T tokens, I inputs and O outputs of a site, R projection rank, S all sites' R x R sketches side by side,
K sketch dimension.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn

from schemas.errors import InputError
from schemas.spec import PROJECTION_VERSION, FeatureSpec, InputGroup, LossKind, SmallSite
from selection_ops.batching import Batch
from selection_ops.held import HeldBatch, HeldTape, hold_leaves
from selection_ops.losses import HeadRoute, Watch
from selection_ops.model import causal_model, evaluating
from selection_ops.preconditioning import Preconditioner
from selection_ops.projections import Fold, ProjectionSpec, input_signs, output_signs
from selection_ops.recording import MatrixSite, ModuleTape, Records
from selection_ops.sites import MatrixParameter, ModelSites, Parameter, Site, find_sites, search
from selection_ops.sites.expanded import Expanded


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleFeatures:
    """Features of a batch, in its order.

    loss_B: sum (or mean) of token losses, nats, float64. loss_tokens_B: tokens that carry loss. sketch_BK: the full sketch, not
    normalised, float32 (float64 for float64 models). grad_norm_B: norm of the sketch before the fold.
    """

    loss_B: torch.Tensor
    loss_tokens_B: torch.Tensor
    sketch_BK: torch.Tensor
    grad_norm_B: torch.Tensor
    held: HeldBatch | None = None
    """What weighted gradients of the batch are formed from, where the engine holds it."""
    aligned_BT: torch.Tensor | None = None
    """Alignments of a sample's tokens with the directions of `align_with`, by place in the sample; 0 on padding."""


class GradientEngine:
    """A context in which `features` computes per-sample sketches of a model's gradients.

    Inside, parameters are frozen, modules are in eval mode, the embedding output carries gradient, and the forwards of modules with
    sites are replaced on the instances; on exit, also after an error, everything is as it was. Projections are made once, weights are
    read live: entering and leaving between optimizer steps is cheap.

    `input_groups` and `small_sites` are what to attribute (the linear maps of the blocks where neither is given); `k` 0 keeps every
    site's numbers side by side. With a `preconditioner` sketches are of P * gradient. With `hold`, `features` also keeps what the
    weighted gradient of every trainable parameter is formed from later; `unheld` says of which parameters it cannot, and why. `found` and `route` are what running the model has shown before,
    where it is not to be run for that again. Raises `InputError` where the model lacks a site.
    """

    def __init__(
        self,
        model: Any,
        input_groups: tuple[InputGroup, ...] | None = None,
        small_sites: tuple[SmallSite, ...] = (),
        *,
        proj_rank: int,
        k: int,
        seed: int,
        version: int = PROJECTION_VERSION,
        loss: LossKind = "sum",
        preconditioner: Preconditioner | None = None,
        hold: bool = False,
        found: ModelSites | None = None,
        route: HeadRoute | None = None,
    ) -> None:
        self.model = model = causal_model(model)
        self.loss = loss
        self.input_groups = find_sites(model).input_groups if input_groups is None else input_groups
        self.small_sites = small_sites
        self._rank = proj_rank
        self._preconditioner = preconditioner
        self._hold = hold
        self._spec = ProjectionSpec(proj_rank=proj_rank, seed=seed, version=version, k=k)
        self._found = found or search(model)
        known = {site.name: site for site in (*self._found.matrices, *self._found.small)}
        self._sites: list[MatrixSite] = []
        for group in self.input_groups:
            for name in group.sites:
                site = self._known(known, name)
                if not isinstance(site.shape, MatrixParameter):
                    raise InputError(f"{name!r} of {type(model).__name__} is no matrix, as the scoring was declared")
                self._sites.append(MatrixSite(site, group.name, len(self._sites)))
        self._small = {site.name: self._known(known, site.name) for site in small_sites}
        self._made_for: tuple[torch.device, torch.dtype] | None = None
        self._preconditioned = False
        self._make_projections()
        self._route = route or HeadRoute(model)
        self._head_tape: ModuleTape | HeldTape | None = None
        self._records: Records | None = None
        self._held: HeldBatch | None = None
        self.unheld = {
            name: reason for name, reason in self._found.reasons.items() if model.get_parameter(name).requires_grad
        }
        self._open: contextlib.ExitStack | None = None

    def _known(self, known: dict[str, Site], name: str) -> Site:
        if name not in known:
            raise InputError(
                f"{type(self.model).__name__} has no site {name!r}; the scoring was declared for another architecture"
            )
        return known[name]

    @classmethod
    def from_spec(cls, model: Any, spec: FeatureSpec, preconditioner: Preconditioner | None = None) -> GradientEngine:
        """The engine of a feature spec, for the side of it that `preconditioner` belongs to."""
        return cls(
            model, spec.input_groups, spec.small_sites, proj_rank=spec.proj_rank, k=spec.k, seed=spec.seed,
            version=spec.projection_version, loss=spec.loss, preconditioner=preconditioner,
        )  # fmt: skip

    @property
    def matrix_sites(self) -> tuple[Site, ...]:
        """The matrix sites, in the order of their sketches."""
        return tuple(found.site for found in self._sites)

    @property
    def sites(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(found.name for found in self._sites)

    @property
    def sketch_size(self) -> int:
        """Numbers in a sketch."""
        small = sum(site.size for site in self.small_sites)
        return self._spec.k or len(self._sites) * self._rank**2 + small

    def _make_projections(self) -> None:
        """Projections where the parameters are, in their arithmetic; made again only when the model has moved."""
        parameter = next(self.model.parameters())
        place = parameter.device, parameter.dtype
        if place != self._made_for:
            self._wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            shared: dict[str, torch.Tensor] = {}
            for found in self._sites:
                shape = found.site.shape
                assert isinstance(shape, MatrixParameter)
                if found.group not in shared:
                    signs_RI = input_signs(self._spec, found.group, shape.inputs, parameter.device)
                    shared[found.group] = signs_RI.T.to(parameter.dtype).contiguous()
                found.plain_in_IR = shared[found.group]
                signs_RO = output_signs(self._spec, found.name, shape.outputs, parameter.device)
                found.plain_out_OR = signs_RO.T.to(parameter.dtype).contiguous()
            self._fold = Fold(self._spec, self.input_groups, parameter.device, self._wide, self.small_sites)
            self._made_for, self._preconditioned = place, False
        if not self._preconditioned:
            self._fold_in(parameter)

    def _fold_in(self, parameter: torch.Tensor) -> None:
        """Give every site the preconditioner's share: rows of its projections multiplied, or what its whole gradient is."""
        held = self._preconditioner or Preconditioner()
        shared: dict[str, torch.Tensor] = {}
        for found in self._sites:
            exact, found.less = held.exact.get(found.name), held.less.get(found.name)
            found.exact_OI = None if exact is None else exact.to(parameter.device, self._wide)
            out_factor, in_factor, found.input = self._factors(found)
            if found.input not in shared:
                shared[found.input] = _scaled(found.plain_in_IR, in_factor)
            found.in_signs_IR = shared[found.input]
            found.out_signs_OR = _scaled(found.plain_out_OR, out_factor)
        small = held.small
        self._small_factors = {name: factor.to(parameter.device, self._wide) for name, factor in small.items()}
        self._preconditioned = True

    def _factors(self, found: MatrixSite) -> tuple[torch.Tensor | None, torch.Tensor | None, str]:
        """What multiplies the outputs' and the inputs' signs, a number a row or a matrix, and whose the latter is."""
        held = self._preconditioner
        if held is None or found.whole:
            return None, None, found.group
        if found.name in held.sided:
            sided = held.sided[found.name]
            return (sided.matrix, None, found.group) if sided.from_left else (None, sided.matrix, found.name)
        if found.name not in held.outputs:
            raise InputError(f"the preconditioner has no factors of site {found.name!r}; it was made for another model")
        own = found.name if found.name in held.inputs else found.group
        # A site without a preconditioner of inputs shares the signs as they are with those that have none.
        return held.outputs[found.name], held.inputs[own], f"{own} preconditioned"

    def precondition(self, preconditioner: Preconditioner | None) -> None:
        """Take another preconditioner from the next time that the engine is entered."""
        self._preconditioner, self._preconditioned = preconditioner, False

    def align_with(self, directions: Mapping[str, torch.Tensor] | None) -> None:
        """Directions D [O, I] by site, for all matrix sites or none: `features` then also gives every token's delta' D input.

        Summed over tokens and sites that is the inner product of a sample's gradient with D, without projection.
        """
        for found in self._sites:
            found.direction_OI = None if directions is None else directions[found.name]

    def _tapes(self) -> dict[str, ModuleTape]:
        """What every module with attributed parameters reports to."""
        matrices: dict[str, dict[str, MatrixSite]] = {}
        small: dict[str, dict[str, str]] = {}
        for found in self._sites:
            for path, local in found.site.uses:
                matrices.setdefault(path, {})[local] = found
        for name, site in self._small.items():
            for path, local in site.uses:
                small.setdefault(path, {})[local] = name
        return {
            path: ModuleTape(self._now, matrices.get(path, {}), small.get(path, {}), self._found.layouts[path])
            for path in sorted({*matrices, *small})
        }

    def _held_tapes(self) -> dict[str, HeldTape]:
        """What every module with trained parameters reports to; what is sketched is passed on."""
        sketches = self._tapes()
        parts: dict[str, dict[str, tuple[str, Parameter]]] = {}
        for site in (*self._found.matrices, *self._found.small):
            for path, local in site.uses:
                kind = self._found.types[path]
                own = (
                    {}
                    if kind is Expanded
                    else {part.name: part for part in kind.parameters(self.model.get_submodule(path))}
                )
                parts.setdefault(path, {})[local] = site.parameter, own.get(local, site.shape)
        return {
            path: HeldTape(self._now_held, found, sketches.get(path), self._found.layouts[path])
            for path, found in sorted(parts.items())
        }

    def _now_held(self) -> tuple[Records, HeldBatch]:
        records = self._now()
        assert self._held is not None
        return records, self._held

    def _now(self) -> Records:
        if self._records is None:
            raise RuntimeError("a module of the model ran inside `with engine:` but outside of features()")
        return self._records

    def __enter__(self) -> GradientEngine:
        if self._open is not None:
            raise RuntimeError("this engine has been entered already")
        self._make_projections()
        with contextlib.ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            for parameter in self.model.parameters():
                stack.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(False)
            embedding = self.model.get_input_embeddings()
            tapes: Mapping[str, ModuleTape | HeldTape] = self._held_tapes() if self._hold else self._tapes()
            for path, tape in tapes.items():
                module = self.model.get_submodule(path)
                if module is self._route.head:
                    self._head_tape = tape
                    continue
                stack.callback(_restore_forward, module, dict(module.__dict__))
                call = module.__dict__.get("forward") or type(module).forward.__get__(module)
                module.__dict__["forward"] = self._found.types[path].forward(module, call, tape)
            handle = embedding.register_forward_hook(_requiring_gradient)
            stack.callback(handle.remove)
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, self._open = self._open, None
        self._records = None
        if stack is not None:
            stack.close()

    def features(self, batch: Batch) -> SampleFeatures:
        """Losses, sketches and gradient norms of a batch; only inside the context.

        A sample whose numbers overflow has non-finite features, the others of the batch are as without it; not in a packed batch, where
        attention multiplies what it masks by zero.
        """
        if self._open is None:
            raise RuntimeError("features() is only there inside `with engine:`")
        self._records = records = Records(
            (batch.samples, batch.ids_BT.shape[1]),
            matrices=len(self._sites),
            rank=self._rank,
            small={site.name: site.size for site in self.small_sites},
            dtype=self._wide,
            device=batch.ids_BT.device,
            segments=batch.segments,
            loss_tokens_B=batch.sum_by_sample(batch.loss_BT[:, 1:]),
        )
        if any(found.direction_OI is not None for found in self._sites):
            longest = batch.ids_BT.shape[1] if batch.segments is None else max(batch.segments.lengths)
            records.aligned_BT = torch.zeros(batch.samples, longest, dtype=self._wide, device=batch.ids_BT.device)
        self._held = held = HeldBatch(batch.ids_BT.shape[1], batch.segments) if self._hold else None
        try:
            with torch.enable_grad():
                loss_B = self._route.sample_losses(batch, self._watch(batch, records))
                loss_B.sum().backward()
            if held is not None:
                hold_leaves(records, held, {site.parameter: site.shape for site in self._found.small})
            records.collect_leaves()
        finally:
            self._records = self._held = None
        flat_BS = records.flat(self._small_factors)
        loss_B = loss_B.detach().double()
        loss_tokens_B, aligned_BT = records.loss_tokens_B, records.aligned_BT
        if self.loss == "mean":
            flat_BS = flat_BS / loss_tokens_B[:, None]
            loss_B = loss_B / loss_tokens_B
            aligned_BT = None if aligned_BT is None else aligned_BT / loss_tokens_B[:, None]
        return SampleFeatures(
            loss_B=loss_B, loss_tokens_B=loss_tokens_B, sketch_BK=self._fold(flat_BS), grad_norm_B=flat_BS.norm(dim=1),
            held=held, aligned_BT=aligned_BT,
        )  # fmt: skip

    def _watch(self, batch: Batch, records: Records) -> Watch | None:
        """What the head reports, whose logits never stand whole: its output's gradient is softmax - onehot(label)."""
        tape = self._head_tape
        if tape is None:
            return None
        sample_T = batch.sample_of_loss()

        def watch(part: slice, hidden_tI: torch.Tensor, softmax_tV: torch.Tensor, labels_t: torch.Tensor) -> None:
            if isinstance(tape, HeldTape):
                assert self._route.head is not None
                tape.head(self._route.head, hidden_tI, softmax_tV, labels_t, sample_T[part])
            else:
                tape.head(records, hidden_tI, softmax_tV, labels_t, sample_T[part])

        return watch

    def project_dense(self, site: str, gradient: torch.Tensor) -> torch.Tensor:
        """Sketch [R, R] of a dense gradient of one matrix site, given in the shape of the parameter that holds it.

        The same projections as of the samples: with k = 0, the concatenation over `sites` is comparable with `sketch_BK`.
        """
        found = self._of_name(site)
        assert isinstance(found.site.shape, MatrixParameter)
        gradient_OI = found.site.shape.matrix(gradient).to(self._wide)
        if found.less is not None:
            gradient_OI = found.less.apply(gradient_OI)
        if found.exact_OI is not None:
            gradient_OI = gradient_OI * found.exact_OI
        left_RI = found.out_signs_OR.T.to(self._wide) @ gradient_OI
        return left_RI @ found.in_signs_IR.to(self._wide) / self._rank

    def project_matrix(self, site: str, matrix_OI: torch.Tensor) -> torch.Tensor:
        """Sketch [R, R] of a matrix in the place of a site's gradient, as an engine without preconditioner projects it."""
        found = self._of_name(site)
        left_RI = found.plain_out_OR.T.to(self._wide) @ matrix_OI.to(self._wide)
        return left_RI @ found.plain_in_IR.to(self._wide) / self._rank

    def _of_name(self, site: str) -> MatrixSite:
        found = next((known for known in self._sites if known.name == site), None)
        if found is None:
            names = ", ".join(known.name for known in self._sites[:4])
            raise InputError(f"no site {site!r} among the {len(self._sites)} attributed: {names}, ...")
        return found


def _requiring_gradient(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
    """Backward ends at the embedding's output, unless a site inside of it (an adapter) or a leaf lets it require gradient already."""
    return None if output.requires_grad else output.detach().requires_grad_()


def _scaled(signs_IR: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """Signs [I, R], every row times its factor [I], or multiplied by a matrix [I, I]; in float64, so that they are rounded once."""
    if factor is None:
        return signs_IR
    factor, wide_IR = factor.to(signs_IR.device, torch.float64), signs_IR.double()
    product_IR = factor @ wide_IR if factor.dim() == 2 else wide_IR * factor[:, None]
    return product_IR.to(signs_IR.dtype).contiguous()


def _restore_forward(module: nn.Module, before: dict[str, Any]) -> None:
    """Give the instance the forward of its own that it had, or none."""
    if "forward" in before:
        module.__dict__["forward"] = before["forward"]
    else:
        module.__dict__.pop("forward", None)
