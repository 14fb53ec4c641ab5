"""An online step, in two passes and in one, against a plain AdamW step on the same candidates, in the same process.

    python benchmarks/online_step.py --out online_step.json
    python benchmarks/online_step.py --keep 4 8 16 --ways one_pass_sketched two_pass
    python benchmarks/online_step.py --model 135m --dtype bfloat16 --batch-tokens 1024 --rounds 2

A Llama with random weights, of 34.6M parameters or of SmolLM2-135M's shape (tied); 16 candidates and 4 target rows of 256 tokens, keep 8,
AdamW and clipping included. A ratio is the median over rounds of the quotients within a round, in wall time; with `_cpu` in processor
time, which other work on the machine disturbs less; with `_over_kept` to a plain step on as many rows as are kept.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import common
from selection_ops.encoding import Encoded
from selection_ops.online.options import PolicyOptions
from selection_ops.online.policies import Candidates, Decision, Policy, make_policy
from trainer.candidate import Candidate
from trainer.step import OnlineStep


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the benchmark."""

    rounds: int = 5
    """Interleaved rounds that are counted; one more before them warms up."""
    threads: int = 1
    """Threads."""
    candidates: int = 16
    """Candidates of a step."""
    target: int = 4
    """Target rows of a step."""
    keep: tuple[int, ...] = (8,)
    """Candidates that a step trains on; ratios of the second on are named after them."""
    tokens: int = 256
    """Tokens of every row."""
    batch_tokens: int = 0
    """Tokens of a forward pass, in every way and in the plain steps; 0: all candidates at once, which takes 24 GB of the 135M model."""
    model: Literal["35m", "135m"] = "35m"
    """34.6M parameters, or SmolLM2-135M's shape with embedding and head tied."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic; bfloat16 is autocast over float32 weights."""
    ways: tuple[str, ...] = ()
    """Ways to measure besides the plain steps; all where none is named."""
    out: Path | None = None
    """JSON file for the result; without it, it is printed."""


class KeepExactly(Policy):
    """filter-then-weight, filled up with the next best aligned so that every round trains on the same number of rows."""

    needs_sketches = True

    def __init__(self, count: int) -> None:
        self._count = count
        self._inner = make_policy("filter-then-weight", PolicyOptions(n_keep=count))

    def choose(self, candidates: Candidates) -> Decision:
        """The inner policy's choice, then others at weight 1."""
        decision = self._inner.choose(candidates)
        others = [index for index in range(len(candidates.sample_ids)) if index not in decision.kept]
        fill = tuple(others[: self._count - len(decision.kept)])
        weight_S = torch.cat([decision.weight_S, torch.ones(len(fill), dtype=torch.float64)])
        return dataclasses.replace(decision, kept=decision.kept + fill, weight_S=weight_S)


SHAPES: dict[str, dict[str, Any]] = {
    "35m": {
        "vocab_size": 16_512, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
    "135m": {
        "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
}  # fmt: skip

WAYS: dict[str, dict[str, Any]] = {
    "two_pass": {"mode": "two-pass"},
    "one_pass_sketched": {"mode": "one-pass", "precondition": "rank-one"},
    "one_pass_exact_direction": {"mode": "one-pass", "precondition": "exact"},
    "one_pass_exact_gram": {"mode": "one-pass", "precondition": "rank-one", "gram": "survivors"},
    "one_pass_exact_b": {"mode": "one-pass", "alignment": "exact"},
}


def build(shape: str) -> Any:
    """A Llama of one of the shapes, random weights."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=1024)
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config)


def rows(count: int, tokens: int, vocabulary: int, generator: torch.Generator) -> list[Encoded]:
    """Rows of random tokens; every token but the first carries loss."""
    ids = torch.randint(0, vocabulary, (count, tokens), generator=generator)
    return [Encoded(ids=row.tolist(), loss_mask=[False] + [True] * (tokens - 1)) for row in ids]


def measure(settings: Settings) -> dict[str, Any]:
    """Ratios, and the seconds of every step in every round."""
    torch.set_num_threads(settings.threads)
    model = build(settings.model)
    parameters = sum(p.numel() for p in model.parameters())
    common.say(f"{parameters / 1e6:.1f}M parameters, {settings.threads} threads, {settings.dtype}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    batch_tokens = settings.batch_tokens or settings.candidates * settings.tokens
    shared: dict[str, Any] = {"batch_tokens": batch_tokens, "dtype": settings.dtype}
    everything = slice(0, settings.candidates)
    measured = settings.ways or tuple(WAYS)
    plain = OnlineStep(model, optimizer, "full", **shared)
    ways = {"vanilla": (plain, everything)}
    bases: dict[str, str] = {}
    for number, keep in enumerate(settings.keep):
        suffix = f"_keep{keep}" if number else ""
        ways[f"vanilla_kept{suffix}"] = plain, slice(0, keep)
        for name in measured:
            online = OnlineStep(model, optimizer, KeepExactly(keep), warmup_select=1, **WAYS[name], **shared)
            ways[f"{name}{suffix}"] = online, everything
            bases[f"{name}{suffix}"] = f"vanilla_kept{suffix}"

    def way(online: OnlineStep, offered: slice) -> Callable[[], common.Record]:
        generator = torch.Generator().manual_seed(0)  # every way is offered the same rows in the same round

        def run() -> common.Record:
            vocabulary = model.config.vocab_size
            encoded = rows(settings.candidates, settings.tokens, vocabulary, generator)
            candidates = [Candidate(sample_id=str(i), encoded=item) for i, item in enumerate(encoded)]
            target = rows(settings.target, settings.tokens, vocabulary, generator)
            results = []
            record = common.timed(lambda: results.append(online.step(candidates[offered], target)))
            return record | {"kept": len(results[0].decision.kept), "choosing_s": results[0].selection_seconds}

        return run

    rounds = common.interleaved({name: way(*given) for name, given in ways.items()}, settings.rounds)
    ratios = {}
    for name, kept in bases.items():
        for base, suffix in (("vanilla", ""), (kept, "_over_kept")):
            ratios[f"{name}{suffix}"] = common.ratio(rounds, name, base, "wall_s")
            ratios[f"{name}{suffix}_cpu"] = common.ratio(rounds, name, base)
            common.say(f"{name} to {base}: {ratios[f'{name}{suffix}_cpu']:.3f} in CPU time")
    return {
        "ratios": ratios,
        "rounds": rounds,
        "environment": common.environment(settings),
    }


if __name__ == "__main__":
    common.main(Settings, measure, __doc__)
