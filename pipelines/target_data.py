"""The samples of a target: read, encoded, swapped for a contrast, and compared with the evaluation set."""

from __future__ import annotations

import dataclasses

from pipelines.options import TargetOptions
from pipelines.plan import corpus_files
from pipelines.readers import file_format, get_reader
from schemas.errors import InputError
from schemas.ids import content_id, sample_id
from schemas.sample import Reject, Row, Sample
from schemas.spec import CorpusColumns, PlanSpec
from selection_ops.encoding import Encoder
from selection_ops.overlap import OVERLAP_LIMIT, OverlapIndex


def read_parts(
    name: str, options: TargetOptions, encoder: Encoder
) -> tuple[dict[str, tuple[Sample, ...]], list[Reject]]:
    """Samples by part (reference, evaluation, swapped), and what could not be used. Raises `InputError` for a part without samples."""
    parts: dict[str, tuple[Sample, ...]] = {}
    rejects: list[Reject] = []
    for part, source in (("reference", options.data), ("evaluation", options.eval)):
        if source:
            samples, refused = read_samples(f"{name}/{part}", source, options.columns, encoder)
            if not samples:
                reasons = "; ".join(f"{r.path} row {r.row}: {r.reason} {r.detail}".strip() for r in refused[:3])
                raise InputError(f"{source}: no usable sample for the target ({reasons or 'it has no rows'})")
            parts[part] = samples
            rejects += refused
    if options.contrast == "swap":
        parts["swapped"] = swap_completions(f"{name}/swapped", parts["reference"])
    return parts, rejects


def read_samples(
    corpus: str, source: str, columns: CorpusColumns, encoder: Encoder
) -> tuple[tuple[Sample, ...], list[Reject]]:
    """Samples of a file, folder or glob, cut and encoded as those of a corpus, and what could not be used."""
    spec = PlanSpec(corpus=corpus, columns=columns)
    root, files = corpus_files(source)
    samples: list[Sample] = []
    rejects: list[Reject] = []
    for path in files:
        reader = get_reader(file_format(path, spec))
        for unit in reader.scan(root, path, spec):
            for item in reader.rows(root, unit, spec):
                made_all = encoder.samples(item, corpus) if isinstance(item, Row) else [item]
                for made in made_all:
                    if isinstance(made, Sample):
                        samples.append(made)
                    else:
                        rejects.append(made)
    return tuple(samples), rejects


def swap_completions(corpus: str, samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
    """Every sample's text up to its first loss span, followed by what the next sample (cyclically) carries loss on.

    Raises `InputError` where a sample has no prompt before its loss span, or where there are fewer than two samples.
    """
    if len(samples) < 2:
        raise InputError("a swapped contrast needs at least two target samples")
    swapped = []
    for index, sample in enumerate(samples):
        other = samples[(index + 1) % len(samples)]
        start = sample.loss_spans[0][0]
        if start == 0:
            raise InputError(
                f"{sample.path} row {sample.row}: a swapped contrast exchanges answers, and this sample has no prompt; "
                "name --prompt-column and --completion-column"
            )
        answer = other.text[other.loss_spans[0][0] : other.loss_spans[-1][1]]
        text = sample.text[:start] + answer
        spans = ((start, len(text)),)
        swapped.append(
            dataclasses.replace(
                sample,
                text=text,
                loss_spans=spans,
                char_end=sample.char_start + len(text),
                content_id=content_id(text, spans),
                sample_id=sample_id(corpus, sample.path, sample.row, sample.window),
            )
        )
    return tuple(swapped)


def refuse_overlap(parts: dict[str, tuple[Sample, ...]]) -> None:
    """Raise `InputError` where evaluation samples overlap the reference ones."""
    if "evaluation" not in parts:
        return
    index = OverlapIndex({"reference": parts["reference"]})
    found = [(share, sample) for sample in parts["evaluation"] if (share := index.overlap(sample)[0]) > OVERLAP_LIMIT]
    if found:
        share, sample = max(found, key=lambda pair: pair[0])
        raise InputError(
            f"{len(found)} of {len(parts['evaluation'])} evaluation samples overlap the target, "
            f"worst {sample.path} row {sample.row} ({share:.0%} of its masked 8-grams: {sample.preview[:60]!r}). "
            "A held-out loss on them would measure memory: remove them from one of the two files"
        )
