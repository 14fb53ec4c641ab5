"""Scoring samples: one model in one process, a list of samples in, feature columns and rejects out. No Beam, no files."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines.preconditioning import Side, load_preconditioner
from pipelines.scoring import ModelLocation
from schemas.errors import InputError
from schemas.run import Run
from schemas.sample import Reject, Sample
from schemas.spec import FeatureSpec
from selection_ops.batching import collate, is_out_of_memory, length_batches
from selection_ops.encoding import Encoded, Encoder
from selection_ops.engine import GradientEngine, SampleFeatures
from selection_ops.model import load_model, load_tokenizer, tokenizer_fingerprint
from selection_ops.packing import require_packing
from selection_ops.sampling import sampled_labels

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
    """Scored samples in the order they were given, without those that were rejected.

    `unit_NK` holds float32 rows of unit norm; `norm_N` their norms before scaling.
    """

    samples: tuple[Sample, ...]
    tokens_N: np.ndarray
    loss_tokens_N: np.ndarray
    loss_N: np.ndarray
    grad_norm_N: np.ndarray
    norm_N: np.ndarray
    unit_NK: np.ndarray
    rejects: tuple[Reject, ...]
    batch_halvings: int


def claim_device(name: str) -> torch.device:
    """A device for this worker process: the CPU, or one accelerator that no other worker called `name` here holds."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1:
        return torch.device("cuda", 0)
    import fcntl
    import tempfile

    for index in range(count):
        handle = os.open(os.path.join(tempfile.gettempdir(), f"lehr-{name}-cuda-{index}.lock"), os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            continue
        return torch.device("cuda", index)  # the lock lives as long as this process
    raise InputError(f"all {count} accelerators are taken by workers of this job; use --workers {count} or fewer")


class SampleScorer:
    """Scores samples of a corpus, or of a target, under one scoring. The model is loaded at the first use and kept."""

    def __init__(self, run: Run, scoring: str, location: ModelLocation, side: Side) -> None:
        self.spec = run.scoring(scoring)
        self._factors = run.path(run.preconditioner_path(scoring))
        self._side = side
        self._location = location
        self._encoder: Encoder | None = None
        self._engine: GradientEngine | None = None
        self._device = torch.device("cpu")

    @property
    def encoder(self) -> Encoder:
        """Encoder of the spec; needs the tokenizer alone."""
        if self._encoder is None:
            self._encoder = load_encoder(self.spec, self._location)
        return self._encoder

    def _loaded_engine(self) -> GradientEngine:
        if self._engine is None:
            self._device = claim_device(self.spec.fingerprint)
            if self._device.type == "cpu":
                # One thread a worker: the order of float additions, and so every byte, is independent of --workers.
                torch.set_num_threads(1)
            loaded = load_model(
                self._location.model,
                revision=self._location.revision,
                dtype=self.spec.dtype,
                attention=self.spec.attention,
                device=str(self._device),
            )
            if loaded.model_fingerprint != self.spec.model:
                raise InputError(
                    f"{self._location.model} has fingerprint {loaded.model_fingerprint}, "
                    f"but the scoring was declared with {self.spec.model}"
                )
            preconditioner = load_preconditioner(
                loaded.model,
                self.spec,
                self._side,
                factors=self._factors,
                optimizer_state=self._location.optimizer_state,
            )
            engine = GradientEngine.from_spec(loaded.model, self.spec, preconditioner)
            if self.spec.layout == "packed":
                require_packing(engine)  # here too: another device may bring another attention
            self._engine = engine
        return self._engine

    def sampled_labels(self, samples: Sequence[Sample], draws: int) -> list[list[list[int]]]:
        """Labels drawn from the model for every sample, [draws][samples][tokens]; a function of seed, sample id and draw."""
        model = self._loaded_engine().model
        found = [
            sampled_labels(
                model,
                self.encoder.encode(sample.text, sample.loss_spans),
                seed=self.spec.seed,
                sample_id=sample.sample_id,
                draws=draws,
            )
            for sample in samples
        ]
        return [[labels[draw] for labels in found] for draw in range(draws)]

    def score(
        self,
        samples: Sequence[Sample],
        on_tokens: Callable[[int], None] = lambda count: None,
        labels: Sequence[list[int]] | None = None,
    ) -> Scored:
        """Features of every sample, computed in length-sorted batches of bounded tokens; with `labels`, those of the loss at them."""
        encoded = [self.encoder.encode(sample.text, sample.loss_spans) for sample in samples]
        engine = self._loaded_engine()
        rows: list[tuple[float, int, float, np.ndarray] | None] = [None] * len(samples)
        rejects: dict[int, Reject] = {}
        halvings = 0
        queue = length_batches([len(item.ids) for item in encoded], self.spec.batch_tokens, self.spec.layout)
        queue.reverse()
        with engine:
            while queue:
                indices = queue.pop()
                try:
                    others = () if labels is None else ([labels[index] for index in indices],)
                    result = self._features(engine, [encoded[index] for index in indices], *others)
                except Exception as error:
                    if len(indices) > 1:
                        # Out of memory halves the batch; any other failure is narrowed down to the sample that causes it.
                        halvings += is_out_of_memory(error)
                        middle = len(indices) // 2
                        queue += [indices[middle:], indices[:middle]]
                        continue
                    reason = "out_of_memory" if is_out_of_memory(error) else "model_error"
                    rejects[indices[0]] = _reject(samples[indices[0]], reason, f"{type(error).__name__}: {error}"[:500])
                    continue
                found = [_row(result, position) for position in range(len(indices))]
                if self.spec.layout == "packed" and len(indices) > 1 and None in found:
                    # Attention multiplies what it masks by zero, and zero times NaN is NaN: alone it shows who brought it.
                    middle = len(indices) // 2
                    queue += [indices[middle:], indices[:middle]]
                    continue
                for index, row in zip(indices, found):
                    if row is None:
                        detail = "its loss or gradient is NaN, infinite or zero"
                        rejects[index] = _reject(samples[index], "non_finite", detail)
                    else:
                        rows[index] = row
                on_tokens(sum(len(encoded[index].ids) for index in indices))
        kept = [index for index, row in enumerate(rows) if row is not None]
        values: list[Any] = [rows[index] for index in kept]
        width = self.spec.sketch_size
        return Scored(
            samples=tuple(samples[index] for index in kept),
            tokens_N=np.array([len(encoded[index].ids) for index in kept], np.int32),
            loss_tokens_N=np.array([value[1] for value in values], np.int32),
            loss_N=np.array([value[0] for value in values], np.float32),
            grad_norm_N=np.array([value[2] for value in values], np.float32),
            norm_N=np.array([np.linalg.norm(value[3]) for value in values], np.float32),
            unit_NK=np.stack([value[3] / np.linalg.norm(value[3]) for value in values]).astype(np.float32)
            if values
            else np.zeros((0, width), np.float32),
            rejects=tuple(rejects[index] for index in sorted(rejects)),
            batch_halvings=halvings,
        )

    def _features(
        self, engine: GradientEngine, batch: list[Encoded], labels: list[list[int]] | None = None
    ) -> SampleFeatures:
        try:
            return engine.features(collate(batch, device=self._device, labels=labels, layout=self.spec.layout))
        finally:
            if (
                self._device.type == "cuda"
                and torch.cuda.memory_reserved() > 0.95 * torch.cuda.get_device_properties(0).total_memory
            ):
                torch.cuda.empty_cache()


def load_encoder(spec: FeatureSpec, location: ModelLocation) -> Encoder:
    """Encoder of a spec. Raises `InputError` where the tokenizer is not the one the spec names."""
    tokenizer = load_tokenizer(location.model, revision=location.revision)
    found = tokenizer_fingerprint(location.model, revision=location.revision)
    if found != spec.tokenizer:
        raise InputError(
            f"the tokenizer at {location.model} has fingerprint {found}, but the scoring was declared with {spec.tokenizer}"
        )
    return Encoder(tokenizer, spec.encoding)


def _row(result: SampleFeatures, position: int) -> tuple[float, int, float, np.ndarray] | None:
    loss = float(result.loss_B[position])
    norm = float(result.grad_norm_B[position])
    sketch = result.sketch_BK[position].double().cpu().numpy()
    size = float(np.linalg.norm(sketch))
    if not (np.isfinite(loss) and np.isfinite(norm) and np.isfinite(size) and size > 0):
        return None
    return loss, int(result.loss_tokens_B[position]), norm, sketch


def _reject(sample: Sample, reason: str, detail: str) -> Reject:
    return Reject(
        path=sample.path,
        row=sample.row,
        window=sample.window,
        stage="score",
        reason=reason,
        detail=detail,
        preview=sample.preview,
    )


def sample_columns(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """The columns of a table that say which sample a row is."""
    names = (
        "sample_id",
        "content_id",
        "source_id",
        "path",
        "row",
        "window",
        "char_start",
        "char_end",
        "domain",
        "extra",
        "preview",
    )
    return {name: [getattr(sample, name) for sample in samples] for name in names}


def scored_columns(scored: Scored, schema: pa.Schema) -> dict[str, Any]:
    """Place, measures and sketch of scored samples as Arrow-ready columns of `schema`."""
    vector = schema.field("sketch").type
    values = scored.unit_NK.astype(np.float16 if pa.types.is_float16(vector.value_type) else np.float32).reshape(-1)
    return {
        **sample_columns(scored.samples),
        "tokens": scored.tokens_N,
        "loss_tokens": scored.loss_tokens_N,
        "loss": scored.loss_N,
        "grad_norm": scored.grad_norm_N,
        "sketch_norm": scored.norm_N,
        "sketch": pa.FixedSizeListArray.from_arrays(pa.array(values), type=vector),
    }
