"""Factors of per-sample gradients, kept through a backward with frozen weights, and the weighted gradient formed from them later.

Of a site with inputs a and output gradients d, the gradient of sum_i w_i l_i is sum_i w_i times the sum over i's tokens of d a'. All of
it is there after one backward, before anybody has chosen w; a sample of weight 0 then costs nothing more. Factors are held by
reference where autograd would have dropped them; the head's, tokens x vocabulary, are made again from its hidden states.
Source: the outer-product form of "ghost" gradients (Goodfellow, arXiv 1510.01799), with the choice between backward and product.

Legend: B samples, n rows (tokens of all samples), O outputs and I inputs of a site, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from selection_ops.batching import Segments
from selection_ops.losses import head_gradient
from selection_ops.recording import ModuleTape, Records, on_gradient
from selection_ops.sites import Forward, MatrixParameter, Parameter, Site
from selection_ops.sites.layout import CallLayout

_Form = Callable[[torch.Tensor], torch.Tensor]
"""From the weights of the samples [B] to a part of the weighted gradient: [O, I] of a matrix, flat of a small parameter."""


_Pairs = Callable[[int], tuple[torch.Tensor, torch.Tensor]]


def _index(part: Parameter) -> str:
    """Which matrix of a packed parameter."""
    return part.name.partition(".")[2]


class HeldBatch:
    """What the weighted gradient of one batch can be formed from."""

    def __init__(self, length: int, segments: Segments | None) -> None:
        self._length, self._segments = length, segments
        self._forms: list[tuple[str, Parameter, _Form]] = []
        self._storage: dict[int, int] = {}
        self._pairs: dict[tuple[str, str], list[_Pairs]] = {}

    @property
    def bytes(self) -> int:
        """Bytes of the factors held."""
        return sum(self._storage.values())

    def add(self, parameter: str, part: Parameter, form: _Form, *held: torch.Tensor) -> None:
        """A part of the gradient of a parameter of the model; `held` are the tensors that `form` keeps alive."""
        self._forms.append((parameter, part, form))
        for tensor in held:
            storage = tensor.untyped_storage()
            self._storage[storage.data_ptr()] = storage.nbytes()

    def add_pairs(self, parameter: str, part: Parameter, of_sample: _Pairs) -> None:
        """What whole gradients of a matrix are formed from: of a sample's place in the batch, (output gradients, inputs) of its rows."""
        self._pairs.setdefault((parameter, _index(part)), []).append(of_sample)

    def pairs(self, site: Site, place: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(output gradients [t, O], inputs [t, I]) of every use that a sample made of a matrix; its gradient is the sum of their products."""
        found = self._pairs.get((site.parameter, _index(site.shape)), [])
        return [pair for pair in (of_sample(place) for of_sample in found) if len(pair[0])]

    def rows(self, weight_B: torch.Tensor, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """Weights of the rows [n] of a tensor of tokens, which lie along `axis`, once all but its last axis are one.

        `weight_B` are those of the samples that the tensor is of: all, or the one that a module saw alone.
        """
        count = tensor.shape[:-1].numel()
        if self._segments is None or len(weight_B) == 1:
            return weight_B.repeat_interleave(count // len(weight_B))
        weight_T = weight_B[self._segments.sample_T]
        return (
            weight_T.repeat(count // len(weight_T)) if axis == 2 else weight_T.repeat_interleave(count // len(weight_T))
        )

    def tokens(self, weight_B: torch.Tensor, token_n: torch.Tensor) -> torch.Tensor:
        """Weights of flat tokens, as `rows`."""
        if self._segments is None or len(weight_B) == 1:
            return weight_B[token_n // self._length]
        return weight_B[self._segments.sample_T[token_n]]

    def add_weighted(self, weight_B: torch.Tensor, gradients: dict[str, torch.Tensor]) -> None:
        """Add the gradient of sum_i w_i l_i to `gradients`, tensors in the shape of their parameters, by name; others are left out."""
        for parameter, part, form in self._forms:
            if parameter not in gradients:
                continue
            found, out = form(weight_B), gradients[parameter]
            target = part.matrix(out) if isinstance(part, MatrixParameter) else out.view(-1)
            target += found.to(out.dtype)


def _outer(left_nO: torch.Tensor, right_nI: torch.Tensor, weight_n: torch.Tensor) -> torch.Tensor:
    """sum of w l r' over the rows whose weight is not zero, in the narrower arithmetic of the two."""
    kept = torch.nonzero(weight_n)[:, 0]
    if len(kept) < len(weight_n):
        left_nO, right_nI, weight_n = left_nO[kept], right_nI[kept], weight_n[kept]
    weighted_nO = (left_nO * weight_n[:, None].to(_scalar(left_nO))).to(left_nO.dtype)
    return weighted_nO.T @ right_nI.to(left_nO.dtype)


def _scalar(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class HeldTape:
    """A tape (`sites.base.Tape`) that holds the factors of what is trained, and passes on what is sketched to another."""

    def __init__(
        self,
        now: Callable[[], tuple[Records, HeldBatch]],
        parts: dict[str, tuple[str, Parameter]],
        sketches: ModuleTape | None,
        layout: CallLayout,
    ) -> None:
        """`parts`: by name in the module, the parameter of the model and what of it that is."""
        self._now, self._parts, self._sketches, self._layout = now, parts, sketches, layout
        small = {local: name for local, (name, part) in parts.items() if not isinstance(part, MatrixParameter)}
        self._plain = ModuleTape(lambda: now()[0], {}, small, layout)

    def wants(self, name: str) -> bool:
        """See `Tape.wants`."""
        return name in self._parts

    def by_sample(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Tape.by_sample`."""
        return self._plain.by_sample(tensor)

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Tape.rows`."""
        return self._plain.rows(tensor)

    def outer(self, name: str, output: torch.Tensor, inputs: torch.Tensor) -> None:
        """See `Tape.outer`."""
        if self._sketches is not None:
            self._sketches.outer(name, output, inputs)
        if name not in self._parts or not output.requires_grad:
            return
        (records, held), axis, inputs = self._now(), self._layout.axis, inputs.detach()
        samples = records.samples

        def arrive(delta: torch.Tensor) -> None:
            def form(weight_B: torch.Tensor) -> torch.Tensor:
                shared = inputs.expand(delta.shape[0], *inputs.shape[1:]) if len(inputs) < len(delta) else inputs
                weight_n = held.rows(weight_B[samples], delta, axis)
                return _outer(delta.reshape(-1, delta.shape[-1]), shared.reshape(-1, shared.shape[-1]), weight_n)

            def of_sample(place: int) -> tuple[torch.Tensor, torch.Tensor]:
                shared = inputs.expand(delta.shape[0], *inputs.shape[1:]) if len(inputs) < len(delta) else inputs
                here = torch.arange(samples.start, samples.stop, device=delta.device)
                mine_n = torch.nonzero(held.rows(here, delta, axis) == place)[:, 0]
                return delta.reshape(-1, delta.shape[-1])[mine_n], shared.reshape(-1, shared.shape[-1])[mine_n]

            held.add(*self._parts[name], form, delta, inputs)
            held.add_pairs(*self._parts[name], of_sample)

        on_gradient(output, arrive)

    def lookup(self, name: str, output: torch.Tensor, row_BT: torch.Tensor, scale_BT: torch.Tensor) -> None:
        """See `Tape.lookup`."""
        if self._sketches is not None:
            self._sketches.lookup(name, output, row_BT, scale_BT)
        if name not in self._parts:
            return
        (records, held), axis = self._now(), self._layout.axis
        samples = records.samples
        parameter, part = self._parts[name]
        assert isinstance(part, MatrixParameter)

        def arrive(delta: torch.Tensor) -> None:
            def form(weight_B: torch.Tensor) -> torch.Tensor:
                weight_n = held.rows(weight_B[samples], delta, axis) * scale_BT.reshape(-1).to(weight_B.dtype)
                kept = torch.nonzero(weight_n)[:, 0]
                wide = _scalar(delta)
                rows_nI = delta.reshape(-1, delta.shape[-1])[kept].to(wide) * weight_n[kept, None].to(wide)
                out_VI = torch.zeros(part.outputs, part.inputs, dtype=wide, device=delta.device)
                return out_VI.index_add_(0, row_BT.reshape(-1)[kept], rows_nI)

            held.add(parameter, part, form, delta)

        on_gradient(output, arrive)

    def routed(self, name: str, output_nO: torch.Tensor, inputs_nI: torch.Tensor, token_n: torch.Tensor) -> None:
        """See `Tape.routed`."""
        if self._sketches is not None:
            self._sketches.routed(name, output_nO, inputs_nI, token_n)
        if name not in self._parts or not output_nO.requires_grad:
            return
        (records, held), inputs_nI = self._now(), inputs_nI.detach()
        samples = records.samples

        def arrive(delta_nO: torch.Tensor) -> None:
            def form(weight_B: torch.Tensor) -> torch.Tensor:
                return _outer(delta_nO, inputs_nI, held.tokens(weight_B[samples], token_n))

            def of_sample(place: int) -> tuple[torch.Tensor, torch.Tensor]:
                here = torch.arange(samples.start, samples.stop, device=delta_nO.device)
                mine_n = torch.nonzero(held.tokens(here, token_n) == place)[:, 0]
                return delta_nO[mine_n], inputs_nI[mine_n]

            held.add(*self._parts[name], form, delta_nO, inputs_nI)
            held.add_pairs(*self._parts[name], of_sample)

        on_gradient(output_nO, arrive)

    def small(self, name: str, output: torch.Tensor, gradient_Bn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """See `Tape.small`."""
        if self._sketches is not None:
            self._sketches.small(name, output, gradient_Bn)
        if name not in self._parts or not output.requires_grad:
            return
        (records, held), axis = self._now(), self._layout.axis
        samples = records.samples

        def arrive(delta: torch.Tensor) -> None:
            found_Bn = gradient_Bn(records.split(samples, delta, axis, zero=True).to(records.dtype))
            held.add(*self._parts[name], lambda weight_B: weight_B[samples].to(found_Bn) @ found_Bn, found_Bn)

        on_gradient(output, arrive)

    def each_sample(self, module: nn.Module, call: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `Tape.each_sample`; the copies are the sketches' too, under the same names."""
        return self._plain.each_sample(module, call, args, kwargs)

    def head(
        self,
        head: nn.Linear,
        hidden_tI: torch.Tensor,
        softmax_tV: torch.Tensor,
        labels_t: torch.Tensor,
        sample_t: torch.Tensor,
    ) -> None:
        """As `ModuleTape.head`; hidden states are held, and logits of the tokens that count made once more."""
        records, held = self._now()
        if self._sketches is not None:
            self._sketches.head(records, hidden_tI, softmax_tV, labels_t, sample_t)
        hidden_tI = hidden_tI.detach()

        def form(name: str) -> _Form:
            def made(weight_B: torch.Tensor) -> torch.Tensor:
                weight_t = weight_B[sample_t]
                kept = torch.nonzero(weight_t)[:, 0]
                return head_gradient(head, name, hidden_tI[kept], labels_t[kept], weight_t[kept])

            return made

        for name in ("weight", "bias"):
            if name in self._parts:
                held.add(*self._parts[name], form(name), hidden_tI)


def hold_leaves(records: Records, held: HeldBatch, parts: dict[str, Parameter]) -> None:
    """Hold what single samples gave to copies of small parameters of their own."""
    for name, samples, leaf in records.leaves:
        if leaf.grad is None or name not in parts:
            continue
        held.add(name, parts[name], _one_sample(leaf.grad.reshape(-1), samples.start), leaf.grad)


def _one_sample(gradient_n: torch.Tensor, sample: int) -> _Form:
    return lambda weight_B: gradient_n * weight_B[sample].to(gradient_n.dtype)
