"""The sketch of DiReCT (arXiv 2605.31175): z = R g, entries of R from N(0, 1/k), R drawn again for every sample.

Written from the formula; none of the reference's code. The gradient is one forward and backward per sample; the projection is measured on
one chunk of the gradient's entries and extrapolated to all of them (`tuned` changes nothing here but the arithmetic of the model).
"""

from __future__ import annotations

import time
from typing import Any

import torch
from peer_protocol import block_maps, load_model, load_samples, padded, serve, sum_loss

DIMENSION = 2048
SLICE = 1 << 16


class Dense:
    """Dense Gaussian sketches of one model."""

    version = "from the formula"

    def __init__(self, request: dict[str, Any]) -> None:
        self.samples = load_samples(request)
        self.model = load_model(request)
        self.sites = block_maps(self.model)
        self.model.requires_grad_(False)
        self.weights = [self.model.get_submodule(name).weight.requires_grad_() for name in self.sites]
        self.parameters = sum(weight.numel() for weight in self.weights)
        self.numbers = DIMENSION

    def _gradient(self, index: int) -> torch.Tensor:
        loss = sum_loss(self.model, *padded(self.samples, [index]))
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, self.weights)])

    def round(self, batches: list[list[int]]) -> dict[str, Any]:
        """One sample after the other; projection on a slice."""
        gradients = projection = 0.0
        for index in [index for indices in batches for index in indices]:
            started = time.process_time()
            gradient_S = self._gradient(index)
            between = time.process_time()
            generator = torch.Generator().manual_seed(0)
            matrix_KS = torch.randn(DIMENSION, SLICE, generator=generator) / DIMENSION**0.5
            matrix_KS @ gradient_S[:SLICE].float()
            gradients += between - started
            projection += time.process_time() - between
        factor = self.parameters / SLICE
        return {
            "cpu_s": gradients + projection * factor,
            "gradients_s": gradients,
            "projection_slice_s": projection,
            "extrapolated": factor,
        }

    def check(self, batches: list[list[int]], dense: str | None) -> dict[str, Any]:
        """Norms of the gradients before projection."""
        order = [index for indices in batches for index in indices]
        return {"norms": {index: float(self._gradient(index).norm()) for index in order}}


if __name__ == "__main__":
    serve(Dense)
