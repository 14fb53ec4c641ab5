"""Tiny random models and a tokenizer trained in-process: what tests run on instead of real weights."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY = 400
_TEXT = "the quick brown fox jumps over the lazy dog; glass is heated, annealed and slowly cooled in a lehr. "


@cache
def _trained() -> str:
    rng = random.Random(0)
    words = _TEXT.split()
    lines = [" ".join(rng.choice(words) for _ in range(30)) for _ in range(60)]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        lines, vocab_size=VOCABULARY, special_tokens=["<pad>", "<eos>", "<bos>"], show_progress=False
    )
    return tokenizer.to_str()


def tiny_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 entries; adds no special token by itself."""
    from tokenizers import Tokenizer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()), pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )
    if chat_template:
        tokenizer.chat_template = chat_template
    return tokenizer


def _built(config: Any, kind: Any, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config._attn_implementation = "sdpa"  # eager attention takes its softmax in float32, whatever the dtype
    return kind(config).to(dtype).eval()


def tiny_llama(*, dtype: torch.dtype = torch.float32, seed: int = 0, tied: bool = False) -> PreTrainedModel:
    """Two blocks, grouped-query attention, gated MLP, no biases."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=tied, initializer_range=0.2,
        bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return _built(config, LlamaForCausalLM, dtype, seed)


def tiny_qwen2(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """As Llama, with biases on q, k and v."""
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return _built(config, Qwen2ForCausalLM, dtype, seed)


def tiny_gpt2(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Conv1D maps, learned positions, tied head; no dropout."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=512, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, initializer_range=0.2, bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return _built(config, GPT2LMHeadModel, dtype, seed)


def tiny_neox(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Fused query-key-value, parallel residual, biases."""
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, initializer_range=0.2, bos_token_id=2, eos_token_id=1, pad_token_id=0,
        attention_dropout=0.0, hidden_dropout=0.0,
    )  # fmt: skip
    return _built(config, GPTNeoXForCausalLM, dtype, seed)


MODELS = {"llama": tiny_llama, "qwen2": tiny_qwen2, "gpt2": tiny_gpt2, "neox": tiny_neox}


def save_tiny_model(folder: Path, kind: str = "llama", *, seed: int = 0, chat_template: str | None = None) -> Path:
    """Write a model folder as transformers does: safetensors, config, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    MODELS[kind](seed=seed).save_pretrained(folder)
    tiny_tokenizer(chat_template).save_pretrained(folder)
    return folder


class WideNorm(torch.nn.Module):
    """RMS normalisation in the model's own width: transformers' takes it in float32, whose rounding float64 would show."""

    def __init__(self, weight: torch.nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """As Llama's, without the change of width."""
        return self.weight * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.epsilon))


def widen_norms(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with every RMS normalisation in its own width, for tests in float64."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            model.set_submodule(name, WideNorm(module.weight, module.variance_epsilon))  # type: ignore[arg-type]
    return model
