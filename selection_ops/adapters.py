"""A PEFT adapter folder: which base model it belongs to, and the two put together.

Only what holds no code is read: adapter_config.json, and weights in safetensors. LoRA is known, in its plain forms; what it computes is
then in the modules of the base model, which are searched and attributed like any other.
"""

from __future__ import annotations

import dataclasses
import json
import posixpath
import warnings
from pathlib import Path
from typing import Any

from schemas.errors import InputError
from schemas.fingerprint import fingerprint
from selection_ops.locations import from_hub, local_folder

CONFIG_FILE, _WEIGHTS, _PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PLACE = ("base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "peft_version")
"""Settings that change where things lie or who wrote them, not what the model computes."""
_REFUSED = ("megatron_config", "alora_invocation_tokens", "arrow_config")
"""Settings under which PEFT imports a module by name, or computes outside of the model's own modules."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter folder whose base model has been found."""

    location: str
    """As the user named it."""
    folder: Path
    """The folder on this machine."""
    config: dict[str, Any]
    """adapter_config.json."""
    base: str
    """Where the base model lies: a folder or file on this machine, or a URL."""
    base_name: str
    """The same for people and for other adapter folders: a hub id stays one."""

    @property
    def weights(self) -> Path:
        """The file of its weights."""
        return self.folder / _WEIGHTS

    @property
    def settings(self) -> str:
        """Fingerprint of what the configuration says about the computation."""
        kept = {key: value for key, value in self.config.items() if key not in _PLACE}
        # PEFT keeps the names of modules as sets, which it writes in any order.
        return fingerprint({k: sorted(v, key=str) if isinstance(v, list) else v for k, v in kept.items()})


def is_adapter(location: str, revision: str | None = None) -> bool:
    """Whether a location is an adapter folder. Raises `InputError` where there is no such place."""
    return not location.endswith(".gguf") and (local_folder(location, revision) / CONFIG_FILE).is_file()


def read_adapter(location: str, revision: str | None = None) -> Adapter | None:
    """The adapter at a location and its base model; None where a whole model lies there.

    Raises `InputError` for a configuration of another kind than LoRA, for pickled or missing weights, for a base model that cannot be found.
    """
    if not is_adapter(location, revision):
        return None
    folder = local_folder(location, revision)
    try:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
        kind, name = config["peft_type"], config["base_model_name_or_path"]
        if not (isinstance(kind, str) and isinstance(name, str) and name):
            raise ValueError("peft_type and base_model_name_or_path must be names")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{location}: {CONFIG_FILE} cannot be used ({type(error).__name__}: {error})") from error
    if kind != "LORA" or config.get("task_type") not in (None, "CAUSAL_LM"):
        raise InputError(
            f"{location}: an adapter of type {kind} for task {config.get('task_type')}; Lehr loads LORA adapters of causal language models"
        )
    for setting in _REFUSED:
        if config.get(setting):
            raise InputError(f"{location}: {CONFIG_FILE} sets {setting}, which Lehr does not load")
    if not (folder / _WEIGHTS).is_file():
        pickled = (folder / _PICKLED).is_file()
        found = f"; {_PICKLED} is pickled, which is never read: save it again as safetensors" if pickled else ""
        raise InputError(f"{location}: no {_WEIGHTS} beside {CONFIG_FILE}{found}")
    base, base_name = _base(location, folder, name, config.get("revision"))
    if is_adapter(base):
        raise InputError(
            f"{location}: its base model {name} is itself an adapter folder; merge that one into its base first"
        )
    return Adapter(location=location, folder=folder, config=config, base=base, base_name=base_name)


def _base(location: str, folder: Path, name: str, revision: str | None) -> tuple[str, str]:
    """Where the base model lies, and what to call it: a URL, an absolute path, a path from the adapter folder, or a hub id, in this order."""
    if "://" in name:
        return name, name
    path = Path(name).expanduser()
    if "://" in location and not path.is_absolute():
        scheme, _, rest = location.partition("://")
        if name.startswith("."):
            url = f"{scheme}://{posixpath.normpath(posixpath.join(rest, name))}"
            return url, url
        tried = "on the hub"
    else:
        path = folder.resolve() / path
        if path.exists():
            return str(path), str(path)
        tried = f"at {path}"
    reason = ""
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        try:
            return str(from_hub(name, revision)), name
        except InputError as error:
            reason = f" ({error})"
    raise InputError(
        f"{location}: its base model {name} is not to be found {tried}{reason}. Put it there, or write where it is into "
        f"base_model_name_or_path of {folder / CONFIG_FILE}: a path from the adapter folder, an absolute one, a URL or a hub id"
    )


def need_peft(why: str) -> Any:
    """The package `peft`. Raises `InputError` with `why` and how to install it where it is missing."""
    try:
        import peft
    except ImportError as error:
        raise InputError(f'{why}, which takes the package peft: pip install "peft>=0.17"') from error
    return peft


def attach(adapter: Adapter, model: Any) -> tuple[Any, tuple[str, ...]]:
    """The base model as PEFT wraps it, with the adapter in its modules, and the names that the base model has for what training trains.

    Every parameter is left with requires_grad, the base model's too. Raises `InputError` where the package `peft` is missing or the
    weights are not those of this adapter.
    """
    peft = need_peft(f"{adapter.location} is an adapter folder")
    from safetensors import safe_open

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on weights that are missing: an error, below
        wrapped = peft.PeftModel.from_pretrained(
            model, str(adapter.folder), is_trainable=True, autocast_adapter_dtype=False, torch_device="cpu"
        )
        wanted = set(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    with safe_open(adapter.weights, framework="pt") as file:
        absent = sorted(wanted - set(file.keys()))
    if absent:
        raise InputError(
            f"{adapter.location}: the weights lack {len(absent)} parameters of the adapter ({', '.join(absent[:3])}), which would start at "
            f"random; do they belong to {adapter.base}?"
        )
    inner = wrapped.get_base_model()
    trained = tuple(name for name, parameter in inner.named_parameters() if parameter.requires_grad)
    inner.requires_grad_(True)
    return wrapped, trained
