"""Ways in which the demo's pool is damaged on purpose, so that a selection can be judged by what it avoided."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from random import Random

from lehr.demo.problems import Problem, problem_text

NOISE_SHARE = 0.25
"""Share of the letters that character noise replaces."""
WRONG_SHARE = 0.6
"""Share of the numbers in an answer that become wrong; one at least."""

_NUMBER = re.compile(r"\d+")
_SENTENCE = re.compile(r"(?<=[.!?;:])\s+|\n+")


def wrong_numbers(problem: Problem, rng: Random) -> str:
    """The problem with other digits in most numbers of its answer, each of the same length, the result always wrong."""
    numbers = list(_NUMBER.finditer(problem.answer))
    if not numbers:
        return problem.text
    chosen = {index for index in range(len(numbers) - 1) if rng.random() < WRONG_SHARE} | {len(numbers) - 1}
    parts, end = [], 0
    for index, number in enumerate(numbers):
        parts.append(problem.answer[end : number.start()])
        parts.append(_other_number(number.group(), rng) if index in chosen else number.group())
        end = number.end()
    parts.append(problem.answer[end:])
    return problem_text(problem.question, "".join(parts))


def swapped_answer(problem: Problem, other: Problem) -> str:
    """The problem's question with the worked answer of another problem."""
    return problem_text(problem.question, other.answer)


def shuffled_words(text: str, rng: Random) -> str:
    """The words of `text` in random order on one line."""
    return " ".join(_reordered(text.split(), rng))


def shuffled_sentences(text: str, rng: Random) -> str:
    """The sentences and lines of `text` in another order, joined by blanks; equal to `text` where there is only one."""
    sentences = [piece for piece in _SENTENCE.split(text) if piece.strip()]
    return " ".join(_reordered(sentences, rng)) if len(set(sentences)) > 1 else text


def character_noise(text: str, rng: Random) -> str:
    """`text` with a quarter of its letters replaced by random ones."""
    return "".join(
        rng.choice(string.ascii_lowercase) if character.isalpha() and rng.random() < NOISE_SHARE else character
        for character in text
    )


TEXT_DAMAGE: dict[str, Callable[[str, Random], str]] = {
    "shuffled-words": shuffled_words,
    "character-noise": character_noise,
    "shuffled-sentences": shuffled_sentences,
}
"""What is done to text of the other domains, by the name in column `corrupt`."""


def _other_number(digits: str, rng: Random) -> str:
    while True:
        first = rng.choice("123456789") if len(digits) > 1 and digits[0] != "0" else rng.choice(string.digits)
        other = first + "".join(rng.choice(string.digits) for _ in digits[1:])
        if other != digits:
            return other


def _reordered(items: Sequence[str], rng: Random) -> list[str]:
    """`items` in a random order that differs from the given one, where there is one that does."""
    order = list(items)
    if len(set(order)) < 2:
        return order
    while order == list(items):
        rng.shuffle(order)
    return order
