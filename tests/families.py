"""Tiny random models of the families whose every parameter is attributed, and float64 that is float64 throughout."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers

from tests.tiny import VOCABULARY, tiny_gpt2, tiny_llama, tiny_neox, tiny_qwen2

hf: Any = transformers
_SPECIAL = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
_BLOCK: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, **_SPECIAL,
}  # fmt: skip
_STATE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "conv_kernel": 3, "expand": 2,
    "residual_in_fp32": False, **_SPECIAL,
}  # fmt: skip
_MOE = {"num_experts": 4, "num_experts_per_tok": 2}
_HEAD = {"head_dim": 8}
_OPT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "word_embed_proj_dim": 32, "max_position_embeddings": 512, "dropout": 0.0,
}  # fmt: skip


def _built(config: Any, kind: Any, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config._attn_implementation = "sdpa" if getattr(kind, "_supports_sdpa", True) else "eager"
    config._experts_implementation = "eager"  # the grouped product of experts knows no float64
    model = kind(config)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms at one and biases at zero hide a missing factor
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        elif not parameter.any():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype).eval()


def _lora(dtype: torch.dtype, *modules: str) -> Any:
    """A Llama under LoRA adapters that are not at their start, where one side is zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=list(modules), init_lora_weights=False, lora_dropout=0.1)
    return (
        get_peft_model(_built(hf.LlamaConfig(**_BLOCK), hf.LlamaForCausalLM, torch.float32), settings).to(dtype).eval()
    )


FAMILIES: dict[str, Callable[[torch.dtype], Any]] = {
    "llama": lambda d: _built(hf.LlamaConfig(**_BLOCK), hf.LlamaForCausalLM, d),
    "llama-tied": lambda d: tiny_llama(dtype=d, tied=True),
    "qwen2": lambda d: tiny_qwen2(dtype=d),
    "qwen3": lambda d: _built(hf.Qwen3Config(**_BLOCK, **_HEAD), hf.Qwen3ForCausalLM, d),
    "gpt2": lambda d: tiny_gpt2(dtype=d),
    "neox": lambda d: tiny_neox(dtype=d),
    "gemma": lambda d: _built(hf.GemmaConfig(**_BLOCK, **_HEAD), hf.GemmaForCausalLM, d),
    "gemma2": lambda d: _built(
        hf.Gemma2Config(**_BLOCK, **_HEAD, query_pre_attn_scalar=8, final_logit_softcapping=5.0),
        hf.Gemma2ForCausalLM,
        d,
    ),
    "gemma3": lambda d: _built(
        hf.Gemma3TextConfig(**_BLOCK, **_HEAD, query_pre_attn_scalar=8), hf.Gemma3ForCausalLM, d
    ),
    "olmo": lambda d: _built(hf.OlmoConfig(**_BLOCK), hf.OlmoForCausalLM, d),
    "olmo2": lambda d: _built(hf.Olmo2Config(**_BLOCK), hf.Olmo2ForCausalLM, d),
    "phi": lambda d: _built(hf.PhiConfig(**{**_BLOCK, "num_key_value_heads": 4}), hf.PhiForCausalLM, d),
    "opt": lambda d: _built(hf.OPTConfig(**_OPT), hf.OPTForCausalLM, d),
    "mixtral": lambda d: _built(
        hf.MixtralConfig(**_BLOCK, num_local_experts=4, num_experts_per_tok=2), hf.MixtralForCausalLM, d
    ),
    "qwen2-moe": lambda d: _built(
        hf.Qwen2MoeConfig(**_BLOCK, **_MOE, moe_intermediate_size=16, shared_expert_intermediate_size=16),
        hf.Qwen2MoeForCausalLM,
        d,
    ),
    "qwen3-moe": lambda d: _built(
        hf.Qwen3MoeConfig(**_BLOCK, **_MOE, moe_intermediate_size=16), hf.Qwen3MoeForCausalLM, d
    ),
    "olmoe": lambda d: _built(hf.OlmoeConfig(**_BLOCK, **_MOE), hf.OlmoeForCausalLM, d),
    "gpt-oss": lambda d: _built(
        hf.GptOssConfig(**_BLOCK, **_HEAD, num_local_experts=4, num_experts_per_tok=2), hf.GptOssForCausalLM, d
    ),
    "mamba": lambda d: _built(hf.MambaConfig(**_STATE, time_step_rank=4), hf.MambaForCausalLM, d),
    "mamba2": lambda d: _built(
        hf.Mamba2Config(**_STATE, num_heads=4, head_dim=16, n_groups=1, chunk_size=8), hf.Mamba2ForCausalLM, d
    ),
    "lora": lambda d: _lora(d, "q_proj", "v_proj", "down_proj"),
    "lora-ends": lambda d: _lora(d, "embed_tokens", "lm_head", "o_proj"),
    "unfrozen-lora-ends": lambda d: _lora(d, "embed_tokens", "lm_head", "o_proj").requires_grad_(True),
}


@contextlib.contextmanager
def wide_arithmetic() -> Iterator[None]:
    """Inside, float64 stays float64: models take norms and softmaxes in float32 whatever their weights are, and that rounding
    would hide an error of 1e-8."""
    to, narrow, softmax = torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax
    tensor: Any = torch.Tensor
    functional: Any = torch.nn.functional

    def widened(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.dtype == torch.float64:
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return to(self, *args, **kwargs)

    def wide_softmax(values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if values.dtype == torch.float64 and kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return softmax(values, *args, **kwargs)

    tensor.to, tensor.float = widened, lambda self: self if self.dtype == torch.float64 else narrow(self)
    functional.softmax = wide_softmax
    try:
        yield
    finally:
        tensor.to, tensor.float, functional.softmax = to, narrow, softmax
