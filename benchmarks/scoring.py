"""What scoring costs, as a ratio to a plain forward + backward of the same model in the same process.

    python benchmarks/scoring.py --model 35m --rounds 3 --threads 1 2 --out scoring.json

A ratio is the median over interleaved rounds of the quotients within a round: of CPU seconds on CPU (other processes do not count),
of wall seconds on an accelerator. With several numbers of threads every round runs each way at each of them; the ratios of more than
one carry `_threads2` behind the name. The ways, in float32 (`f32`) and bfloat16 (`bf16`), over the batches that Lehr forms by default
in that arithmetic:

    plain    forward + backward of transformers' own token-mean loss, gradients of every parameter, over the same batches
    frozen   forward + backward that only reaches the inputs of the maps: what an engine without any projection would cost
    blocks   the gradient engine over the linear maps of the blocks, folded sketches included
    packed   the same over batches whose samples stand one behind another in one row, without padding
    rank32   blocks at another rank (float32 alone)
    all      as blocks over every parameter: embedding, head, norms and biases too

`peak_memory_to_plain` is the largest resident memory of a process that does one round of blocks, to that of one that does one of
plain, float32 both. `precision` compares the sketches of bfloat16 with those of float32, sample by sample, over weights that bfloat16
holds exactly, as most published ones are. Random weights (35m, 135m) cost what trained ones cost, and so do their random ids, 64-256
of them in a sample; a model with a tokenizer reads pieces of the manual.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import common
from schemas.spec import BatchLayout, DType
from selection_ops.batching import Batch, collate, length_batches
from selection_ops.encoding import Encoded
from selection_ops.engine import GradientEngine
from selection_ops.losses import HeadRoute
from selection_ops.model import default_attention, default_batch_tokens, load_model, load_tokenizer
from selection_ops.sites import find_sites

CONFIGS: dict[str, dict[str, Any]] = {
    "35m": {
        "tie_word_embeddings": False, "vocab_size": 6_144, "hidden_size": 512, "intermediate_size": 1_620, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 8,
    },
    "135m": {
        "tie_word_embeddings": True, "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1_536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    },
}  # fmt: skip


DTYPES: dict[str, DType] = {"f32": "float32", "bf16": "bfloat16"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the benchmark."""

    model: str = "35m"
    """`35m` (untied), `135m` (tied; both random Llamas), or a model's folder or hub id."""
    rounds: int = 3
    """Interleaved rounds that are counted; one more before them warms up. 0: nothing is timed."""
    threads: tuple[int, ...] = (1,)
    """Threads of the process; several are measured in turn."""
    samples: int = 32
    """Samples of 64-256 tokens that a round runs through."""
    batch_tokens: int | None = None
    """Bound of longest x count of a batch; without it Lehr's default in each arithmetic."""
    proj_rank: int = 16
    """Rank of the projection on each side of a site."""
    other_rank: int = 32
    """Rank whose cost is set beside it."""
    k: int = 2048
    """Sketch dimension."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to run."""
    memory: bool = True
    """Measure peak memory too, each way in a process of its own (CPU only)."""
    precision: bool = True
    """Compare the sketches of both arithmetics too."""
    out: Path | None = None
    """JSON file for the result; without it, it is printed."""

    @property
    def label(self) -> str:
        """Name of the model in the names of ratios."""
        return self.model if self.model in CONFIGS else Path(self.model).name


@dataclasses.dataclass(frozen=True)
class Side:
    """One model in one arithmetic, its batches, and the ways through them."""

    batches: list[Batch]
    engines: dict[str, GradientEngine]
    ways: dict[str, Callable[[], None]]


def build(settings: Settings, dtype: DType) -> Any:
    """The model in the arithmetic asked for, its weights rounded to bfloat16, with the attention that scoring would choose."""
    attention = default_attention(settings.device, dtype)
    if settings.model not in CONFIGS:
        loaded = load_model(settings.model, dtype="bfloat16", attention=attention, device=settings.device)
        return loaded.model.to(getattr(torch, dtype))
    config = LlamaConfig(**CONFIGS[settings.model], max_position_embeddings=2048)
    config._attn_implementation = attention
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    return model.to(torch.bfloat16).to(getattr(torch, dtype)).to(settings.device).eval()


def make_samples(settings: Settings) -> list[Encoded]:
    """Samples of random ids, which cost what others cost; of a model with a tokenizer, pieces of the manual."""
    rng = random.Random(0)
    text = None if settings.model in CONFIGS else common.manual_ids(load_tokenizer(settings.model))
    samples = []
    for _ in range(settings.samples):
        length = rng.randint(64, 256)
        start = rng.randrange(len(text) - length) if text else 0
        ids = text[start : start + length] if text else [rng.randrange(3, 6_144) for _ in range(length)]
        samples.append(Encoded(ids=ids, loss_mask=[False] + [True] * (length - 1)))
    return samples


def make_batches(
    settings: Settings, samples: list[Encoded], batch_tokens: int, layout: BatchLayout = "padded"
) -> list[Batch]:
    """Length-sorted batches."""
    groups = length_batches([len(item.ids) for item in samples], batch_tokens, layout)
    return [collate([samples[index] for index in group], device=settings.device, layout=layout) for group in groups]


def plain(model: Any, batches: list[Batch]) -> None:
    """Forward + backward as transformers trains."""
    for batch in batches:
        labels_BT = batch.ids_BT.masked_fill(~batch.loss_BT, -100)
        attention_BT = batch.attention_BT.long()
        model(input_ids=batch.ids_BT, attention_mask=attention_BT, labels=labels_BT, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)


def frozen(model: Any, route: HeadRoute, batches: list[Batch]) -> None:
    """Forward + backward of the inputs alone."""
    flags = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    for batch in batches:
        route.sample_losses(batch).sum().backward()
    handle.remove()
    for parameter, flag in zip(model.parameters(), flags):
        parameter.requires_grad_(flag)


def score(engine: GradientEngine, batches: list[Batch]) -> None:
    """Features of every batch."""
    with engine:
        for batch in batches:
            engine.features(batch)


def side_of(settings: Settings, dtype: DType) -> Side:
    """A model and all ways through its batches."""
    model = build(settings, dtype)
    samples = make_samples(settings)
    bound = settings.batch_tokens or default_batch_tokens(settings.device, dtype)
    batches, packed = make_batches(settings, samples, bound), make_batches(settings, samples, bound, "packed")
    numbers: dict[str, Any] = {"k": settings.k, "seed": 0}
    report = find_sites(model, "all")
    engines = {
        "blocks": GradientEngine(model, proj_rank=settings.proj_rank, **numbers),
        "all": GradientEngine(model, report.input_groups, report.small, proj_rank=settings.proj_rank, **numbers),
    }
    if dtype == "float32":
        engines[f"rank{settings.other_rank}"] = GradientEngine(model, proj_rank=settings.other_rank, **numbers)
    route = HeadRoute(model)
    ways: dict[str, Callable[[], None]] = {
        "plain": lambda: plain(model, batches),
        "frozen": lambda: frozen(model, route, batches),
        **{name: functools.partial(score, engine, batches) for name, engine in engines.items()},
        "packed": functools.partial(score, engines["blocks"], packed),
    }
    return Side(batches, engines, ways)


def peak_memory(settings: Settings, way: str) -> int:
    """Largest resident bytes of a process that does one round of one way of the float32 model."""
    given = {"model": settings.model, "samples": settings.samples, "batch_tokens": settings.batch_tokens}
    code = (
        "import re, sys; sys.path.insert(0, sys.argv[1]); import torch; from benchmarks import scoring; torch.set_num_threads(1); "
        f"scoring.side_of(scoring.Settings(**{given!r}, device='cpu'), 'float32').ways[{way!r}](); "
        # Not ru_maxrss, which knows of the process that this one was forked from.
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024)"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).resolve().parents[1])]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def precision(sides: dict[str, Side]) -> dict[str, dict[str, float]]:
    """How far sketches in bfloat16 are from those in float32, relative to the row's norm, over the same batches."""
    found = {}
    for name in ("blocks", "all"):
        rows = {}
        for short, side in sides.items():
            with side.engines[name] as engine:
                # float32's batches on both sides: the order of the rows is the batches'.
                rows[short] = torch.cat([engine.features(batch).sketch_BK for batch in sides["f32"].batches]).double()
        exact_NK, narrow_NK = rows["f32"], rows["bf16"]
        error_N = (narrow_NK - exact_NK).norm(dim=1) / exact_NK.norm(dim=1)
        cosine_N = torch.nn.functional.cosine_similarity(narrow_NK, exact_NK, dim=1)
        found[name] = {
            "error_median": round(float(error_N.median()), 5),
            "error_max": round(float(error_N.max()), 5),
            "cosine_median": round(float(cosine_N.median()), 6),
            "cosine_min": round(float(cosine_N.min()), 6),
        }
    return found


def timed_at(settings: Settings, threads: int, run: Callable[[], None]) -> common.Record:
    """What one way took with so many threads."""
    torch.set_num_threads(threads)
    return common.timed(run, settings.device)


def ratios_of(settings: Settings, rounds: common.Rounds) -> dict[str, float]:
    """Every ratio, per number of threads."""
    clock = "cpu_s" if settings.device == "cpu" else "wall_s"
    other = f"rank{settings.other_rank}"
    pairs = {
        "f32_blocks_to_plain": ("f32_blocks", "f32_plain"),
        "f32_blocks_to_frozen": ("f32_blocks", "f32_frozen"),
        "f32_all_to_frozen": ("f32_all", "f32_frozen"),
        f"f32_{other}_to_rank{settings.proj_rank}": (f"f32_{other}", "f32_blocks"),
        "f32_packed_to_padded": ("f32_packed", "f32_blocks"),
        "bf16_packed_to_padded": ("bf16_packed", "bf16_blocks"),
        "bf16_all_to_bf16_frozen": ("bf16_all", "bf16_frozen"),
        "bf16_blocks_to_f32_blocks": ("bf16_blocks", "f32_blocks"),
        "bf16_blocks_to_f32_plain": ("bf16_blocks", "f32_plain"),
        "bf16_blocks_to_bf16_plain": ("bf16_blocks", "bf16_plain"),
        "bf16_blocks_to_bf16_frozen": ("bf16_blocks", "bf16_frozen"),
    }
    return {
        f"{name}_{settings.label}" + (f"_threads{threads}" if threads > 1 else ""): common.ratio(
            rounds, f"{one}_{threads}", f"{two}_{threads}", clock
        )
        for threads in settings.threads
        for name, (one, two) in pairs.items()
    }


def measure(settings: Settings) -> dict[str, Any]:
    """Ratios, and the seconds of every way in every round."""
    sides = {short: side_of(settings, dtype) for short, dtype in DTYPES.items()}
    tokens = sum(batch.tokens for batch in sides["f32"].batches)
    common.say(f"{settings.label}: {settings.samples} samples, {tokens} tokens")
    ways = {
        f"{short}_{name}_{threads}": functools.partial(timed_at, settings, threads, run)
        for threads in settings.threads
        for short, side in sides.items()
        for name, run in side.ways.items()
    }
    rounds = common.interleaved(ways, settings.rounds) if settings.rounds else []
    ratios = ratios_of(settings, rounds) if rounds else {}
    peaks = {}
    if settings.memory and settings.device == "cpu":
        peaks = {way: peak_memory(settings, way) for way in ("plain", "blocks", "all")}
        ratios[f"peak_memory_to_plain_{settings.label}"] = round(peaks["blocks"] / peaks["plain"], 4)
    return {
        "ratios": ratios,
        "precision": precision(sides) if settings.precision else {},
        "peak_bytes": peaks,
        "tokens": tokens,
        "rounds": rounds,
        "environment": common.environment(settings, settings.device),
    }


if __name__ == "__main__":
    common.main(Settings, measure, __doc__)
