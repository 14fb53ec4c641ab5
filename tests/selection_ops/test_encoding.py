"""Encoding: rows to samples to tokens, one way, with nothing lost on the way."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from schemas.errors import InputError
from schemas.ids import content_id, sample_id
from schemas.sample import Reject, Row, Sample
from schemas.spec import EncodingSpec
from selection_ops.encoding import Encoder, EncodingError
from tests.tiny import tiny_tokenizer

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MIXED = "The naïve fox 🦊 jumps; 日本語 and \u200d👩‍👩‍👧 families, über-glass 12345.\n\n\tlehr "


def encoder(*, chat_template: str | None = None, **spec: Any) -> Encoder:
    return Encoder(tiny_tokenizer(chat_template), EncodingSpec(**{"min_tokens": 2, **spec}))


def row(**fields: Any) -> Row:
    return Row(path="a.jsonl", row=3, **fields)


def made(found: Encoder, given: Row, *, tail: bool = False) -> list[Sample]:
    """The samples of a row, all of it; but for a tail that is too short where `tail` says there may be one."""
    out = list(found.samples(given, "corpus"))
    if tail and isinstance(out[-1], Reject):
        assert out.pop().reason == "too_short"  # type: ignore[union-attr]
    assert all(isinstance(item, Sample) for item in out), out
    return out  # type: ignore[return-value]


def reject(found: Encoder, given: Row) -> Reject:
    (only,) = list(found.samples(given, "corpus"))
    assert isinstance(only, Reject)
    assert (only.stage, only.path, only.row) == ("encode", "a.jsonl", 3)
    return only


def with_bos(tokenizer: Any) -> Any:
    """The same tokenizer, made to put <bos> first by itself."""
    bos = tokenizer.convert_tokens_to_ids("<bos>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", bos)]
    )
    return tokenizer


def test_plain_text_is_one_sample_with_loss_everywhere() -> None:
    found = encoder()
    (sample,) = made(found, row(text=MIXED, source_id="s", domain="d", extra='{"x":1}'))
    assert (sample.text, sample.char_start, sample.char_end, sample.window) == (MIXED, 0, len(MIXED), 0)
    assert sample.loss_spans == ((0, len(MIXED)),)
    assert sample.sample_id == sample_id("corpus", "a.jsonl", 3, 0)
    assert sample.content_id == content_id(MIXED, sample.loss_spans)
    assert (sample.source_id, sample.domain, sample.extra) == ("s", "d", '{"x":1}')
    encoded = found.encode(sample.text, sample.loss_spans)
    assert encoded.loss_mask == [False] + [True] * (len(encoded.ids) - 1)
    assert found.tokenizer.decode(encoded.ids, clean_up_tokenization_spaces=False) == MIXED


@pytest.mark.parametrize("max_tokens", [8, 16, 60])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("trim", [False, True])
def test_windows_tile_the_text_and_fit_when_encoded_alone(max_tokens: int, bos: bool, trim: bool) -> None:
    """With and without a token put first, with offsets that leave out leading spaces; characters of several tokens."""
    text = MIXED * 40 + "🦊👩‍👩‍👧" * 30
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    found = Encoder(with_bos(tokenizer) if bos else tokenizer, EncodingSpec(max_tokens=max_tokens, min_tokens=2))
    samples = made(found, row(text=text), tail=True)
    assert "".join(sample.text for sample in samples) == text[: samples[-1].char_end]
    assert [sample.window for sample in samples] == list(range(len(samples)))
    place, lengths = 0, []
    for sample in samples:
        assert sample.char_start == place
        assert text[sample.char_start : sample.char_end] == sample.text
        place = sample.char_end
        encoded = found.encode(sample.text, sample.loss_spans)
        lengths.append(len(encoded.ids))
        assert any(encoded.loss_mask)
        assert not bos or encoded.ids[0] == tokenizer.bos_token_id
    assert len(text) - place <= 4  # a tail of one token, if any
    assert max(lengths) == max_tokens
    # No more windows than needed, but for characters of up to four tokens and a token put first.
    assert sum(lengths) / len(lengths) > 0.7 * max_tokens
    assert len({sample.sample_id for sample in samples}) == len(samples)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200), st.integers(2, 12), st.booleans())
def test_any_text_ends_in_samples_and_rejects_that_tile_it(text: str, max_tokens: int, always: bool) -> None:
    found = encoder(max_tokens=max_tokens, append_eos="always" if always else "never")
    out = list(found.samples(row(text=text), "c"))
    assert out
    place = 0
    for item in out:
        if isinstance(item, Sample):
            encoded = found.encode(item.text, item.loss_spans)
            assert 2 <= len(encoded.ids) <= max_tokens
            assert len(encoded.ids) == len(encoded.loss_mask)
            assert item.char_start >= place
            place = item.char_end
        else:
            assert item.reason in {"empty_text", "too_short", "no_loss_tokens", "cannot_cut", "invalid_text"}
            item.preview.encode()


def test_a_character_of_more_tokens_than_a_window_is_a_reject() -> None:
    found = encoder(max_tokens=3)
    out = list(found.samples(row(text="the fox 🦊 the fox"), "c"))
    assert isinstance(out[-1], Reject)
    assert out[-1].reason == "cannot_cut"


def test_short_tails_are_rejected_as_too_short() -> None:
    found = encoder(max_tokens=16, min_tokens=10)
    text = " the quick brown fox jumps over the lazy dog" * 20
    out = list(found.samples(row(text=text), "c"))
    short = [item for item in out if isinstance(item, Reject)]
    assert len(short) == 1
    assert out[-1] is short[0]
    assert (short[0].reason, short[0].window) == ("too_short", len(out) - 1)
    assert "min_tokens is 10" in short[0].detail
    assert reject(encoder(min_tokens=9), row(text="the")).reason == "too_short"


@pytest.mark.parametrize("text", ["", "  \n\t ", None])
def test_no_text_is_a_reject(text: str | None) -> None:
    assert reject(encoder(), row(text=text)).reason == "empty_text"


def test_text_that_is_no_unicode_is_a_reject() -> None:
    found = reject(encoder(), row(text="the quick \ud800 fox"))
    assert found.reason == "invalid_text"
    found.preview.encode()
    messages = [{"role": "user", "content": "\udc00"}, {"role": "assistant", "content": "x"}]
    reject(encoder(chat_template=CHAT), row(messages=messages)).preview.encode()


@pytest.mark.parametrize(
    ("append", "text_end", "completion_end"),
    [("never", "", ""), ("completion", "", "<eos>"), ("always", "<eos>", "<eos>")],
)
def test_end_of_sequence_is_written_where_asked_and_trained_on(append: Any, text_end: str, completion_end: str) -> None:
    found = encoder(append_eos=append)
    (text,) = made(found, row(text="the quick fox"))
    assert text.text == "the quick fox" + text_end
    (pair,) = made(found, row(prompt="the quick", completion=" fox"))
    assert pair.text == "the quick fox" + completion_end
    for sample, end in ((text, text_end), (pair, completion_end)):
        encoded = found.encode(sample.text, sample.loss_spans)
        assert (encoded.ids[-1] == found.tokenizer.eos_token_id) == bool(end)
        assert encoded.loss_mask[-1]


def test_loss_of_a_prompt_row_is_on_the_completion_alone() -> None:
    found = encoder(append_eos="never")
    prompt, completion = "glass is heated 🦊", " and slowly cooled"
    (sample,) = made(found, row(prompt=prompt, completion=completion))
    assert sample.loss_spans == ((len(prompt), len(prompt + completion)),)
    encoded = found.encode(sample.text, sample.loss_spans)
    learned = [token for token, on in zip(encoded.ids, encoded.loss_mask) if on]
    assert found.tokenizer.decode(learned, clean_up_tokenization_spaces=False) == completion
    assert encoded.loss_mask == sorted(encoded.loss_mask)


def test_a_token_across_the_border_carries_loss() -> None:
    found = encoder(append_eos="never")
    whole = found.tokenizer("glass", add_special_tokens=False)["input_ids"]
    encoded = found.encode("the glass", ((len("the gla"), len("the glass")),))
    border = found.tokenizer("the glass", add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert encoded.loss_mask == [end > len("the gla") for _, end in border]
    assert whole  # the tokenizer knows the word


def test_windows_without_loss_tokens_are_rejects() -> None:
    found = encoder(max_tokens=12, append_eos="never")
    out = list(found.samples(row(prompt="the quick brown fox jumps " * 10, completion="over the lazy dog"), "c"))
    reasons = [item.reason if isinstance(item, Reject) else "sample" for item in out]
    assert reasons[0] == "no_loss_tokens"
    assert reasons[-1] == "sample"
    assert set(reasons) == {"no_loss_tokens", "sample"}
    assert isinstance(out[-1], Sample)
    assert out[-1].window == len(out) - 1
    assert reject(found, row(prompt="the quick fox jumps", completion="")).reason == "no_loss_tokens"


def test_loss_of_messages_is_on_the_assistants_turns_with_their_end() -> None:
    found = encoder(chat_template=CHAT)
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "the fox?"},
        {"role": "assistant", "content": "a quick 🦊"},
        {"role": "user", "content": "the dog?"},
        {"role": "assistant", "content": "lazy"},
    ]
    (sample,) = made(found, row(messages=messages))
    parts = [sample.text[start:end] for start, end in sample.loss_spans]
    assert parts == ["a quick 🦊<eos>\n", "lazy<eos>\n"]
    encoded = found.encode(sample.text, sample.loss_spans)
    learned = [token for token, on in zip(encoded.ids, encoded.loss_mask) if on]
    assert found.tokenizer.decode(learned, clean_up_tokenization_spaces=False) == "".join(parts)
    assert learned.count(found.tokenizer.eos_token_id) == 2


def test_an_assistant_that_speaks_first_is_not_trained_on_its_header() -> None:
    found = encoder(chat_template=CHAT)
    (sample,) = made(found, row(messages=[{"role": "assistant", "content": "lazy dog"}]))
    assert [sample.text[start:end] for start, end in sample.loss_spans] == ["lazy dog<eos>\n"]


def test_a_template_that_changes_what_went_before_is_a_reject() -> None:
    unstable = "{{ messages | length }}: " + CHAT
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert reject(encoder(chat_template=unstable), row(messages=messages)).reason == "unstable_chat_template"
    failing = "{{ raise_exception('roles must alternate') }}"
    found = reject(encoder(chat_template=failing), row(messages=messages))
    assert found.reason == "chat_template_error"
    assert "must alternate" in found.detail


def test_odd_messages_are_rejects() -> None:
    found = encoder(chat_template=CHAT)
    assert reject(found, row(messages=[])).reason == "empty_text"
    assert reject(found, row(messages=["hello"])).reason == "bad_messages"
    assert reject(found, row(messages=[{"content": "x"}])).reason == "bad_messages"
    assert reject(found, row(messages=[{"role": "user", "content": "the fox"}])).reason == "no_loss_tokens"


def test_messages_without_a_template_name_the_way_out() -> None:
    with pytest.raises(InputError, match="--chat-template"):
        list(encoder().samples(row(messages=[{"role": "user", "content": "x"}]), "c"))
    (sample,) = made(encoder(append_eos="never"), row(text="the quick fox"))
    assert sample
    given = Encoder(tiny_tokenizer(), EncodingSpec(chat_template=CHAT, min_tokens=2))
    assert made(given, row(messages=[{"role": "assistant", "content": "x"}]))


def test_beginning_of_sequence_only_where_the_tokenizer_adds_it() -> None:
    text = "the quick fox"
    bare = encoder().encode(text, ((0, len(text)),))
    assert bare.ids == tiny_tokenizer()(text)["input_ids"]
    found = Encoder(with_bos(tiny_tokenizer()), EncodingSpec())
    bos = found.tokenizer.bos_token_id
    encoded = found.encode(text, ((0, len(text)),))
    assert encoded.ids == [bos, *bare.ids]
    assert encoded.loss_mask == [False] + [True] * len(bare.ids)
    twice = found.encode("<bos>" + text, ((0, 5 + len(text)),))
    assert twice.ids == [bos, *bare.ids]


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(InputError, match="fast tokenizer"):
        Encoder(Slow(), EncodingSpec())


def test_a_tokenizer_without_end_of_sequence_is_refused_where_it_is_needed() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="append-eos never"):
        Encoder(tokenizer, EncodingSpec(append_eos="always"))
    found = Encoder(tokenizer, EncodingSpec(min_tokens=2))
    assert made(found, row(text="the quick fox"))
    with pytest.raises(InputError, match="has none"):
        found.render(row(prompt="a", completion="b"))


def test_a_tokenizer_that_strips_and_prefixes_still_tiles() -> None:
    """Word pieces with a lower-casing normaliser: tokens do not spell the text, windows still do."""
    vocabulary = {word: place for place, word in enumerate(["[UNK]", "the", "quick", "fox", ",", "##s"])}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
    found = Encoder(tokenizer, EncodingSpec(max_tokens=4, min_tokens=2, append_eos="never"))
    text = "  The quick   FOXS, " * 9
    samples = made(found, row(text=text), tail=True)
    assert len(text) - len("".join(sample.text for sample in samples)) <= len(", ")
    assert text.startswith("".join(sample.text for sample in samples))
    assert all(len(found.encode(sample.text, ()).ids) <= 4 for sample in samples)


def test_rendering_errors_have_a_reason() -> None:
    with pytest.raises(EncodingError, match="empty_text"):
        encoder(chat_template=CHAT).render(row(messages=[]))


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["words", "one word", "emoji"])
def test_a_document_of_five_megabytes_takes_seconds(shape: str) -> None:
    rng = random.Random(0)
    words = MIXED.split(" ")
    text = {
        "words": lambda: " ".join(rng.choice(words) for _ in range(850_000)),
        "one word": lambda: "ab" * 2_500_000,
        "emoji": lambda: "🦊👩‍👩‍👧" * 230_000,
    }[shape]()
    assert len(text.encode()) >= 5_000_000
    found = encoder(max_tokens=1024)
    started = time.process_time()
    samples = made(found, row(text=text))
    # 2-4 CPU seconds on one core of 2.6 GHz; a cost that grows with the square of the length would be hours.
    assert time.process_time() - started < 30
    assert "".join(sample.text for sample in samples) == text
