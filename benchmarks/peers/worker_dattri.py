"""dattri's LoGra: its `HookManager` and compressors (`LoGraAttributor.cache` without the Hessian and the DataLoader).

As a user gets it (`tuned` false): every weight trainable, so that norms, embeddings and the head have their gradients formed too, and
compressors under torch.compile. Tuned: weights frozen, the graph kept by the embedding output.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from dattri.algorithm.block_projected_if.core.compressor import setup_model_compressors
from dattri.algorithm.block_projected_if.core.hook import HookManager
from peer_protocol import block_maps, load_model, load_samples, padded, serve, sum_loss


class Dattri:
    """LoGra on one model."""

    version = version("dattri")

    def __init__(self, request: dict[str, Any]) -> None:
        self.samples = load_samples(request)
        self.model = load_model(request)
        if request["tuned"]:
            self.model.requires_grad_(False)
            self.model.enable_input_require_grads()
        names = block_maps(self.model)
        kind = {"device": "cpu", "proj_max_batch_size": 64}
        compressors = setup_model_compressors(
            self.model,
            names,
            sparsifier_kwargs=kind | {"proj_dim": request["rank"], "proj_type": "normal"},
            projector_kwargs=kind | {"proj_dim": -1, "proj_type": "identity"},
            sample_inputs=[padded(self.samples, [0])[0]],  # type: ignore[arg-type]
            device="cpu",
        )
        self.hooks = HookManager(self.model, names, device="cpu")
        self.hooks.set_compressors(compressors)
        self.sites = names
        self.numbers = len(names) * request["rank"] ** 2

    def _batch(self, indices: list[int]) -> list[torch.Tensor]:
        self.model.zero_grad()
        ids_BT, labels_BT = padded(self.samples, indices)
        # Its compressors multiply by the number of samples: they expect the mean over samples.
        (sum_loss(self.model, ids_BT, labels_BT) / len(indices)).backward()
        return self.hooks.get_compressed_grads()

    def round(self, batches: list[list[int]]) -> dict[str, Any]:
        """Every batch, features side by side."""
        for indices in batches:
            torch.cat(self._batch(indices), dim=1)
        return {}

    def check(self, batches: list[list[int]], dense: str | None) -> dict[str, Any]:
        """Norms."""
        norms: dict[int, float] = {}
        for indices in batches:
            rows = torch.cat(self._batch(indices), dim=1).float()
            norms |= dict(zip(indices, rows.norm(dim=1).tolist()))
        return {"norms": norms}


if __name__ == "__main__":
    serve(Dattri)
