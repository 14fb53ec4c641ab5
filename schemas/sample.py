"""The records that travel: a corpus row as read, the sample made from it, and the reject it may end as."""

from __future__ import annotations

import dataclasses
from typing import Any

import orjson

from schemas.errors import CorruptFile

PREVIEW_CHARS = 200


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of a corpus file, before it is rendered to text: exactly one of text, prompt + completion, messages."""

    path: str
    row: int
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: list[dict[str, Any]] | None = None
    source_id: str = ""
    domain: str = ""
    extra: str = "{}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """A row, or a window of one, that could not become a scored sample, and why."""

    path: str
    row: int
    window: int = 0
    stage: str
    reason: str
    detail: str = ""
    preview: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A span of text with its loss spans: the unit that is scored, ranked and weighted.

    `char_start` and `char_end` are offsets into the rendered row; `loss_spans` are offsets into `text`.
    """

    sample_id: str
    content_id: str
    path: str
    row: int
    window: int
    char_start: int
    char_end: int
    text: str
    loss_spans: tuple[tuple[int, int], ...]
    source_id: str = ""
    domain: str = ""
    extra: str = "{}"

    @property
    def preview(self) -> str:
        """The first characters of the text, for people."""
        return self.text[:PREVIEW_CHARS]


_FIELDS = tuple(field.name for field in dataclasses.fields(Sample))
_TEXTS = ("sample_id", "content_id", "path", "text", "source_id", "domain")
_NUMBERS = ("row", "window", "char_start", "char_end")


def sample_to_dict(sample: Sample) -> dict[str, Any]:
    """JSON-ready dict of a sample; `extra` becomes an object so that any reader sees the carried columns."""
    record: dict[str, Any] = {name: getattr(sample, name) for name in _FIELDS}
    record["loss_spans"] = [list(span) for span in sample.loss_spans]
    record["extra"] = orjson.loads(sample.extra)
    return record


def sample_from_dict(record: dict[str, Any], where: str) -> Sample:
    """Inverse of `sample_to_dict`; unknown keys are ignored. Raises `CorruptFile` naming `where` for a bad record."""
    try:
        values = {name: record[name] for name in _FIELDS}
        for name in _TEXTS:
            if not isinstance(values[name], str):
                raise TypeError(f"{name} is not a string")
        for name in _NUMBERS:
            values[name] = counting(values[name], name)
        values["loss_spans"] = tuple(
            (counting(start, "span"), counting(end, "span")) for start, end in record["loss_spans"]
        )
        values["extra"] = orjson.dumps(record["extra"], option=orjson.OPT_SORT_KEYS).decode()
        return Sample(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"{where}: not a sample record ({type(error).__name__}: {error})") from error


def counting(value: Any, name: str) -> int:
    """`value` itself if it is a number to count or place by. Raises `ValueError` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} is {value!r:.50}, not an integer of at least 0")
    return value
