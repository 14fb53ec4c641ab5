"""What scoring costs, as a ratio to a plain forward + backward of the same model in the same process.

    python benchmarks/scoring.py --model 35m --rounds 3 --threads 1 --out scoring.json

Rounds are interleaved: every round runs each way once, in turn, so that what slows the machine slows all of them. Times are CPU
seconds on CPU (other processes do not count), wall seconds on an accelerator. A ratio is the median over rounds of the quotients
within a round. The ways:

    plain    forward + backward of transformers' own token-mean loss, gradients of every parameter, over the same batches
    frozen   forward + backward that only reaches the inputs of the maps: what an engine without any projection would cost
    blocks   the gradient engine over the linear maps of the blocks, folded sketches included
    all      the same over every parameter: embedding, head, norms and biases too

`peak_memory_to_plain` is the largest resident memory of a process that does one round of blocks, to that of one that does one of
plain, float32 both. Random weights (35m, 135m) cost what trained ones cost. The texts are random ids of 64-256 tokens.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from schemas.spec import DType
from selection_ops.batching import Batch, collate, length_batches
from selection_ops.encoding import Encoded
from selection_ops.engine import GradientEngine
from selection_ops.losses import HeadRoute
from selection_ops.model import default_attention, load_model
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the benchmark."""

    model: str = "35m"
    """`35m` (untied), `135m` (tied; both random Llamas), or a model's folder or hub id."""
    rounds: int = 3
    """Interleaved rounds that are counted; one more before them warms up."""
    threads: int = 1
    """Threads of one process."""
    samples: int = 32
    """Samples of 64-256 tokens that a round runs through."""
    batch_tokens: int = 1024
    """Bound of longest x count of a batch."""
    proj_rank: int = 16
    """Rank of the projection on each side of a site."""
    k: int = 2048
    """Sketch dimension."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to run."""
    memory: bool = True
    """Measure peak memory too, each way in a process of its own (CPU only)."""
    out: Path | None = None
    """JSON file for the result; without it, it is printed."""


@dataclasses.dataclass(frozen=True)
class Way:
    """One way through all batches, of one model in one arithmetic."""

    name: str
    run: Callable[[], None]


def build(settings: Settings, dtype: DType) -> Any:
    """The model in the arithmetic asked for, with the attention that scoring would choose."""
    attention = default_attention(settings.device, dtype)
    if settings.model not in CONFIGS:
        return load_model(settings.model, dtype=dtype, attention=attention, device=settings.device).model
    config = LlamaConfig(**CONFIGS[settings.model], max_position_embeddings=2048)
    config._attn_implementation = attention
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(getattr(torch, dtype)).to(settings.device).eval()


def make_batches(settings: Settings, vocabulary: int) -> list[Batch]:
    """Random samples of 64-256 tokens in length-sorted batches."""
    rng = random.Random(0)
    encoded = []
    for _ in range(settings.samples):
        length = rng.randint(64, 256)
        ids = [rng.randrange(3, vocabulary) for _ in range(length)]
        encoded.append(Encoded(ids=ids, loss_mask=[False] + [True] * (length - 1)))
    groups = length_batches([len(item.ids) for item in encoded], settings.batch_tokens)
    return [collate([encoded[index] for index in group], device=settings.device) for group in groups]


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


def ways_of(settings: Settings, dtype: DType, label: str) -> tuple[list[Way], list[Batch]]:
    """The four ways of one model."""
    model = build(settings, dtype)
    batches = make_batches(settings, min(model.config.get_text_config().vocab_size, 6_144))
    numbers: dict[str, Any] = {"proj_rank": settings.proj_rank, "k": settings.k, "seed": 0}
    engine = GradientEngine(model, **numbers)
    report = find_sites(model, "all")
    everything = GradientEngine(model, report.input_groups, report.small, **numbers)
    route = HeadRoute(model)
    return [
        Way(f"{label}_plain", lambda: plain(model, batches)),
        Way(f"{label}_frozen", lambda: frozen(model, route, batches)),
        Way(f"{label}_blocks", lambda: score(engine, batches)),
        Way(f"{label}_all", lambda: score(everything, batches)),
    ], batches


def seconds(settings: Settings, run: Callable[[], None]) -> float:
    """What one way took."""
    if settings.device == "cpu":
        started = time.process_time()
        run()
        return time.process_time() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_memory(settings: Settings, way: str) -> int:
    """Largest resident bytes of a process that does one round of one way of the float32 model."""
    given = {"model": settings.model, "samples": settings.samples, "batch_tokens": settings.batch_tokens}
    code = (
        "import re, sys; sys.path.insert(0, sys.argv[1]); import torch; import scoring; torch.set_num_threads(1); "
        f"ways, _ = scoring.ways_of(scoring.Settings(**{given!r}, device='cpu'), 'float32', 'f32'); "
        f"[way.run() for way in ways if way.name == 'f32_{way}']; "
        # Not ru_maxrss, which knows of the process that this one was forked from.
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024)"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def environment(settings: Settings) -> dict[str, Any]:
    """What a figure has to be read with."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    return {
        "command": f"benchmarks/scoring.py --model {settings.model} --rounds {settings.rounds} --threads {settings.threads}",
        "settings": {key: str(value) for key, value in dataclasses.asdict(settings).items() if key != "out"},
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": cpu,
        "cpu_bf16": {
            "avx512": torch.cpu._is_avx512_bf16_supported(),
            "amx": torch.cpu._is_amx_tile_supported(),
        },
        "device": torch.cuda.get_device_name(0) if settings.device.startswith("cuda") else "cpu",
        "threads": settings.threads,
        "attention": {dtype: default_attention(settings.device, dtype) for dtype in ("float32", "bfloat16")},
    }


def measure(settings: Settings) -> dict[str, Any]:
    """Ratios, and the seconds of every way in every round."""
    torch.set_num_threads(settings.threads)
    wide, batches = ways_of(settings, "float32", "f32")
    narrow, _ = ways_of(settings, "bfloat16", "bf16")
    tokens = sum(batch.tokens for batch in batches)
    rounds: list[dict[str, float]] = []
    for number in range(settings.rounds + 1):
        taken = {way.name: seconds(settings, way.run) for way in [*wide, *narrow]}
        print(f"round {number}: " + ", ".join(f"{name} {value:.2f} s" for name, value in taken.items()), flush=True)
        if number:
            rounds.append(taken)
    label = settings.model if settings.model in CONFIGS else Path(settings.model).name

    def ratio(one: str, other: str) -> float:
        return round(statistics.median(taken[one] / taken[other] for taken in rounds), 4)

    peaks = {}
    if settings.memory and settings.device == "cpu":
        peaks = {way: peak_memory(settings, way) for way in ("plain", "blocks", "all")}
    memory = {f"peak_memory_to_plain_{label}": round(peaks["blocks"] / peaks["plain"], 4)} if peaks else {}
    return {
        "ratios": {
            f"f32_blocks_to_plain_{label}": ratio("f32_blocks", "f32_plain"),
            f"f32_blocks_to_frozen_{label}": ratio("f32_blocks", "f32_frozen"),
            f"f32_all_to_frozen_{label}": ratio("f32_all", "f32_frozen"),
            **memory,
            f"bf16_all_to_bf16_frozen_{label}": ratio("bf16_all", "bf16_frozen"),
            f"bf16_blocks_to_f32_blocks_{label}": ratio("bf16_blocks", "f32_blocks"),
            f"bf16_blocks_to_f32_plain_{label}": ratio("bf16_blocks", "f32_plain"),
            f"bf16_blocks_to_bf16_plain_{label}": ratio("bf16_blocks", "bf16_plain"),
            f"bf16_blocks_to_bf16_frozen_{label}": ratio("bf16_blocks", "bf16_frozen"),
        },
        "peak_bytes": peaks,
        "tokens": tokens,
        "seconds_per_token": {name: statistics.median(taken[name] for taken in rounds) / tokens for name in rounds[0]},
        "rounds": rounds,
        "environment": environment(settings),
    }


def main() -> None:
    """Measure and write."""
    settings = tyro.cli(Settings)
    result = json.dumps(measure(settings), indent=1)
    if settings.out is None:
        print(result)
        return
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text(result + "\n")


if __name__ == "__main__":
    main()
