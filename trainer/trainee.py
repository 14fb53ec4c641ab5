"""The model that is trained: whole, or with an adapter in it of which alone the parameters require gradient."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from schemas.errors import InputError
from schemas.fingerprint import fingerprint
from selection_ops.adapters import read_adapter
from selection_ops.model import LoadedModel, causal_model, load_model, quiet, save_tokenizer
from trainer.lora import add_lora, is_wrapped, name_base, save_adapter, save_merged
from trainer.settings import TrainSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainee:
    """A model in which exactly what is trained requires gradient."""

    model: Any
    """The causal model; where an adapter is trained, as PEFT has wrapped it."""
    loaded: LoadedModel
    revision: str | None

    @property
    def fingerprint(self) -> str:
        """Fingerprint of what was read."""
        return self.loaded.model_fingerprint

    def save(self, folder: Path, weights: dict[str, Any] | None = None) -> None:
        """Weights (of an adapter, those alone) and tokenizer, as a folder that transformers or PEFT loads.

        `weights` take the place of those of a whole model, by name.
        """
        if is_wrapped(self.model):
            save_adapter(self.model, folder)
        else:
            self.model.save_pretrained(folder, state_dict=weights)
        self.save_tokenizer(folder)

    def save_merged(self, folder: Path) -> None:
        """The base model with the adapter added to its weights, and the tokenizer, as a folder that transformers loads."""
        save_merged(self.model, folder)
        self.save_tokenizer(folder)

    def save_tokenizer(self, folder: Path) -> None:
        """The tokenizer alone."""
        save_tokenizer(self.loaded, folder, revision=self.revision)


def load_trainee(settings: TrainSettings, *, dtype: str, attention: str, device: str) -> Trainee:
    """The model of the settings, ready to be trained: an adapter folder goes on, `lora` puts a fresh one on a whole model.

    Raises `InputError` for an unusable model, and where a fresh adapter is asked for on top of another.
    """
    revision = settings.revision or None
    adapter = read_adapter(settings.model, revision)
    if adapter is not None and settings.lora:
        raise InputError(
            f"{settings.model} is an adapter folder: leave --lora out to go on with it, or name its base model ({adapter.base_name}) "
            "to start a fresh one"
        )
    if settings.merge and adapter is None and not settings.lora:
        raise InputError(f"{settings.model} is a whole model, and merge needs an adapter that is trained: leave it out")
    with quiet():
        loaded = load_model(
            settings.model,
            revision=revision,
            dtype="float64" if dtype == "float64" else "float32",  # bfloat16 is autocast over float32 weights
            attention=attention,
            device=device,
        )
    model: Any = loaded.model
    if adapter is not None:
        for name, parameter in loaded.model.named_parameters():
            parameter.requires_grad_(name in loaded.adapters)
        model = loaded.wrapped
        name_base(model, adapter.base_name, adapter.config.get("revision"))
    elif settings.lora:
        model = add_lora(
            loaded.model,
            rank=settings.lora,
            alpha=settings.lora_alpha,
            dropout=settings.lora_dropout,
            targets=settings.lora_targets,
            seed=int(fingerprint(["lora", settings.seed])[:15], 16),
        )
        name_base(model, settings.model, revision)
    else:
        loaded.model.requires_grad_(True)
    return Trainee(model=model, loaded=loaded, revision=revision)


def trained_parameters(model: Any) -> dict[str, Any]:
    """What is trained, by the names that the causal model has for it."""
    return {name: parameter for name, parameter in causal_model(model).named_parameters() if parameter.requires_grad}
