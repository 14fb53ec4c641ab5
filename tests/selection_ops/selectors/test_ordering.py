"""Texts sorted and grouped eight letters at a time come out as numpy sorts and groups them."""

from __future__ import annotations

import numpy as np
import pytest

from selection_ops.selectors.ordering import as_text, first_equal, text_order

RNG = np.random.default_rng(0)
TEXTS = {
    "ids": np.array([f"{number:032x}" for number in RNG.integers(0, 60, 500)]),
    "bytes": np.array([f"{number:032x}" for number in RNG.integers(0, 60, 500)]).astype("S32"),
    "one prefix": np.array([f"common-prefix-{number}" for number in RNG.integers(0, 40, 300)]),
    "lengths": np.array(["ab", "", "a", "abcabcab", "abcabcabc", "abcabcab", "", "b", "abcabcaba"]),
    "latin": np.array(["zÿ", "zz", "z", "é", "zÿ"]),
    "beyond latin": np.array(["é", "中", "a", "中", "𝄞"]),
    "one": np.array(["a"]),
    "none": np.array([], dtype="U4"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_order_and_repeats_are_those_of_numpy(name: str) -> None:
    texts = as_text(TEXTS[name])
    order, repeats = text_order(texts)
    expected = np.argsort(texts, kind="stable")
    assert np.array_equal(order, expected)
    assert np.array_equal(repeats[1:], texts[expected][1:] == texts[expected][:-1])
    assert not repeats[:1].any()


@pytest.mark.parametrize("name", TEXTS)
def test_first_of_equals_is_the_one_numpy_finds(name: str) -> None:
    texts = as_text(TEXTS[name])
    _, first, inverse = np.unique(texts, return_index=True, return_inverse=True)
    assert np.array_equal(first_equal(texts), first[inverse])
