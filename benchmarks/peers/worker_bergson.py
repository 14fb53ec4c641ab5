"""bergson's own collection loop (`CollectorComputer.run_with_collector_hooks`) without the index on disk and the progress bar.

The model is prepared as its `build` does it (weights frozen, input embeddings trainable, so that the graph reaches the blocks), the
collector, the loss and the padding are bergson's.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from typing import Any

import torch
from bergson.collector.collector import fwd_bwd_factory
from bergson.collector.gradient_collectors import GradientCollector
from bergson.config import IndexConfig
from bergson.data import pad_and_tensor
from bergson.gradients import GradientProcessor
from datasets import Dataset
from peer_protocol import load_model, load_samples, serve


class Bergson:
    """bergson on one model."""

    version = version("bergson")

    def __init__(self, request: dict[str, Any]) -> None:
        self.samples = load_samples(request)
        self.model = load_model(request)
        self.model.requires_grad_(False)
        self.model.get_input_embeddings().requires_grad_(True)
        self.cfg = IndexConfig(run_path=tempfile.mkdtemp(), projection_dim=request["rank"], loss_reduction="sum")
        self.forward_backward = fwd_bwd_factory(self.cfg)
        self.collector = self._collector(request["rank"])
        self.sites = list(self.collector.target_info)
        self.numbers = sum(shape.numel() for shape in self.collector.shapes().values())

    def _collector(self, rank: int | None) -> GradientCollector:
        return GradientCollector(
            model=self.model.base_model,
            cfg=self.cfg,
            processor=GradientProcessor(projection_dim=rank),
            data=Dataset.from_dict({"input_ids": self.samples}),
            skip_index=True,
        )

    def _batch(self, collector: GradientCollector, indices: list[int]) -> torch.Tensor:
        """Losses; the gradients stand in `collector.mod_grads`."""
        x, y, _, mask = pad_and_tensor(
            [self.samples[index] for index in indices], device=torch.device("cpu"), sync_max_len=False
        )
        with collector.with_batch(mask):
            return self.forward_backward(self.model, x, y, {})

    def round(self, batches: list[list[int]]) -> dict[str, Any]:
        """Every batch."""
        for indices in batches:
            self.collector.process_batch(indices, losses=self._batch(self.collector, indices))
        return {}

    def check(self, batches: list[list[int]], dense: str | None) -> dict[str, Any]:
        """Norms; with `dense`, the unprojected gradients of the first sample."""
        norms: dict[int, float] = {}
        for indices in batches:
            self._batch(self.collector, indices)
            rows = torch.cat([self.collector.mod_grads[name].float() for name in self.sites], dim=1)
            norms |= dict(zip(indices, rows.norm(dim=1).tolist()))
            self.collector.mod_grads.clear()
        if dense:
            from safetensors.torch import save_file

            whole = self._collector(None)
            self._batch(whole, batches[0][:1])
            tensors = {name: whole.mod_grads[name][0].reshape(whole.shapes()[name]).contiguous() for name in self.sites}
            save_file(tensors, dense)
        return {"norms": norms}


if __name__ == "__main__":
    serve(Bergson)
