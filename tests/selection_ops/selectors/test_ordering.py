"""Texts sorted and grouped eight letters at a time come out as numpy sorts and groups them."""

from __future__ import annotations

import numpy as np
import pytest

from selection_ops.selectors.ordering import as_text, best_first, first_equal, text_codes, text_order

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


@pytest.mark.parametrize("name", TEXTS)
def test_codes_are_places_among_the_distinct_texts(name: str) -> None:
    texts = TEXTS[name].astype(str)
    names, codes = text_codes(texts.astype(object))
    expected_names, expected = np.unique(texts, return_inverse=True)
    assert names.tolist() == expected_names.tolist()
    assert codes.tolist() == expected.tolist()


def test_the_best_are_the_beginning_of_the_stable_order() -> None:
    for missing in (0, 5, 80):
        score = RNG.integers(-4, 4, 80).astype(float)
        score[RNG.permutation(80)[:missing]] = np.nan
        score[0] = -np.inf if missing < 80 else np.nan
        whole = np.argsort(-score, kind="stable")
        for most in (0, 1, 7, 40, 79, 80, 200):
            assert best_first(score, most).tolist() == whole[:most].tolist()
