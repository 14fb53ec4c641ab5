"""An online two-pass step against a plain AdamW step on the same candidates, in the same process.

    python benchmarks/online_step.py --out online_step.json

A Llama of 34.6M parameters with random weights; 16 candidates and 4 target rows of 256 tokens, keep 8, float32, AdamW and
clipping included. Prints ratios of medians and writes every round. `two_pass_cpu` is the same ratio in processor time, which other
work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from selection_ops.encoding import Encoded
from selection_ops.online.options import PolicyOptions
from selection_ops.online.policies import Candidates, Decision, make_policy
from trainer.step import Candidate, OnlineStep


class KeepExactly:
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


def build() -> Any:
    """A Llama of 34.6M parameters, untied, random weights."""
    config = LlamaConfig(
        vocab_size=16_512, hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config)


def rows(count: int, tokens: int, vocabulary: int, generator: torch.Generator) -> list[Encoded]:
    """Rows of random tokens; every token but the first carries loss."""
    ids = torch.randint(0, vocabulary, (count, tokens), generator=generator)
    return [Encoded(ids=row.tolist(), loss_mask=[False] + [True] * (tokens - 1)) for row in ids]


def environment(threads: int) -> dict[str, Any]:
    """What the figures were measured on."""
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()},
        "cpu": names[0] if names else platform.machine(),
        "threads": threads,
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--target", type=int, default=4)
    parser.add_argument("--keep", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = build()
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.1f}M parameters, {options.threads} threads")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    shared: dict[str, Any] = {"batch_tokens": options.candidates * options.tokens, "dtype": "float32"}
    steps = {
        "vanilla": OnlineStep(model, optimizer, "full", **shared),
        "vanilla_kept": OnlineStep(model, optimizer, "full", **shared),
        "two_pass": OnlineStep(model, optimizer, KeepExactly(options.keep), warmup_select=1, **shared),
    }
    generator = torch.Generator().manual_seed(0)
    rounds = []
    for number in range(options.rounds + 1):
        encoded = rows(options.candidates, options.tokens, model.config.vocab_size, generator)
        candidates = [Candidate(sample_id=str(i), encoded=item) for i, item in enumerate(encoded)]
        target = rows(options.target, options.tokens, model.config.vocab_size, generator)
        figures: dict[str, float] = {}
        for name, online in steps.items():
            offered = candidates[: options.keep] if name == "vanilla_kept" else candidates
            begun, processor = time.perf_counter(), time.process_time()
            result = online.step(offered, target)
            figures[name] = time.perf_counter() - begun
            figures[f"{name}_cpu"] = time.process_time() - processor
            if name == "two_pass":
                figures["kept"] = len(result.decision.kept)
                figures["choosing"] = result.selection_seconds
        if number:  # the first round warms allocator and caches
            rounds.append(figures)
            print(", ".join(f"{name} {value:.2f}" for name, value in figures.items()), flush=True)
    median = {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}
    ratios = {
        "two_pass": median["two_pass"] / median["vanilla"],
        "two_pass_cpu": median["two_pass_cpu"] / median["vanilla_cpu"],
        "two_pass_over_kept": median["two_pass"] / median["vanilla_kept"],
    }
    print(", ".join(f"{name} {value:.2f}" for name, value in ratios.items()))
    if options.out:
        record = {"ratios": ratios, "rounds": rounds, "environment": environment(options.threads)}
        options.out.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
