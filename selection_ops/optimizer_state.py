"""Reading optimizer states: Lehr's checkpoints, safetensors by parameter name, files of torch.save; never anything but tensors and numbers.

A state is kept as tensors by `<parameter>:<moment>`. Moments of AdamW are exp_avg, exp_avg_sq and step; of Adafactor exp_avg_sq_row
(means of the last dimension), exp_avg_sq_col (means of the one before) and exp_avg_sq where a parameter is no matrix; of Muon
momentum_buffer. A training with Muon has AdamW's for what is no matrix of the blocks, where there is any, and counts as adamw then.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import orjson
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file
from torch import Tensor, nn

from schemas.errors import CorruptFile, InputError
from schemas.fingerprint import canonical_json
from schemas.storage import exists, filesystem, is_local, join, read_bytes, sha256

OPTIMIZER_FILE = "optimizer.safetensors"
PICKLED_FILE = "optimizer.pt"
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
MUON_MOMENTS = ("momentum_buffer",)

_WAYS = f"name a checkpoint folder, an {PICKLED_FILE} or an {OPTIMIZER_FILE}"

Optimizer = Literal["adamw", "adafactor", "muon"]

_FACTORS = {"row_var": "exp_avg_sq_row", "col_var": "exp_avg_sq_col", "variance": "exp_avg_sq"}
"""torch's names of Adafactor's moments, and transformers'."""
_TORCH_ENDINGS = (".pt", ".pth", ".bin")
_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)
"""Parameters that transformers' Trainer puts into its second group, the one without weight decay."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamNumbers:
    """Constants of AdamW that its steps depend on; torch's defaults where a file does not say."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerState:
    """Moments by `<parameter>:<moment>`, on the CPU; mapped from a local file, not copied, where that can be."""

    optimizer: Optimizer
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, AdamNumbers]
    """Constants by parameter; a parameter that is not named has the defaults."""
    where: str
    """The file, for messages."""

    @property
    def fingerprint(self) -> str:
        """Fingerprint of names, types, shapes and bytes of the tensors, in the order of names."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]))
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:32]

    @property
    def steps(self) -> int:
        """Most steps that a parameter has seen; 0 where the state does not count them."""
        return max((int(value) for name, value in self.tensors.items() if name.endswith(":step")), default=0)


def read_optimizer(place: str, model: nn.Module | None = None) -> OptimizerState:
    """The state in a checkpoint folder (Lehr's or transformers' Trainer's), a safetensors file or a file of torch.save.

    A file of torch.save numbers its parameters; `model` says which they are, by order and shape. Raises `InputError` where there
    is no state, or not one of this model, and `CorruptFile` where it is damaged.
    """
    url = _file(place)
    if url.endswith(_TORCH_ENDINGS):
        tensors, numbers = _by_name(_read_pickled(url), url, model)
    else:
        if url != place:
            _check_listed(place, url)
        try:
            tensors = read_tensors(url)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(f"{url} does not exist; {_WAYS}") from error
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CorruptFile(f"{url} is not a readable safetensors file ({error})") from error
        numbers = _lehr_numbers(place, tensors) if url != place else {}
    if any(name.endswith(":exp_avg_sq_row") for name in tensors):
        kind: Optimizer = "adafactor"
    elif any(name.endswith(":exp_avg_sq") for name in tensors):
        kind = "adamw"
    elif any(name.rpartition(":")[2] in MUON_MOMENTS for name in tensors):
        kind = "muon"
    else:
        raise InputError(f"{url} holds no `<parameter>:exp_avg_sq`; it is not an optimizer state")
    return OptimizerState(optimizer=kind, tensors=tensors, numbers=numbers, where=url)


def _file(place: str) -> str:
    """The file that is meant: `place` itself, or the one in that folder."""
    if place.endswith((".safetensors", *_TORCH_ENDINGS)):
        return place
    whole, pickled = join(place, OPTIMIZER_FILE), join(place, PICKLED_FILE)
    return pickled if not exists(whole) and exists(pickled) else whole


def read_tensors(url: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file; mapped, not copied, where it lies on a local disk. Copy what you keep."""
    return load_file(filesystem(url)[1]) if is_local(url) else load_tensors(read_bytes(url))


def file_sha256(url: str) -> str:
    """Hex SHA-256 of a file, of which no copy is made in memory where it lies on a local disk."""
    if not is_local(url):
        return sha256(read_bytes(url))
    with open(filesystem(url)[1], "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _check_listed(folder: str, url: str) -> None:
    """Raise `CorruptFile` where the folder's manifest lists other bytes."""
    manifest = join(folder, MANIFEST_FILE)
    if not exists(manifest):
        return
    try:
        listed = {file["path"]: file["sha256"] for file in orjson.loads(read_bytes(manifest))["files"]}
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFile(f"{manifest} is damaged ({error})") from error
    if exists(url) and listed.get(OPTIMIZER_FILE) != file_sha256(url):
        raise CorruptFile(f"{url} differs from the manifest of its checkpoint; it is damaged")


def _lehr_numbers(folder: str, tensors: Mapping[str, Tensor]) -> dict[str, AdamNumbers]:
    """Constants that a checkpoint of Lehr's trainer was made with."""
    url = join(folder, STATE_FILE)
    if not exists(url):
        return {}
    try:
        spec = orjson.loads(read_bytes(url))["spec"]
        numbers = AdamNumbers(**{name: float(spec[name]) for name in ("beta1", "beta2", "eps")})
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFile(f"{url} is damaged ({error})") from error
    return {name.rpartition(":")[0]: numbers for name in tensors}


def _read_pickled(url: str) -> dict[str, Any]:
    """The state dict in a file of torch.save. Only tensors, containers and numbers are ever built from it."""
    try:
        if is_local(url):
            try:
                record = torch.load(filesystem(url)[1], map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format before torch 1.6 cannot be mapped
                record = torch.load(filesystem(url)[1], map_location="cpu", weights_only=True)
        else:
            record = torch.load(io.BytesIO(read_bytes(url)), map_location="cpu", weights_only=True)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{url} does not exist; {_WAYS}") from error
    except torch.serialization.pickle.UnpicklingError as error:  # type: ignore[attr-defined]
        # torch's own words advise to open it all the same.
        raise InputError(
            f"{url} is damaged, or holds more than tensors and numbers, and is not opened: save the optimizer's state_dict() alone"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CorruptFile(f"{url} is not a readable file of torch.save ({error})") from error
    if isinstance(record, dict) and "state" not in record and isinstance(record.get("optimizer"), dict):
        record = record["optimizer"]
    sound = isinstance(record, dict) and isinstance(record.get("state"), dict)
    if not sound or not isinstance(record.get("param_groups"), list):
        raise InputError(
            f"{url} is no state_dict of a torch optimizer (keys state and param_groups); of a sharded or DeepSpeed checkpoint, save the "
            "consolidated one"
        )
    return record


def _by_name(
    record: dict[str, Any], url: str, model: nn.Module | None
) -> tuple[dict[str, Tensor], dict[str, AdamNumbers]]:
    """Moments and constants by parameter name."""
    names = _names(record, url, model)
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, AdamNumbers] = {}
    for group in record["param_groups"]:
        betas, eps = group.get("betas"), group.get("eps")
        for key in group["params"]:
            name = names[key]
            if betas is not None and isinstance(eps, float):
                numbers[name] = AdamNumbers(beta1=float(betas[0]), beta2=float(betas[1]), eps=eps)
            for moment, value in record["state"].get(key, {}).items():
                tensors.update(_moment(name, moment, value))
            if f"{name}:max_exp_avg_sq" in tensors:  # AMSGrad divides by the largest
                tensors[f"{name}:exp_avg_sq"] = tensors.pop(f"{name}:max_exp_avg_sq")
    if not any(name.partition(":")[2].startswith("exp_avg_sq") for name in tensors):
        held = sorted({moment for state in record["state"].values() for moment in state})
        raise InputError(f"{url} keeps no second moments (it has {', '.join(held) or 'no state at all'})")
    return tensors, numbers


def _moment(name: str, moment: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(value, Tensor | int | float):
        return
    tensor = torch.as_tensor(value)
    if moment == "row_var":
        tensor = tensor.squeeze(-1)
    elif moment == "col_var":
        tensor = tensor.squeeze(-2)
    yield f"{name}:{_FACTORS.get(moment, moment)}", tensor


def _names(record: dict[str, Any], url: str, model: nn.Module | None) -> dict[Any, str]:
    """Which parameter every number of a state dict is."""
    groups = record["param_groups"]
    if all("param_names" in group for group in groups):
        return {key: name for group in groups for key, name in zip(group["params"], group["param_names"])}
    if all(isinstance(key, str) for group in groups for key in group["params"]):
        return {key: key for group in groups for key in group["params"]}
    if model is None:
        raise InputError(f"{url} numbers its parameters, and no model is at hand to say which they are")
    keys = [key for group in groups for key in group["params"]]
    parameters = dict(model.named_parameters())
    for order in _orders(model, len(groups)):
        if [len(part) for part in order] != [len(group["params"]) for group in groups]:
            continue
        names = dict(zip(keys, (name for part in order for name in part)))
        if all(_fits(record["state"].get(key, {}), parameters[name]) for key, name in names.items()):
            return names
    sizes = ", ".join(str(len(group["params"])) for group in groups)
    raise InputError(
        f"{url} numbers its parameters (groups of {sizes}), and they fit {type(model).__name__} in no known order: make the optimizer "
        "from named parameters, so that its state_dict holds param_names, or save `<parameter>:exp_avg_sq` as safetensors"
    )


def _orders(model: nn.Module, groups: int) -> Iterator[Sequence[list[str]]]:
    """Orders in which trainers hand parameters to an optimizer, by group. Two that differ put a vector where the other has a matrix,
    so that shapes tell them apart."""
    parameters = dict(model.named_parameters())
    normalised = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters(recurse=False)
    }
    splits: tuple[Callable[[str], bool], ...] = (
        lambda name: name not in normalised and not _UNDECAYED.search(name),
        lambda name: parameters[name].dim() >= 2,
    )
    adapters = [name for name in parameters if "lora_" in name]
    for names in (list(parameters), adapters):
        if groups == 1:
            yield [names]
        elif groups == 2:
            for decayed in splits:
                yield [[name for name in names if decayed(name)], [name for name in names if not decayed(name)]]


def _fits(state: Mapping[str, Any], parameter: Tensor) -> bool:
    """Whether moments have a parameter's shape; a parameter without state has not been trained."""
    shape = parameter.shape
    whole = state.get("exp_avg_sq", state.get("variance"))
    if whole is not None:
        return whole.shape == shape
    row, column = (state.get(f"exp_avg_sq_{side}", state.get(f"{side}_var")) for side in ("row", "col"))
    if row is None or column is None:
        return True
    return row.numel() == shape[:-1].numel() and column.numel() == torch.Size((*shape[:-2], *shape[-1:])).numel()
