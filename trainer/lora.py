"""Adapters that are trained: a fresh LoRA on a model, its folder as PEFT writes and loads it, its weights back from a checkpoint.

An adapter lives in the modules of its base model, which stays frozen. A folder that is written holds only what is trained, and names its
base model: by hub id and revision, URL or absolute path.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from schemas.errors import InputError, LehrError
from schemas.fingerprint import pretty_json
from selection_ops.adapters import CONFIG_FILE, need_peft
from selection_ops.model import causal_model

log = logging.getLogger(__name__)


def is_wrapped(model: Any) -> bool:
    """Whether a model is one that PEFT has wrapped: what is trained and saved is its adapter."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def add_lora(model: Any, *, rank: int, alpha: float, dropout: float, targets: Sequence[str], seed: int) -> Any:
    """`model` wrapped by PEFT, with a fresh LoRA in its modules and everything else frozen.

    Its output is the model's own at the start: A is random (a function of `seed`), B zero. `targets` are endings of module names;
    without any, every linear map but the head. Raises `InputError` where no module has such a name.
    """
    peft = need_peft("--lora trains an adapter")
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets) or "all-linear",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # on transposed maps, which PEFT sees by itself
        torch.manual_seed(seed)
        try:
            return peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        except ValueError as error:
            raise InputError(f"no LoRA can be put on {type(model).__name__}: {str(error)[:300]}") from error


def name_base(model: Any, base: str, revision: str | None) -> None:
    """What the folders written from a wrapped model will call the base: a URL or hub id as it is, a folder by its absolute path."""
    config = model.peft_config["default"]
    place = Path(base).expanduser()
    local = "://" not in base and place.exists()
    config.base_model_name_or_path = str(place.resolve()) if local else base
    config.revision = None if local else revision


def save_adapter(model: Any, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors; equal adapters give equal bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # that embeddings are not saved: those that are trained are, as parts of the adapter
        model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / CONFIG_FILE
    config = json.loads(path.read_bytes())
    # PEFT keeps the names of modules as sets, which it writes in any order.
    ordered = {
        k: sorted(v) if isinstance(v, list) and all(isinstance(x, str) for x in v) else v for k, v in config.items()
    }
    path.write_bytes(pretty_json(ordered))


def load_adapter(model: Any, tensors: Mapping[str, Tensor], where: str) -> None:
    """Weights of an adapter folder into a wrapped model, bitwise. Raises `LehrError` where they are those of another adapter."""
    peft = need_peft(f"{where} holds an adapter")
    wanted = {
        name: value.shape for name, value in peft.get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    differing = sorted(
        {name for name in {*wanted, *tensors} if name not in tensors or tensors[name].shape != wanted.get(name)}
    )
    if differing:
        raise LehrError(
            f"{where}: weights do not fit the adapter (such as {differing[0]}); it belongs to another model"
        )
    peft.set_peft_model_state_dict(model, dict(tensors))


def save_merged(model: Any, folder: Path) -> None:
    """The base model with the adapter added to its weights, as a model folder. Takes a copy of the model."""
    merged = copy.deepcopy(model).merge_and_unload()
    causal_model(merged).save_pretrained(str(folder))
