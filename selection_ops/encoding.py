"""From corpus row to samples, and from sample to token ids and loss mask: one way, in scoring and training alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from schemas.errors import InputError
from schemas.ids import content_id, sample_id
from schemas.sample import PREVIEW_CHARS, Reject, Row, Sample
from schemas.spec import EncodingSpec

Spans = tuple[tuple[int, int], ...]
Offsets = Sequence[tuple[int, int]]

PIECE_CHARS = 32
"""A long text is tokenized in pieces of this many characters per token of `max_tokens`: some eight windows."""


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
    """Renders, cuts and encodes under one `EncodingSpec` with one tokenizer.

    Special tokens written out in a text (such as `<|endoftext|>`) are encoded as these tokens, as transformers does by default.
    Raises `InputError` for a tokenizer without character offsets, and for `append_eos` without an end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, spec: EncodingSpec) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                f"{type(tokenizer).__name__} gives no character offsets; "
                "Lehr needs a fast tokenizer (a folder with tokenizer.json)"
            )
        self.tokenizer, self.spec = tokenizer, spec
        self._bos = self._leading()
        if spec.append_eos == "always":
            self._eos()

    def _leading(self) -> list[int]:
        """Ids that the tokenizer puts before any text by itself."""
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a")["input_ids"]
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return list(whole[:start])
        return []

    def _eos(self) -> str:
        """Text of the end-of-sequence token. Raises `InputError` where there is none that text can be written with."""
        eos = self.tokenizer.eos_token
        if not eos or self.tokenizer(eos, add_special_tokens=False)["input_ids"] != [self.tokenizer.eos_token_id]:
            raise InputError(
                f"append_eos = {self.spec.append_eos!r} needs an end-of-sequence token, and the tokenizer "
                f"{'has none' if not eos else f'does not read {eos!r} as one'}; use --append-eos never"
            )
        return eos

    def render(self, row: Row) -> tuple[str, Spans]:
        """Text of a row and the character spans that carry loss: all of a text, the completion after a prompt, what the
        assistant says in messages with the token that ends its turn.

        Raises `EncodingError` for a row that cannot be rendered, `InputError` where no row of this kind can be.
        """
        if row.messages is not None:
            return self._render_messages(row.messages)
        if row.prompt is not None and row.completion is not None:
            end = self._eos() if self.spec.append_eos != "never" and row.completion else ""
            text = row.prompt + row.completion + end
            return text, ((len(row.prompt), len(text)),) if row.completion else ()
        text = row.text or ""
        if text and self.spec.append_eos == "always":
            text += self._eos()
        return text, ((0, len(text)),) if text else ()

    def _render_messages(self, messages: Sequence[dict[str, Any]]) -> tuple[str, Spans]:
        if not messages:
            raise EncodingError("empty_text", "the list of messages is empty")
        if not all(isinstance(message, dict) and "role" in message for message in messages):
            raise EncodingError("bad_messages", "every message must be an object with role and content")
        whole = self._template(messages, False)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            upto = self._template(messages[: index + 1], False)
            before = self._template(messages[:index], True) if index else self._opening(messages[:1], upto)
            if not (whole.startswith(upto) and upto.startswith(before)):
                detail = f"the chat template renders message {index} differently with and without what follows"
                raise EncodingError("unstable_chat_template", detail)
            spans.append((len(before), len(upto)))
        return whole, tuple(spans)

    def _opening(self, first: Sequence[dict[str, Any]], rendered: str) -> str:
        """What stands before the words of an assistant that speaks first: up to the header of its turn."""
        header = self._template(first, True)[len(rendered) :]
        place = rendered.find(header) if header.strip() else -1
        return rendered[: place + len(header)] if place >= 0 else ""

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
        """Token ids and loss mask of a text. A token carries loss where its characters meet a loss span.

        What the tokenizer puts before a text by itself (a beginning-of-sequence token) is put there unless the text
        begins with it.
        """
        return self._masked(*self._tokens(text), loss_spans)

    def _tokens(self, text: str) -> tuple[list[int], Offsets]:
        made = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return made["input_ids"], made["offset_mapping"]

    def _masked(self, ids: list[int], offsets: Offsets, loss_spans: Sequence[tuple[int, int]]) -> Encoded:
        mask = _mask(offsets, sorted(loss_spans))
        if self._bos and ids[: len(self._bos)] != self._bos:
            ids, mask = self._bos + ids, [False] * len(self._bos) + mask
        if mask:
            mask[0] = False
        return Encoded(ids=list(ids), loss_mask=mask)

    def samples(self, row: Row, corpus: str) -> Iterator[Sample | Reject]:
        """The row as one sample, or as windows of at most `max_tokens`; or why it, or a window, cannot be one."""
        window, preview = 0, row.text or row.prompt or ""
        try:
            text, spans = self.render(row)
            preview = text
            if not text.strip():
                raise EncodingError("empty_text", "there is no text")
            text.encode("utf-8")
            for start, end, ids, offsets in self._windows(text):
                inside = tuple(
                    (max(first, start) - start, min(last, end) - start)
                    for first, last in spans
                    if first < end and last > start
                )
                piece = preview = text[start:end]
                encoded = self._masked(ids, offsets, inside)
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
                window += 1
        except EncodingError as error:
            yield _reject(row, window, error.reason, error.detail, preview)
        except UnicodeEncodeError as error:
            yield _reject(row, window, "invalid_text", str(error), "")

    def _windows(self, text: str) -> Iterator[tuple[int, int, list[int], Offsets]]:
        """(first character, end, ids, offsets) of windows that tile the text; none exceeds `max_tokens` encoded alone.

        The text is read in pieces of some windows each, so that memory does not grow with the document. Raises
        `EncodingError` where no cut makes a window short enough.
        """
        limit = self.spec.max_tokens
        size, start = PIECE_CHARS * limit, 0
        while start < len(text):
            piece = text[start : start + size]
            ids, offsets = self._tokens(piece)
            whole = start + size >= len(text)
            if whole and self._length(ids) <= limit:
                yield start, len(text), ids, offsets
                return
            # The last tokens of a piece that is not the last would be others if more of the text were seen.
            usable = len(ids) if whole else len(ids) - 8
            if usable <= limit and not whole:
                size *= 2
                continue
            first = begin = 0
            while begin == 0 or usable - first > limit:
                end, ids, inner = self._fitting(piece, offsets, first, begin)
                yield start + begin, start + end, ids, inner
                begin = end
                while first < len(offsets) and offsets[first][1] <= end:
                    first += 1
            start += begin

    def _fitting(self, piece: str, offsets: Offsets, first: int, begin: int) -> tuple[int, list[int], Offsets]:
        """The longest window from `begin` that ends with a token: its end, ids and offsets as encoded alone.

        A window may take more tokens alone than inside the document (a cut inside a character of several tokens, a
        word split elsewhere): tokens are given back until it fits.
        """
        take = min(self.spec.max_tokens, len(offsets) - first)
        while take > 0:
            end = offsets[first + take - 1][1]
            if end <= begin:
                break
            ids, inner = self._tokens(piece[begin:end])
            excess = self._length(ids) - self.spec.max_tokens
            if excess <= 0:
                return end, ids, inner
            take -= excess
        detail = f"no cut after {piece[begin : begin + 8]!r} leaves at most {self.spec.max_tokens} tokens"
        raise EncodingError("cannot_cut", detail)

    def _length(self, ids: list[int]) -> int:
        """Tokens of a text with these ids, counting what stands before it."""
        return len(ids) + (0 if ids[: len(self._bos)] == self._bos else len(self._bos))


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
        preview=text[:PREVIEW_CHARS].encode("utf-8", "replace").decode(),
    )
