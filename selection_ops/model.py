"""Loading a causal language model and its tokenizer, and their fingerprints.

Code from a model's folder is never run and pickled weights are never read. Locations are a folder, a .gguf file, any fsspec
URL of one, or a hub id `owner/name`; what lies there may be a PEFT adapter, which is loaded into its base model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from schemas.errors import InputError
from schemas.fingerprint import hash128
from schemas.spec import DType
from selection_ops.adapters import attach, read_adapter
from selection_ops.locations import local_folder

log = logging.getLogger(__name__)

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)
_TOKENIZER_BODY = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
_LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, TypeError, SafetensorError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to be scored with: eval mode, so without dropout; and fingerprints of what it was read from."""

    model: nn.Module
    tokenizer: Any
    model_fingerprint: str
    tokenizer_fingerprint: str
    location: str
    adapters: tuple[str, ...] = ()
    """Names of the parameters that belong to the adapter, where the location is an adapter folder."""
    wrapped: Any = None
    """The same model as PEFT has wrapped it, there; what saves an adapter."""


def default_dtype(device: str) -> DType:
    """bfloat16 where the hardware multiplies it fast (accelerators; CPUs with AMX or AVX-512 bf16), else float32."""
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device != "cpu":
        return "float32"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"


def default_attention(device: str, dtype: str = "bfloat16") -> str:
    """`sdpa`, but plain matrix products for bfloat16 on CPU.

    Scoring on one core with AVX-512 bf16, eager takes 0.88 (35M Llama) and 0.77 (135M) of sdpa's time in bfloat16, whose backward
    is slow there, and 1.03 of it in float32. In float64, eager attention rounds its softmax to float32.
    """
    return "eager" if device == "cpu" and dtype == "bfloat16" else "sdpa"


def choose_attention(location: str, device: str, dtype: str, *, revision: str | None = None) -> str:
    """`default_attention`, but `eager` for a model that transformers has no other implementation of (Gemma 2, Mamba)."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    wanted = default_attention(device, dtype)
    adapter = read_adapter(location, revision)
    if adapter is not None:
        location, revision = adapter.base, None
    folder = local_folder(location, revision)
    if wanted == "eager" or not (folder / "config.json").is_file():
        return wanted
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except _LOAD_ERRORS:
        return wanted  # loading it says what is wrong
    return wanted if getattr(kind, "_supports_sdpa", True) else "eager"


def default_batch_tokens(device: str, dtype: str) -> int:
    """Longest x count of a scoring batch: what a core's cache holds, or what fills an accelerator.

    One core with AVX-512, 35M Llama: in float32, 512 tokens take 0.89 of the time of 1,024; in bfloat16 it makes no difference, and
    larger products suit AMX.
    """
    if device != "cpu":
        return 4096
    return 1024 if dtype == "bfloat16" else 512


def causal_model(model: Any) -> Any:
    """The causal language model itself, with its adapters in it, where PEFT has wrapped it."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own progress bars, which would write into ours."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside; outside, each in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _gguf(location: str, folder: Path) -> str | None:
    """Name of the .gguf file that holds the weights, if they are in one."""
    if Path(location).suffix == ".gguf" and (folder / Path(location).name).is_file():
        return Path(location).name
    files = sorted(folder.glob("*.gguf"))
    if not files or any(folder.glob("*.safetensors")):
        return None
    if len(files) > 1:
        raise InputError(f"{location} holds {len(files)} .gguf files; name one: {', '.join(f.name for f in files[:5])}")
    return files[0].name


@lru_cache(maxsize=256)
def _file_digest(path: Path, size: int, modified: int) -> bytes:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").digest()


def _digest(paths: list[Path]) -> str:
    pieces = []
    for path in sorted(paths):
        stat = path.stat()
        pieces += [path.name.encode(), _file_digest(path, stat.st_size, stat.st_mtime_ns)]
    return hash128(*pieces)


def model_fingerprint(location: str, *, revision: str | None = None) -> str:
    """Hash of the weight files and config.json (the generation settings do not change a score); of an adapter, with its base."""
    adapter = read_adapter(location, revision)
    if adapter is not None:
        parts = (_digest([adapter.weights]), adapter.settings, model_fingerprint(adapter.base))
        return hash128(b"adapter", *(part.encode() for part in parts))
    folder = local_folder(location, revision)
    gguf = _gguf(location, folder)
    if gguf:
        return _digest([folder / gguf])
    weights = list(folder.glob("*.safetensors"))
    if not weights:
        pickled = [file.name for ending in ("*.bin", "*.pt", "*.pth") for file in folder.glob(ending)]
        found = f"; {pickled[0]} is pickled, which is never read: convert it to safetensors" if pickled else ""
        raise InputError(f"{location}: no weights (*.safetensors or one *.gguf){found}")
    if not (folder / "config.json").is_file():
        raise InputError(f"{location}: no config.json beside the weights")
    return _digest([*weights, folder / "config.json"])


def _tokenizer_place(location: str, revision: str | None) -> tuple[str, str | None]:
    """Where the tokenizer lies: an adapter folder without one takes that of its base model."""
    adapter = read_adapter(location, revision)
    if adapter is None or any((adapter.folder / name).is_file() for name in _TOKENIZER_BODY):
        return location, revision
    return adapter.base, None


def tokenizer_fingerprint(location: str, *, revision: str | None = None) -> str:
    """Hash of the tokenizer's files; of the .gguf file where it holds the tokenizer."""
    location, revision = _tokenizer_place(location, revision)
    folder = local_folder(location, revision)
    files = _tokenizer_files(folder)
    if not files:
        gguf = _gguf(location, folder)
        if not gguf:
            raise InputError(f"{location}: no tokenizer (tokenizer.json) beside the weights")
        return _digest([folder / gguf])
    return _digest(files)


def _tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer; none where the folder holds none of its own."""
    if not any((folder / name).is_file() for name in _TOKENIZER_BODY):
        return []
    files = [folder / name for name in _TOKENIZER if (folder / name).is_file()]
    return files + sorted((folder / "additional_chat_templates").glob("*.jinja"))


def save_tokenizer(loaded: LoadedModel, folder: Path, *, revision: str | None = None) -> None:
    """The tokenizer that a model was loaded with, file by file: saved by transformers it would have another fingerprint.

    One that comes out of a .gguf file is written as transformers does.
    """
    place = local_folder(*_tokenizer_place(loaded.location, revision))
    files = _tokenizer_files(place)
    for file in files:
        target = folder / file.relative_to(place)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    if not files:
        loaded.tokenizer.save_pretrained(folder)


def load_tokenizer(location: str, *, revision: str | None = None) -> Any:
    """The tokenizer alone. Raises `InputError` where there is none or it cannot be loaded."""
    from transformers import AutoTokenizer

    location, revision = _tokenizer_place(location, revision)
    folder = local_folder(location, revision)
    tokenizer_fingerprint(location, revision=revision)
    own_files = any((folder / name).is_file() for name in _TOKENIZER_BODY)
    extra = {} if own_files else {"gguf_file": _gguf(location, folder)}
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, **extra)
    except _LOAD_ERRORS as error:
        raise _cannot_load(location, "the tokenizer", error) from error


def load_model(
    location: str, *, revision: str | None = None, dtype: DType, attention: str, device: str = "cpu"
) -> LoadedModel:
    """Model and tokenizer, in eval mode on `device`.

    Raises `InputError` for an unknown place, missing weights or tokenizer, a configuration that wants code of its own, a model
    that is not causal, weights that leave a parameter at its random initialisation.
    """
    adapter = read_adapter(location, revision)
    fingerprint = model_fingerprint(location, revision=revision)
    place, folder = (
        (location, local_folder(location, revision)) if adapter is None else (adapter.base, local_folder(adapter.base))
    )
    if not _gguf(place, folder):
        _check_config(place, folder / "config.json")
    tokenizer = load_tokenizer(location, revision=revision)
    model = _load(place, folder, dtype, attention)
    adapters: tuple[str, ...] = ()
    wrapped: Any = None
    if adapter is not None:
        try:
            wrapped, adapters = attach(adapter, model)
            model = wrapped.get_base_model()
        except _LOAD_ERRORS as error:
            raise _cannot_load(location, "the adapter", error) from error
    model = model.eval().to(device)
    _check_causal(location, model)
    return LoadedModel(
        model=model, tokenizer=tokenizer, model_fingerprint=fingerprint,
        tokenizer_fingerprint=tokenizer_fingerprint(location, revision=revision), location=location, adapters=adapters, wrapped=wrapped,
    )  # fmt: skip


def _load(location: str, folder: Path, dtype: DType, attention: str) -> Any:
    """The model in a folder, with every parameter from its weights."""
    from transformers import AutoModelForCausalLM

    gguf = _gguf(location, folder)
    extra: dict[str, Any] = {"gguf_file": gguf} if gguf else {"use_safetensors": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), trust_remote_code=False, dtype=getattr(torch, dtype), attn_implementation=attention,
            output_loading_info=True, **extra,
        )  # fmt: skip
    except _LOAD_ERRORS as error:
        raise _cannot_load(location, "the model", error) from error
    model: Any = loaded[0]
    info: dict[str, Any] = loaded[1]
    absent = sorted(str(name) for name in [*info.get("missing_keys", ()), *info.get("mismatched_keys", ())])
    if absent:
        raise InputError(
            f"{location}: the weights lack {len(absent)} parameters of {type(model).__name__} ({', '.join(absent[:3])}), "
            "which would start at random; is it the checkpoint of a causal language model?"
        )
    if info.get("unexpected_keys"):
        log.warning("%s: weights that the model does not use: %s", location, sorted(info["unexpected_keys"])[:5])
    return model


def _cannot_load(location: str, what: str, error: BaseException) -> InputError:
    hint = ". Install lehr[gguf] to read .gguf files" if isinstance(error, ImportError) else ""
    return InputError(f"{location}: {what} cannot be loaded ({type(error).__name__}: {str(error)[:400]}){hint}")


def _check_config(location: str, path: Path) -> None:
    """Refuse, with the reason, what transformers could only load by running the folder's code or not as a causal model."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = json.loads(path.read_bytes())
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a model's configuration ({type(error).__name__}: {error})") from error
    if kind not in CONFIG_MAPPING:
        if config.get("auto_map"):
            raise InputError(
                f"{location}: model type {kind!r} wants to run code from its folder, which Lehr never does"
            )
        raise InputError(f"{location}: the installed transformers does not know model type {kind!r}; a newer one may")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.get("is_encoder_decoder"):
        raise InputError(f"{location}: model type {kind!r} is not a causal language model")


@torch.no_grad()
def _check_causal(location: str, model: Any) -> None:
    """Refuse a model in which a later token changes the prediction before it (an encoder loaded as a decoder)."""
    ids_BT = (
        torch.arange(3, 11, device=next(model.parameters()).device)[None] % model.config.get_text_config().vocab_size
    )
    changed_BT = ids_BT.clone()
    changed_BT[0, -1] = ids_BT[0, 0]
    one, other = (model(input_ids=ids, use_cache=False).logits[0, :-1].double() for ids in (ids_BT, changed_BT))
    # Both have the same shape and differ in the last token alone, so a causal model gives equal numbers up to the order of
    # additions; attention to the last of eight tokens moves logits by percents.
    if torch.isfinite(one).all() and (one - other).abs().max() > 2e-3 * one.std():
        raise InputError(
            f"{location}: {type(model).__name__} is not causal: a later token changes an earlier prediction"
        )
