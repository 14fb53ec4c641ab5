"""TRAK: per-sample gradients of its `FunctionalGradientComputer` (vmap), then its `BasicProjector`, the one that runs without CUDA.

Its matrix (parameters x 2,048 normals) is drawn again for every batch, which takes minutes: the projection is measured on a slice of the
gradient and two of its blocks of columns, and extrapolated to all of both. `tuned` false: float16 projection, TRAK's default; true:
float32, for which normals are drawn faster.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import torch
from peer_protocol import block_maps, load_model, load_samples, padded, serve
from trak.gradient_computers import FunctionalGradientComputer
from trak.modelout_functions import AbstractModelOutput
from trak.projectors import BasicProjector

DIMENSION = 2048
SLICE = 1 << 20
COLUMNS = 200


class _SumLoss(AbstractModelOutput):
    """Sum of the token losses of one sample."""

    @staticmethod
    def get_output(model: Any, weights: Any, buffers: Any, ids_T: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
        """For vmap."""
        logits_TV = torch.func.functional_call(
            model, (weights, buffers), args=(), kwargs={"input_ids": ids_T[None], "use_cache": False}
        ).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits_TV.float(), labels_T[1:], ignore_index=-100, reduction="sum")

    def get_out_to_loss_grad(self, *unused: Any) -> torch.Tensor:
        """Not needed for features."""
        raise NotImplementedError


class Trak:
    """TRAK's features of one model."""

    version = version("traker")

    def __init__(self, request: dict[str, Any]) -> None:
        self.samples = load_samples(request)
        self.model = load_model(request)
        self.sites = block_maps(self.model)
        names = [f"{name}.weight" for name in self.sites]
        self.parameters = sum(self.model.get_parameter(name).numel() for name in names)
        self.numbers = DIMENSION
        self.gradients = FunctionalGradientComputer(
            self.model, _SumLoss, self.parameters, torch.float32, torch.device("cpu"), grad_wrt=names
        )
        self.projector = BasicProjector(
            SLICE,
            COLUMNS,
            seed=0,
            proj_type="normal",  # type: ignore[arg-type]
            device=torch.device("cpu"),
            dtype=torch.float32 if request["tuned"] else torch.float16,
        )

    def round(self, batches: list[list[int]]) -> dict[str, Any]:
        """Gradients measured whole; projection on a slice."""
        gradients = projection = 0.0
        for indices in batches:
            started = time.process_time()
            gradient_BS = torch.cat(
                [
                    part.flatten(1)
                    for part in self.gradients.compute_per_sample_grad(padded(self.samples, indices)).values()
                ],
                dim=1,
            )
            between = time.process_time()
            self.projector.project(gradient_BS[:, :SLICE].contiguous(), model_id=0)
            gradients += between - started
            projection += time.process_time() - between
        whole = projection * (self.parameters / SLICE) * (DIMENSION / COLUMNS)
        return {
            "cpu_s": gradients + whole,
            "gradients_s": gradients,
            "projection_slice_s": projection,
            "extrapolated": self.parameters / SLICE * DIMENSION / COLUMNS,
        }

    def check(self, batches: list[list[int]], dense: str | None) -> dict[str, Any]:
        """Norms of the gradients before projection."""
        norms: dict[int, float] = {}
        for indices in batches:
            parts = self.gradients.compute_per_sample_grad(padded(self.samples, indices)).values()
            square_B = sum(part.flatten(1).square().sum(1) for part in parts)
            norms |= dict(zip(indices, torch.as_tensor(square_B).sqrt().tolist()))
        return {"norms": norms}


if __name__ == "__main__":
    serve(Trak)
