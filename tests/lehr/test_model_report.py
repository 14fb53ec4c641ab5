"""`lehr model-report`: every parameter, its site or the reason it has none, and what it weighs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lehr.commands.model_report import Command
from schemas.errors import InputError
from selection_ops.encoding import Encoded
from selection_ops.model_report import gradient_shares, report_model
from tests.families import FAMILIES
from tests.reference.gradients import dense_gradients
from tests.tiny import save_tiny_model, tiny_llama

ITEMS = [
    Encoded(ids=[5, 9, 200, 31, 7], loss_mask=[False, True, True, True, True]),
    Encoded(ids=[8, 3, 11], loss_mask=[False, True, True]),
]


def test_shares_are_those_of_dense_gradients() -> None:
    model = tiny_llama(dtype=torch.float64, tied=True)
    wanted: dict[str, float] = {}
    for item in ITEMS:
        squares = {name: float((g**2).sum()) for name, g in dense_gradients(model, item.ids, item.loss_mask).items()}
        for name, square in squares.items():
            wanted[name] = wanted.get(name, 0.0) + square / sum(squares.values()) / len(ITEMS)
    found = gradient_shares(model, ITEMS)
    # float64 with norms taken in float32.
    assert found == pytest.approx(wanted, rel=1e-5)
    assert sum(found.values()) == pytest.approx(1.0)


def test_invariant_4_every_parameter_is_in_the_report_once() -> None:
    model = FAMILIES["mixtral"](torch.float32)
    report = report_model(model, ITEMS)
    assert [p.name for p in report.parameters] == [name for name, _ in model.named_parameters()]
    assert all(bool(p.site_type) != bool(p.reason) for p in report.parameters)
    experts = next(p for p in report.parameters if p.name.endswith("gate_up_proj"))
    assert (experts.site_type, experts.sites, experts.blocks) == ("Experts", 4, True)
    numbers, gradient = report.covered("blocks")
    kept = [p for p in report.parameters if p.blocks]
    assert 0 < numbers == sum(p.numbers for p in kept) / sum(p.numbers for p in report.parameters) < 1
    assert 0 < gradient == pytest.approx(sum(p.gradient_share for p in kept))
    assert report.covered("all") == (1.0, pytest.approx(1.0))


def test_the_command_prints_and_writes_it(tmp_path: Path) -> None:
    model, texts, out = save_tiny_model(tmp_path / "model", "gpt2"), tmp_path / "texts.txt", tmp_path / "report.json"
    texts.write_text("the quick brown fox\n\njumps over the lazy dog\n")
    command = [sys.executable, "-m", "lehr", "model-report", str(model), "--texts", str(texts), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env={"COLUMNS": "200", "PATH": ""})
    assert done.returncode == 0, done.stderr
    assert "transformer.h.*.attn.c_attn.weight" in done.stdout
    assert "TransposedLinear (blocks)" in done.stdout
    assert "Linear + Embedding" in done.stdout
    assert "mean over 2 texts" in done.stdout
    record = json.loads(out.read_text())
    assert len(record["parameters"]) == 28
    assert record["covered"]["all"] == [1.0, pytest.approx(1.0)]


def test_bad_texts_are_refused_by_name(tmp_path: Path) -> None:
    model = str(save_tiny_model(tmp_path / "model"))
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    for name, reason in (("none.txt", "does not exist"), ("empty.txt", "holds no text"), ("bytes.txt", "not UTF-8")):
        with pytest.raises(InputError, match=reason):
            Command(model=model, texts=str(tmp_path / name)).run()


def test_max_tokens_and_every_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(save_tiny_model(tmp_path / "model"))
    Command(model=model, max_tokens=5).run()
    short = capsys.readouterr().out
    assert "mean over 3 texts, 15 tokens" in short
    assert short.count("│") < 200
    Command(model=model, every=True).run()
    assert capsys.readouterr().out.count("│") > short.count("│")
