"""Sorting and grouping of texts such as ids, eight letters at a time instead of letter by letter.

Shape legend: N texts.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def text_order(text_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The stable ascending order of texts (by code point), and for each place in it whether its text repeats the one before.

    The order is that of numpy's own stable argsort. Most ids differ in their first eight letters, which are compared as one
    number; the rest is looked at only where those agree.
    """
    keys = _keys(text_N)
    if keys is None:
        order = np.argsort(text_N, kind="stable")
        ranked = text_N[order]
        return order, np.concatenate([np.zeros(min(1, len(order)), dtype=bool), ranked[1:] == ranked[:-1]])
    first = keys[:, 0].astype(np.uint64)
    order = np.argsort(first, kind="stable")
    tied = _repeats(first[order])
    if keys.shape[1] > 1 and tied.any():
        run = np.cumsum(~tied)
        # A run is a text and those behind it whose first letters are the same.
        inside = np.flatnonzero(tied | np.concatenate([tied[1:], [False]]))
        rows = order[inside]
        rest = [keys[rows, column].astype(np.uint64) for column in range(keys.shape[1] - 1, 0, -1)]
        order[inside] = rows[np.lexsort((*rest, run[inside]))]
        places = np.flatnonzero(tied)
        tied[places] = np.all(keys[order[places]] == keys[order[places - 1]], axis=1)
    return order, tied


def text_codes(text_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct texts in ascending order, and for each text the place of its own among them; for texts of few values."""
    coded = pa.array(np.asarray(text_N, dtype=object), pa.string()).dictionary_encode()
    names = np.array(coded.dictionary.to_pylist(), dtype=str)
    order = np.argsort(names)
    place = np.empty(len(names), dtype=np.int64)
    place[order] = np.arange(len(names))
    return names[order], place[coded.indices.to_numpy()]


def best_first(score_n: np.ndarray, most: int) -> np.ndarray:
    """Positions of the `most` largest scores, best first; ties go to the smaller position, and what is not a number comes last.

    It is the beginning of the whole stable order, without sorting the rest.
    """
    price_n = np.negative(score_n)
    if most >= len(price_n):
        return np.argsort(price_n, kind="stable")
    edge = np.partition(price_n, most)[most]
    if np.isnan(edge):
        return np.argsort(price_n, kind="stable")[:most]
    near_n = np.flatnonzero(price_n <= edge)
    return near_n[np.argsort(price_n[near_n], kind="stable")][:most]


def first_equal(text_N: np.ndarray) -> np.ndarray:
    """For each text the position of the first one equal to it."""
    order, repeats = text_order(text_N)
    start = np.maximum.accumulate(np.where(repeats, 0, np.arange(len(order))))
    first_N = np.empty(len(order), dtype=np.int64)
    first_N[order] = order[start]
    return first_N


def _repeats(ranked: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(min(1, len(ranked)), dtype=bool), ranked[1:] == ranked[:-1]])


def _keys(text_N: np.ndarray) -> np.ndarray | None:
    """Texts as rows of big-endian numbers of eight letters each, which compare alike; None beyond Latin-1."""
    if text_N.dtype.kind not in "US" or not text_N.size or not text_N.dtype.itemsize:
        return None
    codes = np.ascontiguousarray(text_N).view(np.uint32 if text_N.dtype.kind == "U" else np.uint8)
    codes = codes.reshape(len(text_N), -1)
    if codes.max() > 255:
        return None
    width = -(-codes.shape[1] // 8) * 8
    if codes.dtype == np.uint8 and codes.shape[1] == width:
        letters = codes
    else:
        letters = np.zeros((len(codes), width), np.uint8)
        letters[:, : codes.shape[1]] = codes
    return letters.view(">u8")


def as_text(values: np.ndarray) -> np.ndarray:
    """Texts as numpy holds them: ASCII bytes as they are, anything else as `str`."""
    values = np.asarray(values)
    return values if values.dtype.kind == "S" else values.astype(str, copy=False)
