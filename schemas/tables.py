"""The Arrow schema of every table Lehr writes, with a doc and a unit for every field."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa

from schemas.errors import InputError

SCHEMA_VERSION = 1


def _field(name: str, kind: pa.DataType, doc: str, unit: str = "", nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"doc": doc, "unit": unit})


def _vector(name: str, kind: pa.DataType, size: int, doc: str) -> pa.Field:
    return _field(name, pa.list_(pa.field("element", kind, nullable=False), size), doc, "1")


_PLACE = [
    _field("sample_id", pa.string(), "unique id: hash of corpus, path, row and window", "128-bit hex"),
    _field("content_id", pa.string(), "hash of text and loss spans; equal for exact duplicates", "128-bit hex"),
    _field("source_id", pa.string(), "the corpus's own identifier, empty where it has none"),
    _field("path", pa.string(), "corpus file, relative to the corpus root"),
    _field("row", pa.int64(), "position of the row in the file, from 0", "rows"),
    _field("window", pa.int32(), "position of the window in the document, from 0", "windows"),
    _field("char_start", pa.int64(), "start of the window in the rendered row", "characters"),
    _field("char_end", pa.int64(), "end of the window in the rendered row", "characters"),
    _field("domain", pa.string(), "domain of the row, empty where the corpus names none"),
    _field("extra", pa.string(), "carried columns, as a JSON object"),
    _field("preview", pa.string(), "the first characters of the text"),
]
_MEASURES = [
    _field("tokens", pa.int32(), "length of the sample; what a token budget counts", "tokens"),
    _field("loss_tokens", pa.int32(), "tokens that carry loss", "tokens"),
    _field(
        "loss",
        pa.float32(),
        "loss of the sample, summed over its loss tokens (or their mean, as the spec says)",
        "nats",
    ),
    _field(
        "grad_norm",
        pa.float32(),
        "norm of the unfolded projected gradient: an unbiased estimate of the gradient norm",
        "nats per parameter unit",
    ),
    _field(
        "sketch_norm", pa.float32(), "norm of the sketch before it was scaled to unit norm", "nats per parameter unit"
    ),
]
_GEOMETRY = [
    _field("alignment", pa.float32(), "cosine of the sketch and the mean target gradient", "1"),
    _field(
        "influence",
        pa.float32(),
        "z' (C + delta I)^-1 g of the unit-norm sketch z, C the centred Fisher, g the mean target gradient",
        "1",
    ),
    _field("quad", pa.float32(), "z' (C + delta I)^-1 z of the unit-norm sketch z", "1"),
    _field(
        "stiff_cost",
        pa.float32(),
        "sum over stiff directions of eigenvalue * k * <z, v>^2 of the unit-norm sketch; centred Fisher",
        "1",
    ),
    _field("flat_energy", pa.float32(), "share of the unit-norm sketch in flat directions; centred Fisher", "1"),
    _field("null_energy", pa.float32(), "share of the unit-norm sketch in null directions; centred Fisher", "1"),
    _field(
        "stiff_cost_empirical",
        pa.float32(),
        "stiff cost under the uncentred empirical Fisher, as DiReCT was published",
        "1",
    ),
]
_OVERLAP = [
    _field(
        "overlap",
        pa.float32(),
        "largest share of number-masked 8-grams shared with the reference or the evaluation samples; 1 for equal content_id",
        "1",
    ),
    _field("overlap_with", pa.string(), "which part of the target it overlaps: reference, evaluation, both, or empty"),
    _field("overlapping", pa.bool_(), "whether the overlap is over the limit, so that select leaves the sample out"),
]


def _plan() -> pa.Schema:
    return pa.schema(
        [
            _field("unit_id", pa.string(), "hash of path, range, source fingerprint and columns", "128-bit hex"),
            _field("path", pa.string(), "corpus file, relative to the corpus root"),
            _field("format", pa.string(), "parquet, jsonl or webdataset"),
            _field("byte_start", pa.int64(), "first byte of the range (0 for Parquet: the range is in rows)", "bytes"),
            _field("byte_end", pa.int64(), "end of the range, exclusive (file size for Parquet)", "bytes"),
            _field("row_start", pa.int64(), "first row of the range", "rows"),
            _field("row_count", pa.int64(), "rows in the range, unreadable ones included", "rows"),
            _field(
                "source_fingerprint",
                pa.string(),
                "hash of the bytes of the range (of size and footer for Parquet)",
                "128-bit hex",
            ),
            _field("estimated_tokens", pa.int64(), "tokens expected in the range", "tokens"),
        ]
    )


def _features(k: int) -> pa.Schema:
    return pa.schema(
        [*_PLACE, *_MEASURES, _vector("sketch", pa.float16(), k, "low-rank projected per-sample gradient, unit norm")]
    )


def _rejects() -> pa.Schema:
    return pa.schema(
        [
            _field("path", pa.string(), "corpus file, relative to the corpus root"),
            _field("row", pa.int64(), "position of the row in the file, from 0", "rows"),
            _field("window", pa.int32(), "window of the row, 0 where it was never cut", "windows"),
            _field("stage", pa.string(), "where it failed: read, encode or score"),
            _field("reason", pa.string(), "why, as one of a few words"),
            _field("detail", pa.string(), "what exactly was wrong"),
            _field("preview", pa.string(), "the first characters, where there were any"),
        ]
    )


def _curvature() -> pa.Schema:
    return pa.schema([_PLACE[0], *_GEOMETRY, *_OVERLAP])


def _target_samples(k: int) -> pa.Schema:
    return pa.schema(
        [
            _field(
                "part",
                pa.string(),
                "reference (defines the target), evaluation (held out) or swapped (reference with answers exchanged)",
            ),
            *_PLACE,
            _field("text", pa.string(), "the sample's text"),
            _field("loss_spans", pa.string(), "character spans that carry loss, as a JSON list of [start, end]"),
            *_MEASURES,
            _vector("sketch", pa.float32(), k, "low-rank projected per-sample gradient, unit norm"),
        ]
    )


def _preconditioner() -> pa.Schema:
    factor = pa.list_(pa.field("element", pa.float32(), nullable=False))
    return pa.schema(
        [
            _field(
                "name",
                pa.string(),
                "site; on the side `in` the input group, or the site where it has a factor of its own",
            ),
            _field(
                "side",
                pa.string(),
                "out (rows of a matrix gradient), in (its columns) or small (all of a small parameter)",
            ),
            _field(
                "correlation",
                pa.float64(),
                "Pearson correlation of the rank-one fit and the exact preconditioner over the entries of the site; null but for out",
                "1",
                nullable=True,
            ),
            _field("factor", factor, "what rows, columns or numbers of a gradient are multiplied by", "1"),
        ]
    )


def _spectrum(k: int) -> pa.Schema:
    return pa.schema(
        [
            _field("fisher", pa.string(), "centred, empirical or gauss-newton"),
            _field("index", pa.int32(), "position in descending order of eigenvalue, from 0"),
            _field("eigenvalue", pa.float64(), "eigenvalue of the target's sketched curvature", "nats^2"),
            _field("part", pa.string(), "stiff (before the elbow) or flat (after it); null directions are not listed"),
            _field("cumulative_energy", pa.float64(), "share of the trace up to and including this eigenvalue", "1"),
            _field("mean_share", pa.float64(), "share of the squared mean target gradient along this direction", "1"),
            _vector("vector", pa.float32(), k, "eigenvector"),
        ]
    )


def _selection() -> pa.Schema:
    optional = [field.with_nullable(True) for field in (*_GEOMETRY, *_OVERLAP)]
    return pa.schema(
        [
            *_PLACE,
            *_MEASURES,
            *optional,
            _field("rank", pa.int64(), "position in the selection, 0 = best; null where not selected", nullable=True),
            _field("selected", pa.bool_(), "whether the sample is in the selection"),
            _field("selection_weight", pa.float32(), "factor on the sample's loss; 0 where not selected", "1"),
            _field(
                "score",
                pa.float64(),
                "what the selector ranked by; null where it could not be computed",
                "see solution.json",
                nullable=True,
            ),
            _field("scores", pa.map_(pa.string(), pa.float64()), "everything else that decided, by name"),
            _field("reason", pa.string(), "selected, or why not"),
        ]
    )


def _steps() -> pa.Schema:
    number = pa.float64()
    return pa.schema(
        [
            _field("step", pa.int64(), "optimizer step, from 1", "steps"),
            _field("generation", pa.int64(), "generation of the stream trained on; of the first in a mix"),
            _field("policy", pa.string(), "policy asked for"),
            _field("metric", pa.string(), "metric that acted (sgd during warm-up), empty where none"),
            _field("mode", pa.string(), "plain, two-pass or one-pass: what the step really did"),
            _field("offered", pa.int32(), "candidates offered", "samples"),
            _field("kept", pa.int32(), "candidates trained on", "samples"),
            _field("offered_tokens", pa.int64(), "tokens of the candidates offered", "tokens"),
            _field("trained_tokens", pa.int64(), "tokens of the candidates kept", "tokens"),
            _field("total_offered_tokens", pa.int64(), "offered tokens since the start", "tokens"),
            _field("total_trained_tokens", pa.int64(), "trained tokens since the start", "tokens"),
            _field("loss", number, "step loss before the update", "nats per token"),
            _field("target_loss", number, "loss of the step's target batch before the update", "nats per token", True),
            _field("eval_loss", number, "loss on the evaluation set after the update", "nats per token", True),
            _field("learning_rate", number, "learning rate of the step", "1"),
            _field("grad_norm", number, "norm of the weighted gradient before clipping", "nats per parameter unit"),
            _field("grad_norm_l1", number, "sum of absolute values of that gradient", "nats per parameter unit", True),
            _field("clip_factor", number, "factor that clipping applied", "1"),
            _field("weight_sum", number, "sum of step weights", "1"),
            _field("effective_sample_size", number, "(sum w)^2 / sum w^2", "samples"),
            _field("alpha", number, "uniform coefficient of the line search", "1", True),
            _field("interaction_to_alignment", number, "|w'Kw / 2| over |b'w|", "1", True),
            _field("matching_error", number, "1 - captured share of the target's drop, see trainer docs", "1", True),
            _field(
                "update_target_cosine",
                number,
                "cosine of the weighted gradient and the metric's target direction, on sketches",
                "1",
                True,
            ),
            _field(
                "oracle_drop",
                number,
                "drop of the target batch's loss after one optimizer step on the kept, tried out from the same state",
                "nats per token",
                True,
            ),
            _field(
                "oracle_random_drop", number, "the same, mean over random choices of as many", "nats per token", True
            ),
            _field(
                "oracle_beaten",
                number,
                "share of those whose drop is smaller than that of the kept; ties half",
                "1",
                True,
            ),
            _field(
                "oracle_correlation",
                number,
                "rank correlation of b'w - w'Kw / 2 and the real drop, over the kept and the random choices",
                "1",
                True,
            ),
            _field("fallback", pa.string(), "which fallback acted, empty where none"),
            _field("padding_share", number, "padding among the tokens computed", "1"),
        ]
    )


def _decisions() -> pa.Schema:
    number = pa.float64()
    return pa.schema(
        [
            _field("step", pa.int64(), "optimizer step, from 1", "steps"),
            _field("position", pa.int64(), "position in the order of the stream, from 0", "samples"),
            _field("stream", pa.string(), "stream it comes from: the name or URL given"),
            _field("generation", pa.int64(), "generation of that stream"),
            _field("sample_id", pa.string(), "sample offered", "128-bit hex"),
            _field("rank", pa.int64(), "rank in the stream"),
            _field("tokens", pa.int32(), "length of the sample", "tokens"),
            _field("loss_tokens", pa.int32(), "tokens that carry loss", "tokens"),
            _field("loss", number, "loss of the sample before the update", "nats", True),
            _field("alignment", number, "b_j of the metric", "metric units", True),
            _field("self_interaction", number, "K_jj of the metric", "metric units", True),
            _field("score", number, "filter score at the moment of choice", "metric units", True),
            _field("kept", pa.bool_(), "whether the sample was trained on"),
            _field("step_weight", number, "factor on its loss; mean 1 over the kept, 0 where not kept", "1"),
            _field("masked_tokens", pa.int32(), "loss tokens of a kept sample that were not trained on", "tokens"),
            _field("reason", pa.string(), "why it was kept or left"),
        ]
    )


def _timings() -> pa.Schema:
    return pa.schema(
        [
            _field("step", pa.int64(), "optimizer step, from 1", "steps"),
            _field("seconds", pa.float64(), "wall time of the step, with the evaluation that followed it", "seconds"),
            _field("cpu_seconds", pa.float64(), "processor time of the same", "seconds"),
            _field("selection_seconds", pa.float64(), "wall time of choosing and weighting", "seconds"),
            _field("oracle_seconds", pa.float64(), "wall time of the one-step oracle", "seconds"),
            _field("evaluation_seconds", pa.float64(), "wall time of the evaluation on the held-out set", "seconds"),
            _field(
                "flops",
                pa.float64(),
                "operations of the step by formula, of all processes together: 6 per parameter and trained token, 4 per scored one, and attention; without evaluation",
                "floating point operations",
            ),
            _field(
                "selection_flops",
                pa.float64(),
                "of flops, what training on the kept samples alone would not have taken",
                "floating point operations",
            ),
            _field(
                "mfu",
                pa.float64(),
                "flops over seconds without evaluation, as a share of the peak given or measured",
                "1",
                True,
            ),
            _field(
                "peak_memory",
                pa.int64(),
                "most memory in use so far: allocated on an accelerator, resident of the whole process on a CPU",
                "bytes",
            ),
            _field("host", pa.string(), "machine"),
            _field("process", pa.int32(), "torchrun process"),
        ]
    )


def _arm_trainings() -> pa.Schema:
    number = pa.float64()
    return pa.schema(
        [
            _field("arm", pa.string(), "arm: stream, policy and what it changes"),
            _field("seed", pa.int64(), "seed of the training", "1"),
            _field("training", pa.string(), "name of the training"),
            _field("eval_loss", number, "held-out loss of the final model", "nats per token"),
            _field("guard_loss", number, "loss of the final model on the guard set", "nats per token", True),
            _field(
                "trained_tokens", pa.int64(), "tokens trained on; below the budget by less than one sample", "tokens"
            ),
            _field("offered_tokens", pa.int64(), "tokens offered", "tokens"),
            _field("steps", pa.int64(), "optimizer steps", "steps"),
            _field("flops", number, "operations of all steps, by formula", "floating point operations", True),
            _field("selection_flops", number, "of flops, what choosing added", "floating point operations", True),
        ]
    )


def _arms() -> pa.Schema:
    number = pa.float64()

    def ends(name: str, of: str) -> list[pa.Field]:
        return [
            _field(f"{name}_low", number, f"lower end of the interval of {of}", "nats per token", True),
            _field(f"{name}_high", number, f"upper end of the interval of {of}", "nats per token", True),
        ]

    return pa.schema(
        [
            _field("arm", pa.string(), "arm: stream, policy and what it changes"),
            _field("control", pa.bool_(), "whether the others are compared with it"),
            _field("seeds", pa.int32(), "seeds that it was trained under", "1"),
            _field("eval_loss", number, "mean held-out loss of the final models", "nats per token"),
            _field(
                "difference", number, "mean over seeds of held-out loss minus the control's", "nats per token", True
            ),
            *ends("difference", "the difference, as the verdict takes it"),
            *ends("bootstrap", "the difference, by resampled seeds (percentile)"),
            _field("guard_loss", number, "mean loss of the final models on the guard set", "nats per token", True),
            _field(
                "guard_difference", number, "mean over seeds of guard loss minus the control's", "nats per token", True
            ),
            *ends("guard", "the difference on the guard set"),
            _field("least_tokens", pa.int64(), "trained tokens of the training that has fewest", "tokens"),
            _field("most_tokens", pa.int64(), "trained tokens of the training that has most", "tokens"),
            _field("flops", number, "operations of a training, mean over seeds", "floating point operations", True),
            _field(
                "selection_flops",
                number,
                "of flops, what choosing at every step added",
                "floating point operations",
                True,
            ),
            _field(
                "offline_flops",
                number,
                "operations of the scoring that the stream was selected by, once for all trainings; 0 for a random selection, null "
                "where the run does not say",
                "floating point operations",
                True,
            ),
            _field("verdict", pa.string(), "adopt, reject or inconclusive; empty for the control"),
            _field("reason", pa.string(), "what of the rule decided the verdict"),
        ]
    )


_FIXED: dict[str, Callable[[], pa.Schema]] = {
    "plan": _plan,
    "rejects": _rejects,
    "curvature": _curvature,
    "preconditioner": _preconditioner,
    "selection": _selection,
    "steps": _steps,
    "decisions": _decisions,
    "timings": _timings,
    "arms": _arms,
    "arm_trainings": _arm_trainings,
}
_SKETCHED: dict[str, Callable[[int], pa.Schema]] = {
    "features": _features,
    "target_samples": _target_samples,
    "spectrum": _spectrum,
}
GEOMETRY_COLUMNS = tuple(field.name for field in _GEOMETRY)
OVERLAP_COLUMNS = tuple(field.name for field in _OVERLAP)
PLACE_COLUMNS = tuple(field.name for field in _PLACE)
MEASURE_COLUMNS = tuple(field.name for field in _MEASURES)


def schema_names() -> list[str]:
    """Every table there is."""
    return sorted([*_FIXED, *_SKETCHED])


def table_schema(name: str, k: int = 0) -> pa.Schema:
    """Arrow schema of table `name`; `k` is the sketch dimension, needed by the tables that hold sketches."""
    if name in _FIXED:
        return _FIXED[name]()
    if name not in _SKETCHED:
        raise InputError(f"unknown schema {name!r}: choose one of {', '.join(schema_names())}")
    if k <= 0:
        raise InputError(f"schema {name!r} needs the sketch dimension k")
    return _SKETCHED[name](k)


def describe_fields(name: str) -> list[tuple[str, str, str, bool, str]]:
    """(field, type, unit, nullable, doc) of every field of table `name`, for people; sketch length is shown as k."""
    marker = 7_919
    schema = table_schema(name, marker) if name in _SKETCHED else table_schema(name)
    return [
        (
            f.name,
            str(f.type).replace(str(marker), "k"),
            f.metadata[b"unit"].decode(),
            f.nullable,
            f.metadata[b"doc"].decode(),
        )
        for f in schema
    ]
