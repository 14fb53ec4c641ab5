"""JSON lines between `benchmarks/peers.py` and one peer's process: a request on stdin, its answer on stdout.

    load    model, samples, dtype, attention, rank, threads, tuned  -> sites, numbers (per sample), version
    round   batches (lists of sample indices)                       -> cpu_s, wall_s, peak_mb, and what the peer adds
    check   batches, dense (file or null)                           -> norms per sample; with `dense`, unprojected gradients of the
                                                                       first sample in that file, where the peer can give them
    quit

A peer is a class with `sites`, `numbers`, `round(batches)` and `check(batches, dense)`. What libraries print goes to stderr: the answers
have stdout for themselves. This file and the workers import nothing of Lehr: they run in the environment of the peer.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

MARK = "\x1e"
"""Begins an answer: some libraries print while they are imported."""


class Peer(Protocol):
    """One library, loaded with one model in one arithmetic."""

    sites: list[str]
    numbers: int
    version: str

    def round(self, batches: list[list[int]]) -> dict[str, Any]:
        """Features of every batch; may return figures of its own (`cpu_s` where the time was extrapolated)."""

    def check(self, batches: list[list[int]], dense: str | None) -> dict[str, Any]:
        """Norms of the projected gradients of every sample, by sample index."""


def load_model(request: dict[str, Any]) -> Any:
    """The model of a request, in eval mode."""
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, request["dtype"])
    model = AutoModelForCausalLM.from_pretrained(
        request["model"],
        dtype=dtype,
        attn_implementation=request["attention"],
        use_safetensors=True,
        trust_remote_code=False,
    )
    return model.eval()


def load_samples(request: dict[str, Any]) -> list[list[int]]:
    """Token ids of every sample."""
    return json.loads(Path(request["samples"]).read_text())


def padded(samples: list[list[int]], indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels) of a batch, right-padded with 0 and -100."""
    longest = max(len(samples[index]) for index in indices)
    ids = [samples[index] + [0] * (longest - len(samples[index])) for index in indices]
    labels = [samples[index] + [-100] * (longest - len(samples[index])) for index in indices]
    return torch.tensor(ids), torch.tensor(labels)


def block_maps(model: Any) -> list[str]:
    """Names of the linear maps of the blocks, in the order of the modules; the head is left out."""
    base = model.base_model_prefix + "."
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(base) and module is not model.get_output_embeddings()
    ]


def sum_loss(model: Any, ids_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Sum of the token losses of a batch, whole logits, as a user of transformers writes it."""
    logits = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), labels_BT[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"
    )


def _peak_mb(reset: bool = False) -> float:
    """Largest resident memory since the last reset, MiB; 0 where the system does not tell."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def serve(make: Callable[[dict[str, Any]], Peer]) -> None:
    """Answer requests until `quit` or the end of stdin."""
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer: Peer | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            if request["do"] == "quit":
                break
            if request["do"] == "load":
                torch.set_num_threads(request["threads"])
                peer = make(request)
                answer = {"sites": peer.sites, "numbers": peer.numbers, "version": peer.version}
            elif peer is None:
                raise RuntimeError("load comes first")
            elif request["do"] == "check":
                answer = peer.check(request["batches"], request["dense"])
            else:
                _peak_mb(reset=True)
                cpu, wall = time.process_time(), time.perf_counter()
                own = peer.round(request["batches"])
                answer = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
                answer |= {"peak_mb": round(_peak_mb())} | own
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        answers.write(MARK + json.dumps(answer) + "\n")
        answers.flush()
