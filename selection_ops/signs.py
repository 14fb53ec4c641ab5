"""Counter-based signs: a pure function of (seed, version, name, side, index), equal on every device, in any order.

The generator is the finaliser of splitmix64 over `key + (index + 1) * 0x9E3779B97F4A7C15`, in 64-bit integers that wrap.
The key is the first eight bytes, little-endian, of BLAKE2b-128 over the canonical JSON list [seed, version, name, side].
"""

from __future__ import annotations

import hashlib

import torch

from schemas.fingerprint import canonical_json

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def _key(seed: int, version: int, name: str, side: str) -> int:
    digest = hashlib.blake2b(canonical_json([seed, version, name, side]), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _shift(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64: torch's own shift copies the sign bit."""
    return (value >> bits) & (2 ** (64 - bits) - 1)


def hashes(
    seed: int, version: int, name: str, side: str, count: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """`count` 64-bit hashes as int64."""
    value = torch.arange(1, count + 1, dtype=torch.int64, device=device) * _GOLDEN + _key(seed, version, name, side)
    value = (value ^ _shift(value, 30)) * _FIRST
    value = (value ^ _shift(value, 27)) * _SECOND
    return value ^ _shift(value, 31)


def signs(
    seed: int, version: int, name: str, side: str, shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> torch.Tensor:
    """+1 or -1 (int64) in the given shape, row-major; the sign of index i is the top bit of its hash."""
    count = 1
    for size in shape:
        count *= size
    return (1 - 2 * (hashes(seed, version, name, side, count, device) < 0).to(torch.int64)).reshape(shape)


def buckets(
    seed: int, version: int, name: str, count: int, k: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(bucket in 0..k-1, sign) of every index of a site for the fold; int64 each."""
    value = hashes(seed, version, name, "fold", count, device)
    return _shift(value, 1) % k, 1 - 2 * (value & 1)
