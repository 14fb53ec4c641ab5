"""Checkpoints: a model folder that transformers loads, optimizer moments without pickle, a cursor; the manifest last.

A folder without a manifest, or with a file that differs from it, is torn: it is passed over with a warning.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from schemas.errors import CorruptFile, InputError, LehrError
from schemas.fingerprint import fingerprint, pretty_json
from schemas.parquet import Part
from schemas.storage import (
    join,
    list_folders,
    list_names,
    read_bytes,
    remove,
    sha256,
    write_whole,
)
from selection_ops.model import causal_model, quiet
from selection_ops.optimizer_state import (
    MANIFEST_FILE,
    MOMENTS,
    MUON_MOMENTS,
    OPTIMIZER_FILE,
    STATE_FILE,
    file_sha256,
    read_tensors,
)
from trainer.lora import is_wrapped, load_adapter
from trainer.optimizers import AnyOptimizer
from trainer.sharding import laid_like, whole
from trainer.trainee import Trainee

log = logging.getLogger(__name__)

TARGET_FILE = "target.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerState:
    """Everything a training needs besides weights and moments to go on as if it had never stopped."""

    step: int
    """Optimizer steps taken."""
    spec: dict[str, Any]
    """Resolved spec of the training."""
    cursor: dict[str, Any]
    """Cursor of the stream."""
    trained_tokens: int
    offered_tokens: int
    initial_eval_loss: float | None
    eval_loss: float | None
    fallbacks: int
    journal: tuple[Part, ...] = ()
    """Journal parts written so far."""
    ended: str = ""
    """Why the training ended, empty while it goes on."""
    averaged: dict[str, int] = dataclasses.field(default_factory=dict)
    """Steps that each average of the weights has taken in."""
    average_eval_loss: dict[str, float | None] = dataclasses.field(default_factory=dict)
    """Held-out loss of each average at the end."""


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def optimizer_tensors(model: nn.Module, optimizer: AnyOptimizer, *, keep: bool = True) -> dict[str, Tensor]:
    """Moments and step counts by `parameter name:moment`, whole and on the CPU; asked for by all processes, of which one may `keep` them."""
    tensors = {}
    for name, parameter in causal_model(model).named_parameters():
        state = optimizer.state.get(parameter)
        for moment in (*MOMENTS, *MUON_MOMENTS):
            if state and moment in state:
                value = whole(torch.as_tensor(state[moment]).detach())
                if keep:
                    tensors[f"{name}:{moment}"] = value.cpu().contiguous()
    return tensors


def load_optimizer_tensors(
    model: nn.Module, optimizer: AnyOptimizer, tensors: Mapping[str, Tensor], where: str
) -> None:
    """Put moments into the optimizer. Raises `InputError` naming a parameter that is missing, unknown or of another shape."""
    left = {name for name in tensors if name.split(":")[-1] in (*MOMENTS, *MUON_MOMENTS)}
    turned = {id(p) for group in optimizer.param_groups if "ns_steps" in group for p in group["params"]}
    for name, parameter in causal_model(model).named_parameters():
        if not parameter.requires_grad:
            continue
        state: dict[str, Tensor] = {}
        for moment in MUON_MOMENTS if id(parameter) in turned else MOMENTS:
            key = f"{name}:{moment}"
            if key not in tensors:
                raise InputError(f"{where} holds no {moment} of parameter {name}; it belongs to another model")
            value = tensors[key]
            if moment == "step":
                state[moment] = value.to(torch.float32).clone()
            elif value.shape != parameter.shape:
                raise InputError(
                    f"{where}: {moment} of {name} has shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}; "
                    "it belongs to another model"
                )
            else:
                state[moment] = laid_like(value.to(parameter.device, parameter.dtype), parameter).clone()
            left.discard(key)
        optimizer.state[parameter] = state
    if left:
        raise InputError(f"{where} holds moments of {sorted(left)[0].split(':')[0]}, which this model does not have")


def write_checkpoint(
    folder_url: str,
    trainee: Trainee,
    moments: Mapping[str, Tensor] | None,
    state: TrainerState,
    beside: Mapping[str, Callable[[Path], None]] | None = None,
    weights: dict[str, Tensor] | None = None,
    target: Mapping[str, Tensor] | None = None,
) -> tuple[str, dict[str, tuple[int, str]]]:
    """Write checkpoint `state.step` below `folder_url`; returns its URL and (bytes, sha256) of every file, manifest included.

    `moments` (`optimizer_tensors`) may be left out. `beside` holds what writes further model folders into the checkpoint, by name.
    `weights` are the model's, where it does not hold them whole.
    `target` is what of the target's direction survives a step.
    """
    url = join(folder_url, checkpoint_name(state.step))
    written: dict[str, tuple[int, str]] = {}

    def put(name: str, data: bytes) -> None:
        write_whole(join(url, name), data)
        written[name] = (len(data), sha256(data))

    def save_trainee(folder: Path) -> None:
        trainee.save(folder, weights)

    for prefix, save in {"": save_trainee, **(beside or {})}.items():
        with tempfile.TemporaryDirectory() as scratch, quiet():
            save(Path(scratch))
            for file in sorted(path for path in Path(scratch).rglob("*") if path.is_file()):
                put((Path(prefix) / file.relative_to(scratch)).as_posix(), file.read_bytes())
                file.unlink()  # one file at a time twice on disk, not the whole model
    if moments is not None:
        put(OPTIMIZER_FILE, save_tensors(dict(moments)))
    if target:
        put(TARGET_FILE, save_tensors(dict(target)))
    put(STATE_FILE, pretty_json(state))
    files = [{"path": name, "bytes": size, "sha256": digest} for name, (size, digest) in sorted(written.items())]
    put(
        MANIFEST_FILE,
        pretty_json({"step": state.step, "files": files, "fingerprint": fingerprint([state.step, files])}),
    )
    return url, written


def verify_checkpoint(url: str) -> None:
    """Raise `CorruptFile` with the reason where a checkpoint folder is not whole."""
    try:
        record = orjson.loads(read_bytes(join(url, MANIFEST_FILE)))
        if record["fingerprint"] != fingerprint([record["step"], record["files"]]):
            raise CorruptFile(f"its {MANIFEST_FILE} does not match its fingerprint")
        for file in record["files"]:
            if file_sha256(join(url, file["path"])) != file["sha256"]:
                raise CorruptFile(f"{file['path']} differs from the manifest")
    except FileNotFoundError as error:
        raise CorruptFile(f"{Path(str(error.filename or error)).name or 'a file'} is missing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFile(f"its {MANIFEST_FILE} is damaged ({error})") from error


def latest_checkpoint(folder_url: str) -> str | None:
    """URL of the newest whole checkpoint below `folder_url`; torn ones are passed over with a warning."""
    for name in sorted(list_folders(folder_url), reverse=True):
        if not name.startswith("step-"):
            continue
        url = join(folder_url, name)
        try:
            verify_checkpoint(url)
        except CorruptFile as error:
            log.warning("%s is torn and passed over: %s", url, error)
            continue
        return url
    return None


def read_state(url: str) -> TrainerState:
    """State of a whole checkpoint."""
    try:
        record = orjson.loads(read_bytes(join(url, STATE_FILE)))
        record["journal"] = tuple(Part(**part) for part in record["journal"])
        return TrainerState(**record)
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise CorruptFile(f"{url}/{STATE_FILE} is damaged ({error})") from error


def read_target_state(url: str) -> dict[str, Tensor]:
    """What of the target's direction a checkpoint holds; empty where nothing survives a step."""
    return read_tensors(join(url, TARGET_FILE)) if TARGET_FILE in list_names(url, ".safetensors") else {}


def load_weights(model: nn.Module, url: str) -> None:
    """Weights of a checkpoint into a model of the same architecture, bitwise; of an adapter, those alone. Names must agree, tied ones may be left out."""
    tensors: dict[str, Tensor] = {}
    for name in list_names(url, ".safetensors"):
        if name not in (OPTIMIZER_FILE, TARGET_FILE):
            tensors.update(read_tensors(join(url, name)))
    if is_wrapped(model):
        load_adapter(model, tensors, url)
        return
    own = dict(model.state_dict(keep_vars=True))
    unknown = sorted(name for name, value in tensors.items() if name not in own or own[name].shape != value.shape)
    stored = {id(own[name]) for name in tensors if name in own}
    missing = sorted(name for name, value in own.items() if name not in tensors and id(value) not in stored)
    if unknown or missing:
        raise LehrError(
            f"{url}: weights do not fit the model (unknown or of another shape {unknown[:3]}, missing {missing[:3]}); it belongs to another model"
        )
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(laid_like(value.to(own[name].device, own[name].dtype), own[name]))


def prune_checkpoints(folder_url: str, keep: int, newest: int) -> None:
    """Delete all but the `keep` newest checkpoints up to step `newest`; the manifest of each goes first."""
    names = [name for name in sorted(list_folders(folder_url)) if name.startswith("step-")]
    past = [name for name in names if name <= checkpoint_name(newest)]
    for name in past[: max(0, len(past) - keep)]:
        url = join(folder_url, name)
        try:
            remove(join(url, MANIFEST_FILE))
            remove(url, recursive=True)
        except LehrError as error:
            log.warning("an old checkpoint stays: %s", error)
