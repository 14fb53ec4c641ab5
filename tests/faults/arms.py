"""What is done to a command inside its own process before it starts: moments to die at, limits, clocks."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

_WRITING = {"open", "os.rename", "os.link", "os.remove"}
"""Audit events around whole writes: the temporary file, its rename or link, its removal."""


def die_at_write(*, below: str, number: int) -> None:
    """SIGKILL to this process itself just before its `number`-th step of a write below a folder."""
    left = number

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event not in _WRITING or not str(arguments[0]).startswith(below):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def patient_never() -> None:
    """gcsfs tries again at once instead of after 1, 2, 4, 8 and 16 seconds."""
    import gcsfs.retry

    async def at_once(_: float) -> None:
        return None

    gcsfs.retry.asyncio = types.SimpleNamespace(sleep=at_once)


def small_files(*, limit: int) -> None:
    """No file longer than `limit` bytes; the kernel refuses the rest of a write."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def little_memory(*, batches: list[int], spare_mb: int) -> None:
    """Address space for `spare_mb` more than now, and batches that need four times as much.

    The tiny model's own batches fit anywhere; in the chosen ones, of more than one sample, an allocation stands for what a
    real model would ask for. The kernel refuses it and torch raises what it raises.
    """
    import torch

    from selection_ops.engine import GradientEngine

    features, count = GradientEngine.features, 0

    def hungry(self: Any, batch: Any, *others: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count in batches and batch.samples > 1:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + (spare_mb << 20)
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
            try:
                torch.empty(4 * spare_mb << 20, dtype=torch.uint8)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return features(self, batch, *others, **named)

    GradientEngine.features = hungry  # type: ignore[method-assign, assignment]


def wrong_clock(*, seed: int) -> None:
    """A wall clock that jumps at random, mostly back, by up to days; `time.monotonic` stays, as the kernel promises."""
    rng, real, real_ns = random.Random(seed), time.time, time.time_ns
    shift = rng.uniform(-3e5, 1e4)

    def jumped() -> float:
        nonlocal shift
        if rng.random() < 0.2:
            shift -= rng.expovariate(1 / 3600)
        if rng.random() < 0.02:
            shift += rng.uniform(0, 3e5)
        return shift

    time.time = lambda: real() + jumped()
    time.time_ns = lambda: real_ns() + int(jumped() * 1e9)
