"""Where the factors of per-sample gradients arrive while a batch runs forward and backward, and become sketches.

Legend: B samples, T tokens, t tokens of one sample in a row, I inputs and O outputs of a matrix, R projection rank, M matrix sites,
n numbers of a small parameter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from schemas.errors import InputError
from selection_ops.batching import Segments
from selection_ops.preconditioning import LessForm
from selection_ops.sites import Forward, Site
from selection_ops.sites.layout import CallLayout


@dataclasses.dataclass(eq=False)
class MatrixSite:
    """A matrix site and its projections, sqrt(R) times what they are: sketches are scaled by 1/R at the end.

    Signs are +-1, exact in bfloat16; a preconditioner of rank one multiplies their rows.
    """

    site: Site
    group: str
    index: int
    input: str = ""
    """Whose projection of the input it is: the group's, or the site's own."""
    in_signs_IR: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    out_signs_OR: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    exact_OI: torch.Tensor | None = None
    """What every sample's gradient is multiplied by, elementwise, before it is projected."""
    less: LessForm | None = None
    """What every sample's gradient becomes before it is projected, where that is not linear."""
    direction_OI: torch.Tensor | None = None
    """What every token's outer product is aligned with, without projection."""
    plain_in_IR: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    plain_out_OR: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    """The signs without a preconditioner."""

    @property
    def name(self) -> str:
        """Name of the site."""
        return self.site.name

    @property
    def whole(self) -> bool:
        """Whether a sample's sketch takes its whole gradient."""
        return self.exact_OI is not None or self.less is not None

    @property
    def in_IR(self) -> torch.Tensor:
        """P_in^T."""
        return self.in_signs_IR / self.in_signs_IR.shape[1] ** 0.5

    @property
    def out_OR(self) -> torch.Tensor:
        """P_out^T."""
        return self.out_signs_OR / self.out_signs_OR.shape[1] ** 0.5


class Records:
    """Sums of one batch: R x R of every matrix site and the numbers of every small one, sample by sample."""

    def __init__(
        self,
        shape_BT: tuple[int, int],
        *,
        matrices: int,
        rank: int,
        small: dict[str, int],
        dtype: torch.dtype,
        device: torch.device,
        segments: Segments | None = None,
        loss_tokens_B: torch.Tensor | None = None,
    ) -> None:
        samples, self.length = shape_BT
        self._segments = segments
        self.loss_tokens_B = torch.ones(samples) if loss_tokens_B is None else loss_tokens_B
        self.aligned_BT: torch.Tensor | None = None
        """Alignment of every token of every sample with the directions of the sites; None where there are none."""
        self._used: set[tuple[int, int]] = set()
        self.dtype = dtype
        self.samples = slice(0, samples)
        """Samples that modules see now: all, or the one that an expanded module runs."""
        self.matrices_MBRR = torch.zeros(matrices, samples, rank, rank, dtype=dtype, device=device)
        self.small = {name: torch.zeros(samples, size, dtype=dtype, device=device) for name, size in small.items()}
        self.leaves: list[tuple[str, slice, torch.Tensor]] = []
        self.projected: dict[str, tuple[weakref.ref[torch.Tensor], torch.Tensor]] = {}

    @property
    def size(self) -> int:
        """Samples that modules see now."""
        return self.samples.stop - self.samples.start

    def segments(self, samples: slice) -> Segments | None:
        """Where samples lie in the one row that modules see; None where every sample has a row of its own."""
        return self._segments if samples.stop - samples.start > 1 else None

    def split(self, samples: slice, tensor: torch.Tensor, axis: int, *, zero: bool = False) -> torch.Tensor:
        """A tensor of tokens, which lie along `axis`, as [B, t, .]; shorter samples of a packed row are filled (`Segments.split`)."""
        segments = self.segments(samples)
        if segments is None:
            return tensor.reshape(samples.stop - samples.start, -1, tensor.shape[-1])
        return segments.split(tensor, axis, zero=zero)

    @contextlib.contextmanager
    def only(self, sample: int) -> Iterator[None]:
        """Inside, modules see one sample."""
        before, self.samples = self.samples, slice(sample, sample + 1)
        self.projected.clear()
        try:
            yield
        finally:
            self.samples = before
            self.projected.clear()

    def add(self, site: MatrixSite, samples: slice, left_BtR: torch.Tensor, right_BtR: torch.Tensor) -> None:
        """Add the sum over tokens of left right'. Added, not set: a module may be used more than once in a forward pass.

        bfloat16 factors are widened here: the sum over tokens is where rounding would pile up.
        """
        product_BRR = left_BtR.to(self.dtype).transpose(1, 2) @ right_BtR.to(self.dtype)
        self.matrices_MBRR[site.index, samples] += product_BRR

    def add_exactly(
        self, site: MatrixSite, samples: slice, delta_nO: torch.Tensor, inputs_nI: torch.Tensor, sample_n: torch.Tensor
    ) -> None:
        """Add each sample's sketch of P * (sum over its rows of delta input'), by way of that whole matrix, one sample at a time.

        Raises `InputError` where P is not linear and the site is used more than once: then no use has the whole gradient.
        """
        place = (site.index, samples.start)
        if site.less is not None and place in self._used:
            raise InputError(
                f"the LESS form needs the whole gradient of a site at once, and {site.name} is used more than once"
            )
        self._used.add(place)
        out_OR, in_IR = site.out_signs_OR.to(self.dtype), site.in_signs_IR.to(self.dtype)
        for sample in range(samples.stop - samples.start):
            mine_n = torch.nonzero(sample_n == sample)[:, 0]
            if len(mine_n):
                whole_OI = delta_nO[mine_n].to(self.dtype).T @ inputs_nI[mine_n].to(self.dtype)
                if site.less is not None:
                    whole_OI = site.less.apply(whole_OI, float(self.loss_tokens_B[samples.start + sample]))
                if site.exact_OI is not None:
                    whole_OI = whole_OI * site.exact_OI
                self.matrices_MBRR[site.index, samples.start + sample] += out_OR.T @ whole_OI @ in_IR

    def align(self, samples: slice, score_Bt1: torch.Tensor) -> None:
        """Add scores of tokens; of [B, ., T] the axis between is summed."""
        assert self.aligned_BT is not None
        count, tokens, width = score_Bt1.shape[0], score_Bt1.shape[1], self.aligned_BT.shape[1]
        if tokens % width:  # a sample of a packed row that its module saw alone
            self.aligned_BT[samples, :tokens] += score_Bt1[..., 0]
        else:
            self.aligned_BT[samples] += score_Bt1.reshape(count, -1, width).sum(1)

    def align_rows(self, samples: slice, score_n: torch.Tensor, sample_n: torch.Tensor, place_n: torch.Tensor) -> None:
        """As `align` for rows in any order, each with its sample among `samples` and its place there."""
        assert self.aligned_BT is not None
        self.aligned_BT.index_put_((samples.start + sample_n, place_n), score_n.to(self.dtype), accumulate=True)

    def add_rows(
        self, site: MatrixSite, samples: slice, left_nR: torch.Tensor, right_nR: torch.Tensor, sample_n: torch.Tensor
    ) -> None:
        """As `add` for rows in any order, row i of sample `sample_n[i]` among `samples`."""
        members_Bn = torch.arange(samples.stop - samples.start, device=sample_n.device)[:, None] == sample_n
        left_BRn = left_nR.to(self.dtype).T * members_Bn[:, None].to(self.dtype)
        self.matrices_MBRR[site.index, samples] += left_BRn @ right_nR.to(self.dtype)

    def collect_leaves(self) -> None:
        """Take the gradients of the copies of parameters that samples had of their own."""
        for name, samples, leaf in self.leaves:
            if leaf.grad is not None and name in self.small:
                self.small[name][samples] += leaf.grad.to(self.dtype).reshape(1, -1)
        self.leaves.clear()

    def flat(self, small_factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[B, all numbers]: the matrices' R x R side by side, scaled, then the small sites', times their factors where they have some."""
        size, rank = self.matrices_MBRR.shape[1:3]
        matrices = self.matrices_MBRR.transpose(0, 1).reshape(size, -1) / rank
        small = [value * small_factors[name] if name in small_factors else value for name, value in self.small.items()]
        return torch.cat([matrices, *small], 1) if small else matrices


class ModuleTape:
    """What one module's forward reports to (`sites.base.Tape`)."""

    def __init__(
        self, records: Callable[[], Records], matrices: dict[str, MatrixSite], small: dict[str, str], layout: CallLayout
    ) -> None:
        self._records, self._matrices, self._small, self._layout = records, matrices, small, layout

    def wants(self, name: str) -> bool:
        """Whether the parameter is attributed."""
        return name in self._matrices or name in self._small

    def by_sample(self, tensor: torch.Tensor) -> torch.Tensor:
        """[B, t, .]; what is shared by all samples is repeated for each."""
        records = self._records()
        if records.segments(records.samples) is None and tensor.shape[0] == 1 and records.size > 1:
            tensor = tensor.expand(records.size, *tensor.shape[1:])
        return records.split(records.samples, tensor, self._layout.axis)

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Tape.rows`."""
        records = self._records()
        return self.by_sample(tensor) if records.segments(records.samples) is None else tensor

    def outer(self, name: str, output: torch.Tensor, inputs: torch.Tensor) -> None:
        """See `Tape.outer`."""
        site = self._matrices.get(name)
        if site is None or not output.requires_grad:
            return
        records = self._records()
        samples, axis = records.samples, self._layout.axis
        if site.direction_OI is not None:
            self._align(site, records, output, inputs)
        if site.whole:
            self._exactly(site, records, output, inputs)
            return
        right = self._projected(records, site, inputs)

        def arrive(delta: torch.Tensor) -> None:
            left = delta @ site.out_signs_OR.to(delta.dtype)
            left_BtR = records.split(samples, left, axis, zero=True)
            records.add(site, samples, left_BtR, records.split(samples, right, axis))

        on_gradient(output, arrive)

    def _exactly(self, site: MatrixSite, records: Records, output: torch.Tensor, inputs: torch.Tensor) -> None:
        """As `outer`, with the input kept until backward."""
        samples, axis, held_BtI = records.samples, self._layout.axis, self.by_sample(inputs.detach())
        sample_n = torch.arange(len(held_BtI), device=held_BtI.device).repeat_interleave(held_BtI.shape[1])

        def arrive(delta: torch.Tensor) -> None:
            delta_nO = records.split(samples, delta, axis, zero=True).flatten(0, 1)
            records.add_exactly(site, samples, delta_nO, held_BtI.flatten(0, 1), sample_n)

        on_gradient(output, arrive)

    def _align(self, site: MatrixSite, records: Records, output: torch.Tensor, inputs: torch.Tensor) -> None:
        """Add every token's delta' D input; the input is kept until backward."""
        samples, axis, held = records.samples, self._layout.axis, inputs.detach()

        def arrive(delta: torch.Tensor) -> None:
            assert site.direction_OI is not None
            pulled = delta @ site.direction_OI.to(delta.dtype)
            score = (pulled.to(records.dtype) * held.to(records.dtype)).sum(-1, keepdim=True)
            records.align(samples, records.split(samples, score, axis, zero=True))

        on_gradient(output, arrive)

    def _projected(self, records: Records, site: MatrixSite, inputs: torch.Tensor) -> torch.Tensor:
        held = records.projected.get(site.input)
        # A weak reference: what is kept until backward is the projected input, not the input.
        if held is None or held[0]() is not inputs:
            held = weakref.ref(inputs), inputs.detach() @ site.in_signs_IR
            records.projected[site.input] = held
        return held[1]

    def lookup(self, name: str, output: torch.Tensor, row_BT: torch.Tensor, scale_BT: torch.Tensor) -> None:
        """See `Tape.lookup`."""
        site = self._matrices.get(name)
        if site is None:
            return
        records = self._records()
        samples, axis = records.samples, self._layout.axis

        if site.less is not None or site.direction_OI is not None:
            raise InputError(f"{site.name} is a lookup, which takes no part in the LESS form and in exact alignment")

        def arrive(delta: torch.Tensor) -> None:
            if site.exact_OI is not None:  # a token meets one row: its gradient is as exact as its sketch
                delta = delta * site.exact_OI[row_BT].to(delta.dtype)
            right_BTR = (delta @ site.in_signs_IR.to(delta.dtype)) * scale_BT[..., None].to(delta.dtype)
            left_BtR = records.split(samples, site.out_signs_OR[row_BT], axis)
            records.add(site, samples, left_BtR, records.split(samples, right_BTR, axis, zero=True))

        on_gradient(output, arrive)

    def routed(self, name: str, output_nO: torch.Tensor, inputs_nI: torch.Tensor, token_n: torch.Tensor) -> None:
        """See `Tape.routed`."""
        site = self._matrices.get(name)
        if site is None or not output_nO.requires_grad:
            return
        records = self._records()
        samples, segments = records.samples, records.segments(records.samples)
        sample_n = token_n // records.length if segments is None else segments.sample_T[token_n]
        if site.direction_OI is not None:
            place_n = token_n % records.length if segments is None else segments.position_T[token_n]
            kept_nI = inputs_nI.detach()

            def aligned(delta_nO: torch.Tensor) -> None:
                assert site.direction_OI is not None
                pulled_nI = (delta_nO @ site.direction_OI.to(delta_nO.dtype)).to(records.dtype)
                records.align_rows(samples, (pulled_nI * kept_nI.to(records.dtype)).sum(-1), sample_n, place_n)

            on_gradient(output_nO, aligned)
        if site.whole:
            held_nI = inputs_nI.detach()
            on_gradient(output_nO, lambda delta_nO: records.add_exactly(site, samples, delta_nO, held_nI, sample_n))
            return
        right_nR = inputs_nI.detach() @ site.in_signs_IR

        def arrive(delta_nO: torch.Tensor) -> None:
            left_nR = delta_nO @ site.out_signs_OR.to(delta_nO.dtype)
            records.add_rows(site, samples, left_nR, right_nR, sample_n)

        on_gradient(output_nO, arrive)

    def small(self, name: str, output: torch.Tensor, gradient_Bn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """See `Tape.small`."""
        site = self._small.get(name)
        if site is None or not output.requires_grad:
            return
        records = self._records()
        samples, axis = records.samples, self._layout.axis

        def arrive(delta: torch.Tensor) -> None:
            wide_BtO = records.split(samples, delta, axis, zero=True).to(records.dtype)
            records.small[site][samples] += gradient_Bn(wide_BtO)

        on_gradient(output, arrive)

    def head(
        self,
        records: Records,
        hidden_tI: torch.Tensor,
        softmax_tV: torch.Tensor,
        labels_t: torch.Tensor,
        sample_t: torch.Tensor,
    ) -> None:
        """A linear map from hidden states to logits, whose gradient is softmax - onehot(label), for some tokens."""
        site, bias = self._matrices.get("weight"), self._small.get("bias")
        if site is not None and site.direction_OI is not None:
            raise InputError(f"{site.name} is the head, which takes no part in exact alignment")
        if site is not None and site.whole:
            delta_tV = softmax_tV.to(records.dtype)
            if delta_tV is softmax_tV:
                delta_tV = softmax_tV.clone()
            delta_tV[torch.arange(len(labels_t), device=labels_t.device), labels_t] -= 1.0
            records.add_exactly(site, records.samples, delta_tV, hidden_tI, sample_t)
        elif site is not None:
            out_VR = site.out_signs_OR.to(softmax_tV.dtype)
            left_tR = (softmax_tV @ out_VR).to(records.dtype) - out_VR[labels_t].to(records.dtype)
            right_tR = hidden_tI @ site.in_signs_IR.to(hidden_tI.dtype)
            records.add_rows(site, records.samples, left_tR, right_tR, sample_t)
        if bias is not None:
            members_Bt = torch.arange(records.size, device=sample_t.device)[:, None] == sample_t
            records.small[bias] += members_Bt.to(records.dtype) @ softmax_tV.to(records.dtype)
            records.small[bias].index_put_((sample_t, labels_t), records.small[bias].new_tensor(-1.0), accumulate=True)

    def each_sample(self, module: nn.Module, call: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `Tape.each_sample`."""
        records = self._records()
        if records.size == 1:
            return self._one(module, call, args, kwargs, records.samples)
        leaves, form = _pytree.tree_flatten((args, kwargs))
        segments = records.segments(records.samples)
        if segments is not None and not self._layout.flat:
            raise InputError(f"{type(module).__name__} runs sample by sample, on more than one row a token")
        results: list[list[Any]] = []
        result_form: Any = None
        for sample in range(records.samples.start, records.samples.stop):
            given = [
                _rows(leaf, place, sample - records.samples.start, records.size, segments)
                for leaf, place in zip(leaves, self._layout.arguments)
            ]
            own_args, own_kwargs = _pytree.tree_unflatten(given, form)
            with records.only(sample):
                found = self._one(module, call, own_args, own_kwargs, records.samples)
            parts, result_form = _pytree.tree_flatten(found)
            results.append(parts)
        joined = [
            torch.cat(parts) if place in ("batch", "flat") else parts[0]
            for parts, place in zip(zip(*results), self._layout.result)
        ]
        return _pytree.tree_unflatten(joined, result_form)

    def _one(
        self, module: nn.Module, call: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], samples: slice
    ) -> Any:
        """The module with copies of its small parameters that collect one sample's gradient."""
        records = self._records()
        swapped: list[tuple[nn.Module, str, Any]] = []
        try:
            for local, site in self._small.items():
                path, _, attribute = local.rpartition(".")
                holder = module.get_submodule(path)
                own = holder._parameters[attribute]
                assert own is not None
                leaf = own.detach().clone().requires_grad_()
                records.leaves.append((site, samples, leaf))
                swapped.append((holder, attribute, own))
                holder._parameters[attribute] = leaf  # type: ignore[assignment]
            return call(*args, **kwargs)
        finally:
            for holder, attribute, own in swapped:
                holder._parameters[attribute] = own


def _rows(leaf: Any, place: str, sample: int, size: int, segments: Segments | None) -> Any:
    """One sample's rows of an argument."""
    if not isinstance(leaf, torch.Tensor) or place not in ("batch", "flat"):
        return leaf
    if segments is not None:
        return leaf[segments.rows(sample)]
    each = leaf.shape[0] // size
    if not each:  # one row that serves all samples
        return leaf
    return leaf[sample * each : (sample + 1) * each]


def on_gradient(output: torch.Tensor, arrive: Callable[[torch.Tensor], None]) -> None:
    """Call `arrive` with the gradient of an output when backward has made it."""

    def hook(delta: torch.Tensor) -> None:
        # Under autocast the output, and so its gradient, is narrower than the weights; and autocast must not narrow the
        # contraction over tokens.
        with torch.autocast(delta.device.type, enabled=False):
            arrive(delta)

    output.register_hook(hook)
