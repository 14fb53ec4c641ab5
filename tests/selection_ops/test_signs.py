"""Signs: the same everywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from schemas.spec import PROJECTION_VERSION
from selection_ops.signs import buckets, hashes, signs
from tests.reference.gradients import counter_hash

GOLDEN = json.loads(Path(__file__).with_name("golden_signs.json").read_text())
CASES = [(0, "model.layers.0.self_attn.q_proj", "in"), (1, "transformer.h.0.attn.c_attn", "out"), (7, "é/ü", "in")]


def bits(values: torch.Tensor) -> str:
    """'+' and '-' of a tensor of signs."""
    return "".join("+" if value > 0 else "-" for value in values.flatten().tolist())


def test_invariant_2_golden_file() -> None:
    """What stored sketches were made with; a change here needs another projection version."""
    assert GOLDEN["version"] == PROJECTION_VERSION
    for entry in GOLDEN["signs"]:
        made = signs(entry["seed"], GOLDEN["version"], entry["name"], entry["side"], tuple(entry["shape"]))
        assert bits(made) == entry["signs"], entry
    for entry in GOLDEN["fold"]:
        bucket, sign = buckets(entry["seed"], GOLDEN["version"], entry["site"], entry["count"], entry["k"])
        assert bucket.tolist() == entry["buckets"]
        assert bits(sign) == entry["signs"]


@pytest.mark.parametrize(("seed", "name", "side"), CASES)
def test_hashes_are_those_of_the_definition(seed: int, name: str, side: str) -> None:
    made = [value % 2**64 for value in hashes(seed, 1, name, side, 50).tolist()]
    assert made == [counter_hash(seed, 1, name, side, index) for index in range(50)]


def test_invariant_2_any_process_and_order() -> None:
    """Another process, other hash seed, sites asked for in another order, more drawn in between."""
    script = (
        "import torch; torch.manual_seed(5); torch.randn(3)\n"
        "from selection_ops.signs import signs\n"
        f"for seed, name, side in {CASES[::-1]!r}: print(''.join('+' if v > 0 else '-' for v in signs(seed, 1, name, side, (4, 9)).flatten()))"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": "99", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == [bits(signs(seed, 1, name, side, (4, 9))) for seed, name, side in CASES[::-1]]


def test_signs_depend_on_every_part_of_the_key() -> None:
    base = (3, 1, "site", "in")
    others = [(4, 1, "site", "in"), (3, 2, "site", "in"), (3, 1, "site2", "in"), (3, 1, "site", "out")]
    first = signs(*base, (4096,)).double()
    for other in others:
        # Independent signs: the mean product of 4096 has standard deviation 1/64; six of them.
        assert abs(float((first * signs(*other, (4096,)).double()).mean())) < 6 / 64


def test_signs_and_buckets_are_balanced() -> None:
    values = signs(0, 1, "balance", "in", (64, 4096)).double()
    assert set(values.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(values.mean())) < 6 / 512  # 2^18 signs: standard deviation 1/512
    gram = values @ values.T / 4096 - torch.eye(64, dtype=torch.float64)
    assert float(gram.abs().max()) < 6 / 64  # rows are uncorrelated: standard deviation 1/64
    bucket, sign = buckets(0, 1, "balance", 64_000, 64)
    counts = torch.bincount(bucket, minlength=64).double()
    assert float((counts - 1000).abs().max()) < 6 * 1000**0.5  # Poisson
    assert abs(float(sign.double().mean())) < 6 / 64_000**0.5
