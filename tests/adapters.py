"""Adapter folders as PEFT saves them, and the same model put together by PEFT itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.tiny import MODELS, save_tiny_model


def save_adapter(folder: Path, kind: str = "llama", *, base: str = "", seed: int = 1, **settings: Any) -> Path:
    """`folder`/base, a tiny model with its tokenizer, and `folder`/adapter, a LoRA that is not at its start, where one side is zero.

    `base` is what the adapter's configuration calls the base model; its path from the adapter folder if left out.
    """
    if not (folder / "base").exists():
        save_tiny_model(folder / "base", kind)
    torch.manual_seed(seed)
    wanted: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "init_lora_weights": False,
        "target_modules": ["q_proj", "down_proj"],
    }
    model = get_peft_model(MODELS[kind](), LoraConfig(**{**wanted, **settings}))
    for name, parameter in model.named_parameters():
        if (
            parameter.requires_grad and "lora_" not in name
        ):  # copies of base parameters, which training would have moved
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.peft_config["default"].base_model_name_or_path = base or "../base"
    model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    return folder / "adapter"


def put_together(adapter: Path, base: Path) -> tuple[Any, dict[str, Any]]:
    """The model in float64 and, by name, the parameters that PEFT would train."""
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64, attn_implementation="sdpa")
    wrapped = PeftModel.from_pretrained(whole, adapter, is_trainable=True, autocast_adapter_dtype=False)
    model = wrapped.get_base_model().eval()
    return model, {name: p for name, p in model.named_parameters() if p.requires_grad}
