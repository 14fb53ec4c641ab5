"""The checkpoint of an earlier training that another starts from: weights, optimizer state, place in the stream, learning rate."""

from __future__ import annotations

import dataclasses
from typing import Any

import orjson

from schemas.errors import CorruptFile, InputError
from schemas.run import Run, check_name
from schemas.storage import exists, join, list_folders, read_bytes
from selection_ops.optimizer_state import MANIFEST_FILE, OPTIMIZER_FILE
from trainer.checkpoints import TrainerState, checkpoint_name, latest_checkpoint, read_state, verify_checkpoint
from trainer.earlier import read_steps
from trainer.mixing import MixedStream
from trainer.settings import TrainSettings
from trainer.stream import RankedStream


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parent:
    """A whole checkpoint of another training of the run."""

    training: str
    url: str
    state: TrainerState
    fingerprint: str
    """Fingerprint of every file of the checkpoint."""

    @property
    def name(self) -> str:
        """How `start_from` names it."""
        return f"{self.training}@{self.state.step}"


def find_parent(run: Run, start_from: str) -> Parent:
    """The checkpoint `TRAINING@STEP`, or the newest one of `TRAINING`. Raises `InputError` listing those there are."""
    training, at, step = start_from.partition("@")
    folder = run.path(f"{run.training_folder(check_name('training', training))}/checkpoints")
    known = [name for name in list_folders(folder) if name.startswith("step-")]
    there = ", ".join(str(int(name[5:])) for name in known) or "none"
    if at:
        url = join(folder, checkpoint_name(int(step))) if step.isdecimal() else ""
        if not url or not exists(join(url, MANIFEST_FILE)):
            raise InputError(
                f"training {training!r} has no checkpoint at step {step!r} (checkpoints: {there}); --keep-checkpoints says how many stay"
            )
        verify_checkpoint(url)
    else:
        found = latest_checkpoint(folder)
        if found is None:
            raise InputError(
                f"{run.url} has no checkpoint of a training {training!r} to start from (checkpoints: {there})"
            )
        url = found
    try:
        fingerprint = str(orjson.loads(read_bytes(join(url, MANIFEST_FILE)))["fingerprint"])
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise CorruptFile(f"{url}/{MANIFEST_FILE} is damaged ({error})") from error
    return Parent(training=training, url=url, state=read_state(url), fingerprint=fingerprint)


def inherit(run: Run, settings: TrainSettings, parent: Parent) -> TrainSettings:
    """`settings` with what they take from `parent` filled in: model, optimizer state, and the rate that a re-warm starts at.

    Raises `InputError` where the parent lacks what is asked for.
    """
    if settings.model:
        raise InputError("give --model or --from, not both: each says what is trained")
    changes: dict[str, Any] = {"model": parent.url, "revision": ""}
    if settings.from_optimizer and not settings.optimizer_state:
        if settings.lora:
            raise InputError("a fresh adapter has no optimizer state to go on with: add --no-from-optimizer")
        if not exists(join(parent.url, OPTIMIZER_FILE)):
            raise InputError(
                f"the checkpoint {parent.name} holds no optimizer state (it was trained with --no-final-optimizer): start from an earlier "
                "one, or add --no-from-optimizer"
            )
        changes["optimizer_state"] = parent.url
    if settings.rewarm:
        changes |= {"rewarm": False, "warmup_from": _last_rate(run, parent) / settings.lr}
        if changes["warmup_from"] > 1:
            raise InputError(
                f"training {parent.name} ended at a learning rate of {_last_rate(run, parent):g}, above the peak of {settings.lr:g}: "
                "there is nothing to warm up to. Raise lr, or leave rewarm out"
            )
    return dataclasses.replace(settings, **changes)


def _last_rate(run: Run, parent: Parent) -> float:
    """Learning rate of the step that a checkpoint was written after."""
    rates = read_steps(run, parent.training, parent.state.journal)["learning_rate"]
    return float(rates[-1].as_py())


def go_on(stream: RankedStream | MixedStream, parent: Parent) -> None:
    """Put the cursor of `stream` where the parent's stood; it may have more epochs. Raises `InputError` where it is another stream,
    and where nothing is left of it."""
    cursor = dict(parent.state.cursor)
    if isinstance(stream, RankedStream):
        cursor["epochs"] = stream.epochs
    elif "streams" in cursor:
        cursor["streams"] = {
            name: {**part, "epochs": stream.streams[name].epochs} if name in stream.streams else part
            for name, part in cursor["streams"].items()
        }
    stream.load_state_dict(cursor)
    if stream.exhausted:
        raise InputError(
            f"training {parent.name} has read all {len(stream)} samples of the stream: raise epochs, or leave from_cursor out"
        )
