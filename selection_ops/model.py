"""Loading a causal language model and its tokenizer, and their fingerprints."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from schemas.errors import InputError
from schemas.fingerprint import hash128
from schemas.spec import DType
from schemas.storage import filesystem

_WEIGHTS = (".safetensors", ".gguf")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to be scored with: eval mode, and fingerprints of what it was read from."""

    model: nn.Module
    tokenizer: Any
    model_fingerprint: str
    tokenizer_fingerprint: str
    location: str


def default_dtype(device: str) -> DType:
    """bfloat16 where the hardware multiplies it fast (accelerators; CPUs with AMX or AVX-512 bf16), else float32."""
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"


def default_attention(device: str) -> str:
    """`sdpa` on accelerators; plain matrix products on CPU, where sdpa's bfloat16 backward is slow."""
    return "sdpa" if device.startswith("cuda") else "eager"


@lru_cache(maxsize=8)
def local_folder(location: str, revision: str | None = None) -> Path:
    """Folder of a model on this machine; URLs and hub ids are fetched into a cache first."""
    path = Path(location).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{location} is a file; name the model's folder, or a .gguf file")
        return path.parent
    if "://" in location:
        return _fetched(location)
    if location.count("/") != 1 or location.startswith((".", "/", "~")):
        raise InputError(f"{location} is no folder here, and no hub id of the form owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                location, revision=revision, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.msgpack", "*.h5"]
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise InputError(
            f"{location} is no folder here and could not be fetched from the hub: {type(error).__name__}"
        ) from error


def _fetched(url: str) -> Path:
    fs, path = filesystem(url)
    try:
        files = sorted(fs.find(path))
        state = [(name, str(fs.ukey(name))) for name in files]
    except OSError as error:
        raise InputError(f"cannot list the model at {url}: {error}") from error
    if not files:
        raise InputError(f"{url} holds no files")
    target = Path(tempfile.gettempdir()) / f"lehr-model-{hash128(repr(state).encode())}"
    if not target.exists():
        part = Path(tempfile.mkdtemp(prefix="lehr-model-part-"))
        for name in files:
            local = part / os.path.relpath(name, path)
            local.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(name, str(local))
        try:
            part.rename(target)
        except OSError:
            if not target.exists():
                raise
    return target


def _gguf(location: str, folder: Path) -> str | None:
    if Path(location).suffix == ".gguf":
        return Path(location).name
    files = sorted(folder.glob("*.gguf"))
    return files[0].name if files and not list(folder.glob("*.safetensors")) else None


def _digest(paths: list[Path]) -> str:
    pieces = []
    for path in sorted(paths):
        with open(path, "rb") as handle:
            pieces += [path.name.encode(), hashlib.file_digest(handle, "sha256").digest()]
    return hash128(*pieces)


@lru_cache(maxsize=8)
def model_fingerprint(location: str, *, revision: str | None = None) -> str:
    """Hash of the weight files and config.json."""
    folder = local_folder(location, revision)
    gguf = _gguf(location, folder)
    files = [folder / gguf] if gguf else list(folder.glob("*.safetensors"))
    if not files:
        raise InputError(
            f"{location}: no weights (*.safetensors or *.gguf); pickled weights are never loaded, convert them first"
        )
    if (folder / "config.json").exists() and not gguf:
        files.append(folder / "config.json")
    return _digest(files)


@lru_cache(maxsize=8)
def tokenizer_fingerprint(location: str, *, revision: str | None = None) -> str:
    """Hash of the tokenizer's files."""
    folder = local_folder(location, revision)
    gguf = _gguf(location, folder)
    files = [folder / name for name in _TOKENIZER if (folder / name).exists()]
    if not files and gguf:
        files = [folder / gguf]
    if not files:
        raise InputError(f"{location}: no tokenizer (tokenizer.json) beside the weights")
    return _digest(files)


def load_tokenizer(location: str, *, revision: str | None = None) -> Any:
    """The tokenizer alone."""
    from transformers import AutoTokenizer

    folder = local_folder(location, revision)
    tokenizer_fingerprint(location, revision=revision)
    gguf = _gguf(location, folder)
    extra = {"gguf_file": gguf} if gguf and not (folder / "tokenizer.json").exists() else {}
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, **extra)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"{location}: the tokenizer cannot be loaded ({type(error).__name__}: {error})"[:500]
        ) from error


def load_model(
    location: str, *, revision: str | None = None, dtype: DType, attention: str, device: str = "cpu"
) -> LoadedModel:
    """Model and tokenizer, in eval mode on `device`. Code from the model's folder is never run, pickles never read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = local_folder(location, revision)
    fingerprint = model_fingerprint(location, revision=revision)
    tokenizer = load_tokenizer(location, revision=revision)
    gguf = _gguf(location, folder)
    extra: dict[str, Any] = {"gguf_file": gguf} if gguf else {"use_safetensors": True}
    try:
        if not gguf:
            config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
            if getattr(config, "auto_map", None) and type(config).__name__ == "PretrainedConfig":
                raise InputError(f"{location} wants to run code of its own, which Lehr never does")
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), trust_remote_code=False, dtype=getattr(torch, dtype), attn_implementation=attention, **extra
        )
    except InputError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise InputError(
            f"{location}: not a causal language model that can be loaded ({type(error).__name__}: {error})"[:600]
        ) from error
    return LoadedModel(
        model=model.eval().to(device), tokenizer=tokenizer, model_fingerprint=fingerprint,
        tokenizer_fingerprint=tokenizer_fingerprint(location, revision=revision), location=location,
    )  # fmt: skip
