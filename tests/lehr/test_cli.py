"""The `lehr` command: finds its verbs, explains itself, and says so when another package stands in for one of its rooms."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lehr
from lehr.cli import EXIT_ERROR, EXIT_INCOMPLETE, ROOMS, VERBS, main, shadowed_rooms
from schemas.errors import RunIncomplete

HOME = Path(lehr.__file__).resolve().parent.parent
EXISTING = [verb for verb in VERBS if importlib.util.find_spec(f"lehr.commands.{verb}")]


def run_lehr(*arguments: str, cwd: Path = HOME, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lehr", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(HOME), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert all(f"\n  {verb} " in out for verb in VERBS)


def test_unknown_verb_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["slect"]) == EXIT_ERROR
    err = capsys.readouterr().err
    assert "unknown verb 'slect'" in err and all(verb in err for verb in VERBS)


@pytest.mark.parametrize("verb", EXISTING)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: lehr {verb}" in out and len(out) > 200


def test_verbs_that_exist_are_announced() -> None:
    files = {p.stem.replace("_", "-") for p in (HOME / "lehr" / "commands").glob("[!_]*.py")}
    assert files <= set(VERBS)


def test_wrong_option_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["status", "run", "--no-such-option"])
    assert stopped.value.code == 2
    assert "no-such-option" in capsys.readouterr().err


def test_error_is_one_message_without_traceback(tmp_path: Path) -> None:
    done = run_lehr("status", str(tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("lehr status: ") and "Traceback" not in done.stderr
    assert str(tmp_path) in done.stderr and "lehr plan" in done.stderr


def test_incomplete_run_has_its_own_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from lehr.commands.status import Command

    def stop(self: Command) -> int:
        raise RunIncomplete("1 of 2 units are missing; run again")

    monkeypatch.setattr(Command, "run", stop)
    assert main(["status", "anywhere"]) == EXIT_INCOMPLETE
    assert "run again" in capsys.readouterr().err


def test_interrupt_is_not_a_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from lehr.commands.status import Command

    def interrupt(self: Command) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(Command, "run", interrupt)
    assert main(["status", "anywhere"]) == 130
    assert "resume" in capsys.readouterr().err


def test_own_rooms_are_found() -> None:
    assert shadowed_rooms() == []


@pytest.mark.parametrize("room", ROOMS)
def test_shadowed_room_is_named_with_the_file(tmp_path: Path, room: str) -> None:
    """A folder of a common name in front of ours: the command names it instead of failing somewhere inside."""
    (tmp_path / room).mkdir()
    (tmp_path / room / "__init__.py").write_text("")
    done = run_lehr("schema", cwd=tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{HOME}")
    assert done.returncode == EXIT_ERROR
    assert str(tmp_path / room / "__init__.py") in done.stderr and "shadows" in done.stderr
    assert "Traceback" not in done.stderr


def test_shadowing_module_is_named_too(tmp_path: Path) -> None:
    (tmp_path / "trainer.py").write_text("")
    done = run_lehr("schema", cwd=tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{HOME}")
    assert done.returncode == EXIT_ERROR and str(tmp_path / "trainer.py") in done.stderr


def test_closed_pager_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m lehr schema selection | head -1",
        shell=True,
        cwd=HOME,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
