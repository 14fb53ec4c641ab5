"""From corpus row to samples, and from sample to token ids and loss mask: one way, in scoring and training alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from schemas.errors import InputError
from schemas.ids import content_id, sample_id
from schemas.sample import PREVIEW_CHARS, Reject, Row, Sample
from schemas.spec import EncodingSpec

Spans = tuple[tuple[int, int], ...]


class EncodingError(ValueError):
    """A row that cannot be rendered; becomes a reject."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """Token ids, and which of them carry loss. The first never does: a token is predicted from those before it."""

    ids: list[int]
    loss_mask: list[bool]


class Encoder:
    """Renders, cuts and encodes under one `EncodingSpec` with one tokenizer."""

    def __init__(self, tokenizer: Any, spec: EncodingSpec) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                f"{type(tokenizer).__name__} gives no character offsets; Lehr needs a fast tokenizer (a folder with tokenizer.json)"
            )
        self.tokenizer, self.spec = tokenizer, spec
        self._bos = self._leading()
        self._eos = tokenizer.eos_token or ""
        if spec.append_eos != "never" and not self._eos:
            raise InputError("append_eos needs a tokenizer with an end-of-sequence token; use --append-eos never")

    def _leading(self) -> list[int]:
        """Ids that the tokenizer puts before any text by itself."""
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a")["input_ids"]
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return list(whole[:start])
        return []

    def render(self, row: Row) -> tuple[str, Spans]:
        """Text of a row and the character spans that carry loss. Raises `EncodingError`."""
        if row.messages is not None:
            return self._render_messages(row.messages)
        if row.prompt is not None and row.completion is not None:
            end = self._eos if self.spec.append_eos != "never" else ""
            text = row.prompt + row.completion + end
            return text, ((len(row.prompt), len(text)),) if row.completion else ()
        text = row.text or ""
        if text and self.spec.append_eos == "always":
            text += self._eos
        return text, ((0, len(text)),) if text else ()

    def _render_messages(self, messages: Sequence[dict[str, Any]]) -> tuple[str, Spans]:
        if not messages:
            raise EncodingError("empty_text", "the list of messages is empty")
        whole = self._template(messages, False)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._template(messages[:index], True) if index else ""
            upto = self._template(messages[: index + 1], False)
            if not (whole.startswith(upto) and upto.startswith(before)):
                detail = f"the chat template renders message {index} differently with and without what follows"
                raise EncodingError("unstable_chat_template", detail)
            spans.append((len(before), len(upto)))
        return whole, tuple(spans)

    def _template(self, messages: Sequence[dict[str, Any]], prompt: bool) -> str:
        template = self.spec.chat_template or self.tokenizer.chat_template
        if not template:
            raise InputError(
                "the corpus holds chat messages and the tokenizer has no chat template; give one with --chat-template"
            )
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=template, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # a template raises whatever its author wrote
            raise EncodingError("chat_template_error", f"{type(error).__name__}: {error}"[:300]) from error

    def encode(self, text: str, loss_spans: Sequence[tuple[int, int]]) -> Encoded:
        """Token ids and loss mask of a text. A token carries loss where its characters meet a loss span."""
        made = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = made["input_ids"], made["offset_mapping"]
        mask = _mask(offsets, loss_spans)
        if self._bos and ids[: len(self._bos)] != self._bos:
            ids, mask = self._bos + ids, [False] * len(self._bos) + mask
        if mask:
            mask[0] = False
        return Encoded(ids=list(ids), loss_mask=mask)

    def samples(self, row: Row, corpus: str) -> Iterator[Sample | Reject]:
        """The row as one sample, or as windows of at most `max_tokens`; or why it cannot be one."""
        try:
            text, spans = self.render(row)
            if not text.strip():
                raise EncodingError("empty_text", "there is no text")
            text.encode("utf-8")
            cuts = self._cuts(text)
        except EncodingError as error:
            yield _reject(row, 0, error.reason, error.detail, row.text or "")
            return
        except UnicodeEncodeError as error:
            yield _reject(row, 0, "invalid_text", str(error), "")
            return
        for window, (start, end) in enumerate(pairwise(cuts)):
            piece = text[start:end]
            inside = tuple(
                (max(first, start) - start, min(last, end) - start)
                for first, last in spans
                if first < end and last > start
            )
            encoded = self.encode(piece, inside)
            if len(encoded.ids) < self.spec.min_tokens:
                detail = f"{len(encoded.ids)} tokens, min_tokens is {self.spec.min_tokens}"
                yield _reject(row, window, "too_short", detail, piece)
            elif not any(encoded.loss_mask):
                yield _reject(row, window, "no_loss_tokens", "no token of it carries loss", piece)
            else:
                yield Sample(
                    sample_id=sample_id(corpus, row.path, row.row, window),
                    content_id=content_id(piece, inside),
                    path=row.path, row=row.row, window=window, char_start=start, char_end=end, text=piece,
                    loss_spans=inside, source_id=row.source_id, domain=row.domain, extra=row.extra,
                )  # fmt: skip

    def _cuts(self, text: str) -> list[int]:
        """Character offsets at which windows begin, and the end. No window exceeds `max_tokens` when encoded alone."""
        limit = self.spec.max_tokens - len(self._bos)
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        if len(offsets) <= limit:
            return [0, len(text)]
        cuts, first = [0], 0
        while len(offsets) - first > limit:
            last = first + limit
            # A piece may take more tokens alone than inside the document: give tokens back until it fits.
            while last > first + 1 and not self._fits(text[cuts[-1] : offsets[last][0]]):
                last -= 1
            cut = offsets[last][0]
            if cut <= cuts[-1]:
                raise EncodingError("cannot_cut", f"no cut after character {cuts[-1]} leaves at most {limit} tokens")
            cuts.append(cut)
            first = last
        tail = text[cuts[-1] :]
        if tail and not self._fits(tail):
            cuts.append(offsets[first + (len(offsets) - first) // 2][0])
        return [*cuts, len(text)] if cuts[-1] < len(text) else cuts

    def _fits(self, piece: str) -> bool:
        return len(self.encode(piece, ()).ids) <= self.spec.max_tokens


def _mask(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    mask, place = [], 0
    for start, end in offsets:
        while place < len(spans) and spans[place][1] <= start:
            place += 1
        mask.append(place < len(spans) and start < spans[place][1] and end > spans[place][0])
    return mask


def _reject(row: Row, window: int, reason: str, detail: str, text: str) -> Reject:
    return Reject(
        path=row.path,
        row=row.row,
        window=window,
        stage="encode",
        reason=reason,
        detail=detail,
        preview=text[:PREVIEW_CHARS],
    )
