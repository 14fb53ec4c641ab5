"""The contract of a logger: it is made when a training begins or goes on, told of every step, and closed at the end.

A new one is a class with `step` and `close`, decorated with `@logger("mine")`; `--loggers console mine` then uses it. An installed package
names the file among its entry points, group `lehr.loggers`; then every process of Lehr knows it. What a logger shows is never a
result: it cannot change a training, and the journal holds the same figures.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from schemas.errors import InputError
from schemas.plugins import load_installed

ENTRY_POINTS = "lehr.loggers"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Begun:
    """What a logger is told when a training begins, or goes on after a stop."""

    name: str
    """Name of the training."""
    folder: str
    """URL of a folder for what is never compared, such as event files."""
    steps_done: int
    """Steps that an earlier process has taken, up to the checkpoint that this one goes on from; later ones are taken again."""
    spec: Mapping[str, Any]
    """Resolved spec of the training."""
    choices: Mapping[str, str]
    """What was decided for this training and why, in words: policy, mode, arithmetic."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """A step that was taken. `lehr schema steps` and `lehr schema timings` say what the rows hold."""

    share: float
    """Part of the training that is done."""
    row: Mapping[str, Any]
    """Its row in `steps`."""
    timing: Mapping[str, Any]
    """Its row in `timings`."""

    @property
    def step(self) -> int:
        """Optimizer step, from 1."""
        return int(self.row["step"])

    @property
    def loss(self) -> float:
        """Step loss before the update, nats per token."""
        return float(self.row["loss"])

    @property
    def eval_loss(self) -> float | None:
        """Loss on the held-out set after the update, where it was taken."""
        return self.row["eval_loss"]

    @property
    def kept_share(self) -> float:
        """Candidates kept among those offered."""
        return self.row["kept"] / self.row["offered"]

    @property
    def seconds(self) -> float:
        """Wall time of the step without evaluations."""
        return self.timing["seconds"] - self.timing["evaluation_seconds"]


class Logger(Protocol):
    """One place where figures go."""

    def step(self, event: Progress) -> None:
        """Take in a step."""
        ...

    def close(self) -> None:
        """The training has ended, or was stopped by an error."""
        ...


LoggerType = Callable[[Begun], Logger]
_REGISTRY: dict[str, LoggerType] = {}


def logger(name: str) -> Callable[[type], type]:
    """Class decorator: the logger is known as `name`; the class is built from `Begun`."""

    def keep(cls: type) -> type:
        _REGISTRY[name] = cls
        return cls

    return keep


def _own() -> list[str]:
    import trainer.loggers as package

    return [found.name for found in pkgutil.iter_modules(package.__path__) if found.name != "base"]


def logger_names() -> list[str]:
    """Every logger there is; of those that ship with Lehr a module is named as its logger."""
    load_installed(ENTRY_POINTS, "logger")
    return sorted({*_own(), *_REGISTRY})


def get_logger(name: str) -> LoggerType:
    """The logger called `name`. Raises `InputError` listing the known ones, or naming the extra that one needs."""
    if name not in _REGISTRY and name in _own():
        importlib.import_module(f"trainer.loggers.{name}")
    if name not in _REGISTRY:
        known = logger_names()
        if name not in _REGISTRY:
            raise InputError(f"unknown logger {name!r}: choose among {', '.join(known)}")
    return _REGISTRY[name]
