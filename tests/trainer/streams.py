"""Small ranked streams written through `schemas` alone, and runs that hold them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from schemas.fingerprint import plain
from schemas.ids import content_id, sample_id
from schemas.manifest import Manifest, write_manifest
from schemas.run import Run
from schemas.sample import Sample
from schemas.shards import RankedSample, ShardEntry, StreamIndex, encode_record, encode_shard, index_bytes
from schemas.spec import EncodingSpec
from schemas.storage import write_whole
from selection_ops.encoding import Encoder
from selection_ops.model import tokenizer_fingerprint
from tests.tiny import save_tiny_model, tiny_tokenizer

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "glass",
    "is",
    "heated",
    "annealed",
    "and",
    "slowly",
    "cooled",
    "in",
    "lehr",
]
ENCODING = EncodingSpec(max_tokens=64, min_tokens=2, append_eos="never")


def sample(name: str, row: int, text: str, start: int = 0) -> Sample:
    """A text sample with loss from character `start` on."""
    spans = ((start, len(text)),)
    return Sample(
        sample_id=sample_id(name, "f.jsonl", row, 0),
        content_id=content_id(text, spans),
        path="f.jsonl",
        row=row,
        window=0,
        char_start=0,
        char_end=len(text),
        text=text,
        loss_spans=spans,
        domain=("math", "code")[row % 2],
    )


def texts(count: int, *, seed: int = 0, low: int = 3, high: int = 12) -> list[str]:
    """Random sentences of `low` to `high` words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(low, high))) for _ in range(count)]


def ranked(samples: Sequence[Sample], weights: Sequence[float] | None = None) -> list[RankedSample]:
    """Samples in rank order with their lengths."""
    encoder = Encoder(tiny_tokenizer(), ENCODING)
    made = []
    for rank, item in enumerate(samples):
        encoded = encoder.encode(item.text, item.loss_spans)
        made.append(
            RankedSample(
                sample=item,
                rank=rank,
                selection_weight=weights[rank] if weights else 1.0,
                tokens=len(encoded.ids),
                loss_tokens=sum(encoded.loss_mask),
            )
        )
    return made


def write_shards(folder: str, items: Sequence[RankedSample], per_shard: int) -> tuple[ShardEntry, ...]:
    """Shards of `per_shard` samples each."""
    entries = []
    for start in range(0, len(items), per_shard):
        part = items[start : start + per_shard]
        members = [(item.rank, encode_record(item)) for item in part]
        domains = dict(Counter(item.sample.domain for item in part))
        body, entry = encode_shard(
            f"shard-{start // per_shard:06d}.tar", members, domains, sum(item.tokens for item in part)
        )
        write_whole(f"{folder}/{entry.name}", body)
        entries.append(entry)
    return tuple(entries)


def write_stream(
    folder: str,
    items: Sequence[RankedSample],
    *,
    tokenizer: str = "tokenizer",
    target: Sequence[RankedSample] = (),
    evaluation: Sequence[RankedSample] = (),
    per_shard: int = 7,
    name: str = "match",
    generation: int = 1,
) -> StreamIndex:
    """A whole stream generation at `folder` (a path or URL)."""
    index = StreamIndex(
        stream=name,
        generation=generation,
        selection=name,
        encoding=plain(ENCODING),
        tokenizer=tokenizer,
        shards=write_shards(folder, items, per_shard),
        target=write_shards(f"{folder}/target", target, per_shard),
        evaluation=write_shards(f"{folder}/eval", evaluation, per_shard),
    )
    write_whole(f"{folder}/index.json", index_bytes(index))
    return index


def make_run(
    folder: Path,
    *,
    samples: int = 48,
    kind: str = "llama",
    weights: Sequence[float] | None = None,
    target: int = 9,
    evaluation: int = 6,
    high: int = 12,
) -> tuple[Run, Path]:
    """A run that holds a finished stream `match`, and the folder of the tiny model it was cut for."""
    model = save_tiny_model(folder / "model", kind)
    run = Run.create(str(folder / "run"), corpus="words", root=str(folder))
    write_stream(
        run.path(run.stream_folder("match", 1)),
        ranked([sample("words", row, text) for row, text in enumerate(texts(samples, high=high))], weights),
        tokenizer=tokenizer_fingerprint(str(model)),
        target=ranked([sample("target", row, text) for row, text in enumerate(texts(target, seed=1))]),
        evaluation=ranked([sample("eval", row, text) for row, text in enumerate(texts(evaluation, seed=2))]),
    )
    write_manifest(
        run.path(run.manifest_path("export", "match.gen-000001")),
        Manifest(stage="export", name="match.gen-000001", spec={"stream": "match", "generation": 1}, inputs={}),
    )
    return run, model
