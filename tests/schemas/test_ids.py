"""Identities and fingerprints: the same everywhere, different for anything that differs."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

import schemas.ids
from schemas.errors import InputError
from schemas.fingerprint import canonical_json, fingerprint, hash128, plain
from schemas.ids import content_id, sample_id, unit_id


def test_ids_are_128_bits_of_hex() -> None:
    for value in (sample_id("c", "p", 0, 0), content_id("t", [(0, 1)]), unit_id("p", 0, 1, 0, 1, "s", "c")):
        assert len(value) == 32 and int(value, 16) >= 0


def test_ids_never_change() -> None:
    """Pinned: every stored run depends on them."""
    assert sample_id("corpus", "a/b.jsonl", 7, 2) == "3917ac25a2bbac60d48204eee79bbfc4"
    assert content_id("héllo", [(0, 5)]) == "ac3279dee40c0a124db18fb06c391991"
    assert unit_id("a", 0, 10, 0, 5, "s", "c") == "58f5893614a0486b67c6a8fb65d2f702"


def test_every_part_of_a_place_counts() -> None:
    places = itertools.product(("c", "d"), ("a.jsonl", "b.jsonl"), (0, 1, 10), (0, 1))
    found = [sample_id(*place) for place in places]
    assert len(set(found)) == len(found) == 24
    assert sample_id("c", "a", 1, 11) != sample_id("c", "a", 11, 1)
    assert sample_id("c", "a1", 1, 0) != sample_id("c", "a", 11, 0)


def test_content_is_text_and_loss_spans_alone() -> None:
    assert content_id("abc", [(0, 3)]) == content_id("abc", ((0, 3),))
    assert content_id("abc", [(0, 3)]) != content_id("abc", [(1, 3)])
    assert content_id("abc", [(0, 3)]) != content_id("abd", [(0, 3)])
    assert content_id("abc", [(0, 1), (2, 3)]) != content_id("abc", [(0, 3)])


def test_text_that_is_no_utf8_has_an_id_too() -> None:
    assert content_id("lone \ud800 surrogate", []) != content_id("lone \ud801 surrogate", [])


def test_unit_follows_bytes_and_columns() -> None:
    base = ("p", 0, 100, 0, 10, "source", "columns")
    changed = [
        ("q", 0, 100, 0, 10, "source", "columns"),
        ("p", 1, 100, 0, 10, "source", "columns"),
        ("p", 0, 101, 0, 10, "source", "columns"),
        ("p", 0, 100, 1, 10, "source", "columns"),
        ("p", 0, 100, 0, 11, "source", "columns"),
        ("p", 0, 100, 0, 10, "sourcc", "columns"),
        ("p", 0, 100, 0, 10, "source", "column"),
    ]
    assert len({unit_id(*base), *(unit_id(*place) for place in changed)}) == 8


def test_another_process_gives_the_same_id() -> None:
    home = Path(schemas.ids.__file__).resolve().parent.parent
    code = "from schemas.ids import sample_id; print(sample_id('c', 'p', 1, 2))"
    out = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == sample_id("c", "p", 1, 2)


def test_parts_of_a_hash_cannot_run_together() -> None:
    assert hash128(b"ab", b"c") != hash128(b"a", b"bc") != hash128(b"abc")


def test_fingerprint_ignores_order_and_kind_of_sequence_only() -> None:
    assert fingerprint({"a": 1, "b": (1, 2)}) == fingerprint({"b": [1, 2], "a": 1})
    assert len({fingerprint(v) for v in ({"a": 1}, {"a": 2}, {"a": "1"}, {"a": None}, {"b": 1}, [1, 2], [2, 1])}) == 7
    assert canonical_json({"b": 1, "a": [True, None, 0.5]}) == b'{"a":[true,null,0.5],"b":1}'


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_without_a_fingerprint_are_refused(value: float) -> None:
    with pytest.raises(InputError, match="finite"):
        fingerprint({"a": value})


def test_what_is_not_json_is_refused() -> None:
    with pytest.raises(TypeError, match="set"):
        plain({"a": {1}})
