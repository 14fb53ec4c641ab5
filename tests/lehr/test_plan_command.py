"""`lehr plan`: every option does what its help says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lehr.cli import main
from pipelines.readers import read_unit
from schemas.run import Run
from schemas.sample import Reject, Row
from schemas.units import Plan, read_plan

RECORD = {
    "text": "the text",
    "body": "the body",
    "q": "question",
    "a": "answer",
    "m": [{"role": "user", "content": "hi"}],
    "key": 7,
    "topic": "math",
    "year": 2020,
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "My corpus"
    folder.mkdir()
    (folder / "data.jsonl").write_text("".join(json.dumps({**RECORD, "key": key}) + "\n" for key in range(50)))
    return folder


def plan(tmp_path: Path, *arguments: str) -> Plan:
    run = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    assert main(["plan", str(run), *arguments]) == 0
    return read_plan(Run.open(str(run)))


def first_row(plan: Plan, corpus: Path) -> Row:
    row = next(iter(read_unit(str(corpus), plan.units[0], plan.spec)))
    assert isinstance(row, Row)
    return row


def numbers(out: str) -> dict[str, str]:
    return {m[1].strip(): m[2].strip() for m in re.finditer(r"^(\w[\w, ]+?)  +(.*)$", out, re.MULTILINE)}


def test_columns(tmp_path: Path, corpus: Path) -> None:
    def row(*options: str) -> Row:
        return first_row(plan(tmp_path, str(corpus), *options), corpus)

    plain = row()
    assert (plain.text, plain.source_id, plain.domain, plain.extra) == ("the text", "", "", "{}")
    assert row("--text-column", "body").text == "the body"
    asked = row("--prompt-column", "q", "--completion-column", "a")
    assert (asked.prompt, asked.completion, asked.text) == ("question", "answer", None)
    assert row("--messages-column", "m").messages == RECORD["m"]
    assert row("--id-column", "key").source_id == "0"
    assert row("--domain-column", "topic").domain == "math"
    assert row("--keep-columns", "year", "topic").extra == '{"topic":"math","year":2020}'


def test_cutting(tmp_path: Path, corpus: Path) -> None:
    assert len(plan(tmp_path, str(corpus)).units) == 1
    assert len(plan(tmp_path, str(corpus), "--unit-tokens", "100").units) > 10
    assert plan(tmp_path, str(corpus), "--limit", "7").rows == 7
    bounded = plan(tmp_path, str(corpus), "--max-row-bytes", "10")
    assert {
        item.reason for item in read_unit(str(corpus), bounded.units[0], bounded.spec) if isinstance(item, Reject)
    } == {"row_too_large"}
    (corpus / "data.jsonl").rename(corpus / "data.txt")
    assert main(["plan", str(tmp_path / "none"), str(corpus)]) == 2
    assert plan(tmp_path, str(corpus), "--format", "jsonl").rows == 50


def test_the_name_of_the_corpus(tmp_path: Path, corpus: Path) -> None:
    assert plan(tmp_path, str(corpus)).spec.corpus == "My-corpus"
    assert plan(tmp_path, str(corpus / "data.jsonl")).spec.corpus == "data"
    assert plan(tmp_path, str(corpus / "*.jsonl")).spec.corpus == "My-corpus"
    assert plan(tmp_path, str(corpus), "--name", "other").spec.corpus == "other"
    run = str(tmp_path / "named")
    assert main(["plan", run, str(corpus), "--name", "first"]) == 0
    assert main(["plan", run, str(corpus)]) == 0


def test_several_files_as_a_shell_expands_them(tmp_path: Path, corpus: Path) -> None:
    (corpus / "more.jsonl").write_text('{"text": "x"}\n')
    assert plan(tmp_path, str(corpus / "data.jsonl"), str(corpus / "more.jsonl")).rows == 51


def test_what_is_printed(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan(tmp_path, str(corpus), "--tokens-per-second", "2")
    slow = numbers(capsys.readouterr().out)
    planned = plan(tmp_path, str(corpus), "--tokens-per-second", "1", "--k", "100")
    out = capsys.readouterr().out
    fast = numbers(out)
    assert fast["work units"] == "1"
    assert fast["rows"] == "50"
    assert fast["tokens, estimated"] == f"{planned.tokens:,}"
    assert slow["scoring takes"].endswith("at 2 tokens/s")
    assert fast["scoring takes"].startswith(f"{planned.tokens / 60:.0f} min")
    assert slow["scoring takes"].startswith(f"{planned.tokens / 120:.0f} min")
    assert "k = 100" in fast["scoring writes"]
    assert slow["scoring writes"].split()[0] != fast["scoring writes"].split()[0]
    assert "Next: lehr target" in out
    assert main(["plan", str(tmp_path / "x"), str(corpus), "--tokens-per-second", "0"]) == 2
    assert main(["plan", str(tmp_path / "x"), str(corpus), "--k", "0"]) == 2
    assert not (tmp_path / "x").exists()


def test_changes_are_named_and_extended(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    assert main(["plan", run, str(corpus)]) == 0
    (corpus / "new [bold].jsonl").write_text('{"text": "x"}\n')
    (corpus / "c.jsonl.gz").write_bytes(b"broken")
    capsys.readouterr()
    assert main(["plan", run, str(corpus)]) == 2
    assert "2 new (c.jsonl.gz, new [bold].jsonl)" in capsys.readouterr().err
    assert main(["plan", run, str(corpus), "--extend"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "new 2: c.jsonl.gz, new [bold].jsonl" in out
    assert "warning: c.jsonl.gz: corrupt after 0 rows" in out
    assert main(["plan", run, str(corpus)]) == 0
    assert "nothing was written" in capsys.readouterr().out
