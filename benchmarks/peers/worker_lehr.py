"""Lehr's gradient engine, in the environment of Lehr; also compares dense gradients of a peer with its own sketches."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from peer_protocol import load_model, load_samples, serve

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from selection_ops.batching import Batch, collate
from selection_ops.encoding import Encoded
from selection_ops.engine import GradientEngine
from selection_ops.sites import find_sites


class Lehr:
    """The engine on one model."""

    version = "this tree"

    def __init__(self, request: dict[str, Any]) -> None:
        self.samples = load_samples(request)
        self.rank = request["rank"]
        self.model = load_model(request)
        self.engine = self._engine(2048)
        self.sites = list(self.engine.sites)
        self.numbers = len(self.sites) * self.rank**2

    def _engine(self, k: int) -> GradientEngine:
        return GradientEngine(self.model, find_sites(self.model).input_groups, proj_rank=self.rank, k=k, seed=0)

    def _collate(self, indices: list[int]) -> Batch:
        ids = [self.samples[index] for index in indices]
        return collate([Encoded(ids=item, loss_mask=[False] + [True] * (len(item) - 1)) for item in ids])

    def round(self, batches: list[list[int]]) -> dict[str, Any]:
        """Every batch."""
        with self.engine as engine:
            for indices in batches:
                engine.features(self._collate(indices))
        return {}

    def check(self, batches: list[list[int]], dense: str | None) -> dict[str, Any]:
        """Norms; with `dense`, how far a peer's gradients of the first sample, projected here, are from the sketch."""
        norms: dict[int, float] = {}
        with self.engine as engine:
            for indices in batches:
                norms |= dict(zip(indices, engine.features(self._collate(indices)).grad_norm_B.tolist()))
        if not dense:
            return {"norms": norms}
        from safetensors.torch import load_file

        whole = self._engine(0)
        with whole as engine:
            own = engine.features(self._collate(batches[0][:1])).sketch_BK[0]
        theirs = load_file(dense)
        base = self.model.base_model_prefix + "."
        parts = [whole.project_dense(name, theirs[name.removeprefix(base)]).flatten() for name in whole.sites]
        difference = sum(
            float((part - mine).square().sum()) for part, mine in zip(parts, own.split(self.rank**2), strict=True)
        )
        return {"norms": norms, "dense_error": (difference / float(own.square().sum())) ** 0.5}


if __name__ == "__main__":
    serve(Lehr)
