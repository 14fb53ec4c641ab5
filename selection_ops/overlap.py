"""Contamination: how much of a candidate's wording stands in the target's samples.

Words are compared lower-cased with every run of digits masked, so that a template filled with other numbers is found.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from schemas.sample import Sample

NGRAM_WORDS = 8
OVERLAP_LIMIT = 0.30
"""Candidates with a larger share of matching n-grams are left out by default."""

_DIGITS = re.compile(r"\d+")
_WORD = re.compile(r"[^\W\d]+|#", re.UNICODE)


def masked_ngrams(text: str, size: int = NGRAM_WORDS) -> list[str]:
    """Every run of `size` words of `text`, lower-cased, numbers masked; empty where the text has fewer words."""
    words = _WORD.findall(_DIGITS.sub(" # ", text.lower()))
    return [" ".join(words[start : start + size]) for start in range(len(words) - size + 1)]


class OverlapIndex:
    """The n-grams and content ids of a target's reference and evaluation samples."""

    def __init__(self, parts: dict[str, Iterable[Sample]]) -> None:
        self._content: dict[str, set[str]] = {}
        self._ngrams: dict[str, set[str]] = {}
        for name, samples in parts.items():
            held = list(samples)
            self._content[name] = {sample.content_id for sample in held}
            self._ngrams[name] = {ngram for sample in held for ngram in masked_ngrams(sample.text)}

    def overlap(self, sample: Sample) -> tuple[float, str]:
        """(largest share of the sample's n-grams that a part holds, the parts over the limit joined by ' and ').

        Equal `content_id` counts as a share of 1. A sample of fewer than eight words has no n-grams: only equality counts.
        """
        ngrams = masked_ngrams(sample.text)
        largest, over = 0.0, []
        for name, content in self._content.items():
            if sample.content_id in content:
                share = 1.0
            elif ngrams:
                held = self._ngrams[name]
                share = sum(ngram in held for ngram in ngrams) / len(ngrams)
            else:
                share = 0.0
            largest = max(largest, share)
            if share > OVERLAP_LIMIT:
                over.append(name)
        return largest, " and ".join(over)
