"""Exact per-sample sketches: dense gradients by autograd, one sample at a time, and the projections from their definition.

Signs: h(i) is the finaliser of splitmix64 (Steele, Lea, Flood 2014) at key + (i + 1) * 0x9E3779B97F4A7C15 modulo 2^64; the key is the
first eight bytes, little-endian, of BLAKE2b-128 over the JSON list [seed,version,name,side] without spaces. The sign of index i
is -1 where the top bit of h(i) is set. In the fold (side "fold"), index i goes to bucket (h(i) >> 1) mod k with sign -1 where the
lowest bit is set. Written in Python's own integers, entry by entry.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch

MASK = 2**64 - 1


def counter_hash(seed: int, version: int, name: str, side: str, index: int) -> int:
    """h(index) as an integer in 0..2^64-1."""
    text = json.dumps([seed, version, name, side], separators=(",", ":"), ensure_ascii=False)
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest()[:8], "little")
    value = (key + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def projection(seed: int, version: int, name: str, side: str, rank: int, size: int) -> np.ndarray:
    """P [rank, size], entries +-1/sqrt(rank), row-major."""
    signs = [1 - 2 * (counter_hash(seed, version, name, side, i) >> 63) for i in range(rank * size)]
    return np.array(signs, np.float64).reshape(rank, size) / np.sqrt(rank)


def fold_matrix(seed: int, version: int, sites: list[str], rank: int, k: int) -> np.ndarray:
    """[k, sites * rank^2] of 0 and +-1."""
    matrix = np.zeros((k, len(sites) * rank**2))
    for place, site in enumerate(sites):
        for index in range(rank**2):
            value = counter_hash(seed, version, site, "fold", index)
            matrix[(value >> 1) % k, place * rank**2 + index] = 1 - 2 * (value & 1)
    return matrix


def sample_loss(model: Any, ids: list[int], loss_mask: list[bool]) -> torch.Tensor:
    """Sum of -log p(token t | tokens before t) over the tokens of the mask: one sample, no padding, no chunks."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    losses = [-torch.log_softmax(logits[t - 1], 0)[ids[t]] for t in range(1, len(ids)) if loss_mask[t]]
    return torch.stack(losses).sum() if losses else logits.sum() * 0


def dense_gradients(model: Any, ids: list[int], loss_mask: list[bool]) -> dict[str, np.ndarray]:
    """Gradient of the sample's loss for every parameter, as the parameter is laid out."""
    names, parameters = zip(*model.named_parameters())
    gradients = torch.autograd.grad(sample_loss(model, ids, loss_mask), parameters, allow_unused=True)
    return {
        name: np.zeros(tuple(p.shape)) if g is None else g.double().numpy()
        for name, p, g in zip(names, parameters, gradients)
    }


def sketch(
    gradients: dict[str, np.ndarray],
    groups: list[tuple[str, list[str]]],
    transposed: set[str],
    *,
    rank: int,
    seed: int,
    version: int,
) -> np.ndarray:
    """Concatenation over sites, group by group, of P_out G P_in^T, row-major; sites in `transposed` hold their weight as [I, O]."""
    pieces = []
    for group, sites in groups:
        for site in sites:
            gradient_OI = gradients[f"{site}.weight"].T if site in transposed else gradients[f"{site}.weight"]
            p_out = projection(seed, version, site, "out", rank, gradient_OI.shape[0])
            p_in = projection(seed, version, group, "in", rank, gradient_OI.shape[1])
            pieces.append((p_out @ gradient_OI @ p_in.T).ravel())
    return np.concatenate(pieces)
