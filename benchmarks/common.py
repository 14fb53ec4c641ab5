"""What the benchmarks share: interleaved rounds, ratios, the environment a figure is read with, and the JSON result.

Machines are shared and noisy, so nothing is compared across runs: every round runs each way once, in turn, and what slows the machine
slows all of them. A record of a way holds `cpu_s`, seconds of the process, which other work does not enter, and `wall_s`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

# Before torch loads OpenMP: a thread that waits sleeps, so that CPU seconds of several threads count work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from selection_ops.model import default_attention, default_batch_tokens

Record = dict[str, Any]
Rounds = list[dict[str, Record]]


class Options(Protocol):
    """What every benchmark's settings hold."""

    @property
    def out(self) -> Path | None:
        """JSON file for the result; without it, it is printed."""


Chosen = TypeVar("Chosen", bound=Options)


def main(kind: type[Chosen], measure: Callable[[Chosen], dict[str, Any]], description: str | None) -> None:
    """Read the settings, measure, and write the result."""
    settings = tyro.cli(kind, description=description)
    result = json.dumps(measure(settings), indent=1)
    if settings.out is None:
        print(result)
        return
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text(result + "\n")


def say(text: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def timed(run: Callable[[], Any], device: str = "cpu") -> Record:
    """Seconds of one call."""
    if device != "cpu":
        torch.cuda.synchronize()
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}


def interleaved(ways: Mapping[str, Callable[[], Record]], rounds: int) -> Rounds:
    """Records of every way in every round but the first, which warms allocator and caches."""
    counted: Rounds = []
    for number in range(rounds + 1):
        taken = {name: run() for name, run in ways.items()}
        line = ", ".join(f"{name} {record['cpu_s']:.2f}" for name, record in taken.items())
        say(f"round {number}{'' if number else ' (warms up)'}, CPU seconds: {line}")
        if number:
            counted.append(taken)
    return counted


def ratio(rounds: Rounds, one: str, other: str, clock: str = "cpu_s") -> float:
    """Median over rounds of the quotients within a round."""
    return round(statistics.median(taken[one][clock] / taken[other][clock] for taken in rounds), 4)


def manual_ids(tokenizer: Any) -> list[int]:
    """Tokens of the manual: real text that is always there."""
    files = sorted((Path(__file__).resolve().parents[1] / "docs").rglob("*.md"))
    text = "\n".join(file.read_text() for file in files)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def environment(settings: Any, device: str = "cpu") -> dict[str, Any]:
    """What a figure has to be read with. Folders are given by their last name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    chosen = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {
        "command": " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "settings": {
            name: value.name if isinstance(value, Path) else value for name, value in chosen.items() if name != "out"
        },
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cpu_bf16": {"avx512": torch.cpu._is_avx512_bf16_supported(), "amx": torch.cpu._is_amx_tile_supported()},
        "device": torch.cuda.get_device_name(0) if device.startswith("cuda") else "cpu",
        "attention": {dtype: default_attention(device, dtype) for dtype in ("float32", "bfloat16")},
        "batch_tokens": {dtype: default_batch_tokens(device, dtype) for dtype in ("float32", "bfloat16")},
    }
