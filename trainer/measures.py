"""What a step costs and what the machine has: FLOPs by formula, the peak that a product of matrices reaches, memory in use."""

from __future__ import annotations

import dataclasses
import functools
import resource
import sys
import time
from collections.abc import Sequence

import torch

from selection_ops.flops import MapsSize, ModelSize

_SIDE = {"cpu": 1024, "cuda": 8192}
_PROBE_S = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepFlops:
    """FLOPs of a step, by formula."""

    total: float
    selection: float
    """What choosing added: `total` without what training on the kept samples alone would have taken."""


def step_flops(
    size: ModelSize,
    *,
    mode: str,
    offered: Sequence[int],
    kept: Sequence[int],
    target: Sequence[int] = (),
    sketched_target: bool = False,
    maps: MapsSize | None = None,
    exact_alignment: bool = False,
    formed: bool = False,
    exact_gram: Sequence[int] = (),
    measured: Sequence[int] = (),
    reference: ModelSize | None = None,
) -> StepFlops:
    """FLOPs of a step in `mode` over candidates, kept and target samples of these lengths, in tokens.

    `sketched_target` says that the target's direction came from a scoring pass, and not from its whole gradient. Of the `maps` that candidates
    are compared by: `exact_alignment` says that candidates were aligned with the target's whole gradient, `formed` that their own were formed
    to be projected, and `exact_gram` holds the lengths of those whose interactions came from whole gradients. Losses of `measured` were
    taken before the choice by a forward pass; those of `offered` under a `reference` model too.
    """
    trained = size.trained(kept)
    compared = size.forward(measured) + (reference.forward(offered) if reference is not None else 0.0)
    if mode == "plain":
        return StepFlops(total=compared + trained, selection=compared)
    compared += size.scored(offered) + (size.scored(target) if sketched_target else size.trained(target))
    if maps is not None:
        compared += maps.formed(offered) * (exact_alignment + formed) + maps.interactions(exact_gram)
    total = compared + (size.formed(kept) if mode == "one-pass" else trained)
    return StepFlops(total=total, selection=total - trained)


@functools.cache
def measured_peak(device: str, dtype: str) -> float:
    """FLOPs per second of the fastest of a few products of large square matrices, measured once a process in a tenth of a second.

    It is what the libraries reach here, with the threads that this process has; data sheets promise more.
    """
    kind = torch.device(device).type
    side = _SIDE.get(kind, 1024)
    a = torch.full((side, side), 0.5, dtype=getattr(torch, dtype), device=device)
    best, ends = float("inf"), time.perf_counter() + _PROBE_S
    for number in range(50):
        started = time.perf_counter()
        a @ a
        _wait(kind)
        now = time.perf_counter()
        best = min(best, now - started) if number else best  # the first one starts the library
        if now > ends and number:
            break
    return 2.0 * side**3 / best


def _wait(kind: str) -> None:
    if kind == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: allocated on an accelerator, of the whole process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024
