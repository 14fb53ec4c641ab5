"""Text of the demo's other domains: documents from the packages and from Python itself, packed into even passages."""

from __future__ import annotations

import dataclasses
import gzip
import importlib
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from lehr.demo.fetch import EVALS, REASONING_GYM, Wheel, read_member

Document = list[str]
"""The paragraphs of one document."""
Wheels = Mapping[Wheel, Path]
"""Where the fetched packages lie."""
CountTokens = Callable[[list[str]], list[int]]
"""Numbers of tokens of texts."""

_BREAK = re.compile(r"\n\s*\n")
_SENTENCE = re.compile(r"(?<=[.!?;])\s+|\n")
_DATA = "evals/registry/data"
_SOURCE_FOLDERS_LEFT_OUT = {
    "__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "ensurepip",
}  # fmt: skip
_FOREIGN_EXAMS = (
    "ukraine_eit", "bulgarian-exams-qa", "macedonian-exams-qa", "serbian-exams-qa", "vietnamese-exams-qa",
    "turkish-exams-qa", "hungarian-exams-qa", "croatian-exams-qa", "polish-exams-qa", "albanian-exams-qa",
    "italian-exams-qa", "arabic-exams-qa", "portuguese-exams-qa", "german-exams-qa", "lithuanian-exams-qa",
    "french-exams-qa", "spanish-exams-qa",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where a domain's text comes from and how it is packed."""

    read: Callable[[Wheels], Iterable[Document]]
    """Its documents, in a fixed order."""
    joiner: str = "\n\n"
    """What stands between two paragraphs of a passage."""
    across: bool = False
    """Whether paragraphs of different documents may share a passage: for documents of a line or two."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long samples are, in tokens."""

    low: int
    """The fewest."""
    goal: int
    """A passage is closed once it has this many."""
    high: int
    """The most."""


def pack(documents: Iterable[Document], source: Source, lengths: Lengths, count: CountTokens) -> list[str]:
    """Passages of `lengths.low` to `lengths.high` tokens from whole paragraphs, exact repeats dropped, in reading order.

    A paragraph that is too long is cut at its sentences or lines; what is too short for a passage is left out.
    """
    pieces: list[tuple[int, str]] = []
    for number, document in enumerate(documents):
        paragraphs = (paragraph.strip("\n").rstrip() for paragraph in document)
        pieces.extend((0 if source.across else number, paragraph) for paragraph in paragraphs if paragraph.strip())
    sizes = count([text for _, text in pieces])
    passages: dict[str, None] = {}
    held: list[str] = []
    held_size, held_number = 0, -1

    def close() -> None:
        nonlocal held, held_size
        if held_size >= lengths.low:
            passages[source.joiner.join(held)] = None
        held, held_size = [], 0

    for (number, text), size in zip(pieces, sizes):
        if number != held_number:
            close()
            held_number = number
        if size > lengths.high:
            close()
            for passage in _cut(text, lengths, count):
                passages[passage] = None
            continue
        if held and held_size + size + 1 > lengths.high:
            close()
        held.append(text)
        held_size += size + (1 if len(held) > 1 else 0)
        if held_size >= lengths.goal:
            close()
    close()
    # Sizes of joined text differ a little from the sum of the parts; the bounds hold for the passage itself.
    found = list(passages)
    return [text for text, size in zip(found, count(found)) if lengths.low <= size <= lengths.high]


def _cut(paragraph: str, lengths: Lengths, count: CountTokens) -> Iterator[str]:
    """Spans of a long paragraph between sentence ends or line ends; a longer sentence is skipped."""
    ends = [match.end() for match in _SENTENCE.finditer(paragraph)] + [len(paragraph)]
    starts = [0, *ends[:-1]]
    sizes = count([paragraph[start:end] for start, end in zip(starts, ends)])
    begin, held = 0, 0
    for start, end, size in zip(starts, ends, sizes):
        if held and held + size > lengths.high:
            if held >= lengths.low:
                yield paragraph[begin:start].strip()
            begin, held = start, 0
        if size > lengths.high:
            begin, held = end, 0
            continue
        held += size
        if held >= lengths.goal:
            yield paragraph[begin:end].strip()
            begin, held = end, 0
    if held >= lengths.low:
        yield paragraph[begin:].strip()


def _rows(wheels: Wheels, member: str) -> Iterator[dict[str, Any]]:
    data = read_member(wheels[EVALS], f"{_DATA}/{member}")
    yield from (orjson.loads(line) for line in data.splitlines() if line.strip())


def _said(row: dict[str, Any]) -> str:
    return row["input"][-1]["content"].strip()


def _questions(*members: str) -> Callable[[Wheels], Iterator[Document]]:
    """Multiple-choice questions in the same `Question: ... Answer: ...` form as the problems."""

    def read(wheels: Wheels) -> Iterator[Document]:
        for member in members:
            for row in _rows(wheels, member):
                ideal = row["ideal"] if isinstance(row["ideal"], str) else row["ideal"][0]
                question = _BREAK.sub("\n", _said(row).removesuffix("Answer:").removeprefix("Passage:").strip())
                yield [f"Question: {question}\nAnswer: {ideal.removeprefix('Answer:').strip(' []')}"]

    return read


def _first_orders(*members: str) -> Callable[[Wheels], Iterator[Document]]:
    """Field `0` of the schelling-point files: the text itself; the others hold it shuffled."""

    def read(wheels: Wheels) -> Iterator[Document]:
        for member in members:
            for row in _rows(wheels, f"schelling_point/{member}.jsonl"):
                yield _BREAK.split(row["0"])

    return read


def _random_lists(wheels: Wheels) -> Iterator[Document]:
    """Lists of random words and lists of random numbers, in turn by blocks of four so that a passage holds one kind."""
    words = [row["0"] for row in _rows(wheels, "schelling_point/random_words_10.jsonl")]
    numbers = [row["0"] for row in _rows(wheels, "schelling_point/random_numbers_10_3.jsonl")]
    for start in range(0, min(len(words), len(numbers)), 4):
        yield words[start : start + 4]
        yield numbers[start : start + 4]


def _headlines(wheels: Wheels) -> Iterator[Document]:
    for row in _rows(wheels, "sarcasm/samples.jsonl"):
        yield [_said(row)]


def _ciphers(wheels: Wheels) -> Iterator[Document]:
    for row in _rows(wheels, "decrypt_caesar_cipher/samples.jsonl"):
        yield [f"{_said(row)}\n{row['ideal']}"]


def _stories(wheels: Wheels) -> Iterator[Document]:
    """Parables, each once however often it is asked about, and a public-domain story without its front and back matter."""
    parables = dict.fromkeys(
        _said(row).split("\nWhich moral")[0]
        for row in _rows(wheels, "parable-to-moral-match/parable-to-moral-match-en.jsonl")
    )
    yield from (_BREAK.split(parable) for parable in parables)
    book = read_member(wheels[REASONING_GYM], "reasoning_gym/data/in_the_year_2889.txt").decode()
    body = re.split(r"\*\*\* (?:START|END) OF [^\n]*\n", book.replace("\r\n", "\n"))
    yield _BREAK.split(body[1] if len(body) > 1 else book)


def _code_tasks(wheels: Wheels) -> Iterator[Document]:
    lines = gzip.decompress(read_member(wheels[REASONING_GYM], "reasoning_gym/data/codeio.jsonl.gz")).splitlines()
    for line in lines:
        row = orjson.loads(line)
        yield [f"Task: {row['task_description'].strip()}", *_BREAK.split(row["code_sample"].strip())]


def _library_sources(wheels: Wheels) -> Iterator[Document]:
    """The Python sources of the running interpreter's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not _SOURCE_FOLDERS_LEFT_OUT & set(path.relative_to(root).parts)
    )
    for name in paths:
        try:
            yield _BREAK.split((root / name).read_text("utf-8"))
        except (UnicodeDecodeError, OSError):
            continue


def _library_manual(wheels: Wheels) -> Iterator[Document]:
    """The topics of the language reference that `help()` shows."""
    topics = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield _BREAK.split(topics[name])


SOURCES: dict[str, Source] = {
    "code": Source(read=_code_tasks),
    "python": Source(read=_library_sources),
    "manual": Source(read=_library_manual),
    "web": Source(read=_first_orders("owt_5")),
    "encyclopedia": Source(read=_first_orders("wikipedia_5")),
    "stories": Source(read=_stories),
    "headlines": Source(read=_headlines, joiner="\n", across=True),
    "qa-science": Source(read=_questions("quartz/samples.jsonl"), across=True),
    "qa-social": Source(read=_questions("theory_of_mind/socialiqa/test.jsonl"), across=True),
    "qa-logic": Source(read=_questions("logiqa/logiqa.jsonl"), across=True),
    "qa-radio": Source(read=_questions("fcc_amateur_extra/samples.jsonl"), across=True),
    "qa-law": Source(read=_questions("us_tort_law/samples.jsonl"), across=True),
    "qa-medicine": Source(read=_questions("medmcqa/samples.jsonl"), across=True),
    "qa-foreign": Source(read=_questions(*(f"{name}/samples.jsonl" for name in _FOREIGN_EXAMS)), across=True),
    "deduction": Source(
        read=_questions(
            "corr2cause/corr2cause.jsonl",
            "pararule-plus-multi-step-deductive-reasoning/pararule-plus-multi-step-deductive-reasoning.jsonl",
            "crepe/samples.jsonl",
        ),
        across=True,
    ),
    "ciphers": Source(read=_ciphers, across=True),
    "noise": Source(read=_random_lists, joiner="\n"),
}
"""Every domain but the problems, by its name in column `domain`."""
