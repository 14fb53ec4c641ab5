"""What of a training's spec may change while it is unfinished: how many steps it takes, where no step so far would have been another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from schemas.declared import declare, read_declared
from schemas.errors import InputError
from schemas.fingerprint import fingerprint, plain, pretty_json
from schemas.run import Run
from schemas.storage import exists, write_whole
from trainer.checkpoints import latest_checkpoint, read_state


def identity(spec: dict[str, Any]) -> str:
    """Fingerprint that the rows of a training are written under: without the number of steps, where that may change."""
    kept = {key: value for key, value in spec.items() if key != "steps" or _spread(spec)}
    return fingerprint(kept)


def declare_training(run: Run, name: str, spec: dict[str, Any], total_steps: Callable[[int], int]) -> None:
    """Fix the spec of training `name`, or take over its new number of steps. Raises `InputError` naming every option in which it differs.

    `total_steps` says how many steps come of what was asked for (0: to the end of the stream).
    """
    spec, url = plain(spec), run.path(f"{run.training_folder(name)}/spec.json")
    known = read_declared(url, "training") if exists(url) else spec
    if {key for key in {*known, *spec} if known.get(key) != spec.get(key)} != {"steps"}:
        declare(url, "training", name, spec)
        return
    refusal = _refusal(run, name, spec, total_steps(known["steps"]), total_steps(spec["steps"]))
    if refusal:
        raise InputError(
            f"training {name!r} exists with another spec: steps was {known['steps']} and is now {spec['steps']}, and {refusal}"
        )
    write_whole(url, pretty_json({"spec": spec, "fingerprint": fingerprint(spec)}))


def _spread(spec: dict[str, Any]) -> str:
    """What is spread over all steps from the first on, so that each would be another in a longer training; empty for nothing."""
    if spec["batch_schedule"]:
        return "batch_schedule places sizes by shares of the training"
    if spec["average_tail"]:
        return "average_tail is a share of the training"
    if spec["schedule"] != "constant" and not spec["decay_from"]:
        return f"schedule {spec['schedule']} spreads the learning rate over all steps"
    return ""


def _refusal(run: Run, name: str, spec: dict[str, Any], before: int, after: int) -> str:
    """Why a training of `before` steps cannot become one of `after`, and the way out; empty where it can."""
    spread = _spread(spec)
    if spread:
        return f"{spread}: only under schedule constant, or before decay_from, can the number of steps change. Use the same, or another --name"
    url = latest_checkpoint(run.path(f"{run.training_folder(name)}/checkpoints"))
    state = read_state(url) if url else None
    taken = state.step if state else 0
    if exists(run.path(run.manifest_path("train", name))) or (state and state.ended):
        return f"it has finished after {taken} steps. To go on from there, start another training --from {name}"
    if after <= taken:
        return f"it has taken {taken} steps: ask for more, or use another --name"
    held = 1.0 if spec["schedule"] == "constant" else spec["decay_from"]
    if taken and (taken - 1) / min(before, after) >= held:
        return (
            f"the decay of the learning rate has begun, or would have, within the {taken} steps it has taken (decay_from {held}): "
            "use the same, or another --name"
        )
    return ""
