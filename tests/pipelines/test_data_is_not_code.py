"""Nothing that stands in a corpus, a shard, a model's folder or a run directory is ever executed."""

from __future__ import annotations

import ast
import io
import json
import pickle
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lehr.cli import main
from pipelines.export import export
from schemas.errors import LehrError
from schemas.run import Run
from schemas.shards import read_index, read_shard
from tests.pipelines.test_hostile import features_options, table
from tests.pipelines.worlds import IN_PROCESS, make_world, sentence

HOME = Path(__file__).resolve().parents[2]
ROOMS = ("schemas", "selection_ops", "pipelines", "trainer", "lehr", "benchmarks")
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler", "cPickle.load", "dill.load",
    "dill.loads", "cloudpickle.load", "cloudpickle.loads", "marshal.loads", "marshal.load", "shelve.open", "joblib.load",
    "yaml.load", "yaml.unsafe_load", "torch.hub.load", "runpy.run_path", "os.system", "np.load", "numpy.load",
}  # fmt: skip
"""Calls that run what they read, by the name they are written under."""


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def offences(source: str) -> list[str]:
    """Calls in a source text that would make code of data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [
                f"import {name}" for name in modules if name.split(".")[0] in ("pickle", "dill", "marshal", "shelve")
            ]
        if not isinstance(node, ast.Call):
            continue
        name, given = dotted(node.func), {key.arg: ast.unparse(key.value) for key in node.keywords}
        if name in FORBIDDEN:
            found.append(name)
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if given.get("trust_remote_code", "False") != "False":
            found.append("trust_remote_code")
        if "Auto" in name and name.endswith("from_pretrained") and not {"trust_remote_code", None} & given.keys():
            # Left out, transformers asks on the terminal whether to run the folder's code.
            found.append(f"{name} without trust_remote_code")
        if given.get("shell", "False") != "False" or given.get("allow_pickle", "False") != "False":
            found.append(f"{name} with a shell or pickles")
    return found


def sources() -> Iterator[Path]:
    for room in ROOMS:
        yield from sorted((HOME / room).rglob("*.py"))


def test_invariant_8_no_source_makes_code_of_data() -> None:
    assert len(list(sources())) > 60
    found = {str(path.relative_to(HOME)): offences(path.read_text()) for path in sources()}
    assert {path: what for path, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import load",
        "x = eval(text)",
        "exec(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "AutoTokenizer.from_pretrained(folder)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
        "load(folder, trust_remote_code=user)",
        "np.load(path)",
        "open_array(path, allow_pickle=True)",
        "run(text, shell=True)",
    ],
)
def test_invariant_8_the_search_finds_what_it_looks_for(line: str) -> None:
    assert offences(line)
    assert not offences(
        "torch.load(path, weights_only=True)\nmodel.eval()\nAutoTokenizer.from_pretrained(f, trust_remote_code=False)"
    )


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


def bombs(trace: Path) -> dict[str, bytes]:
    """A pickle under every name that some reader would load by itself."""
    body = pickle.dumps(Bomb(trace))
    buffer = io.BytesIO()
    torch.save(Bomb(trace), buffer)
    zipped = buffer.getvalue()
    return {"pkl": body, "pickle": body, "pyd": body, "pt": zipped, "pth": zipped, "bin": zipped, "npy": body}


def test_invariant_8_the_bombs_work(tmp_path: Path) -> None:
    pickle.loads(bombs(tmp_path / "a")["pkl"])
    torch.load(io.BytesIO(bombs(tmp_path / "b")["pt"]), weights_only=False)
    assert (tmp_path / "a").exists() and (tmp_path / "b").exists()


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def test_invariant_8_pickles_in_corpus_model_and_run_are_never_loaded(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    rng = random.Random(2)
    world = make_world(tmp_path / "w", rows=12)
    planted = bombs(trace)
    with tarfile.open(world.corpus / "c.tar", "w") as archive:
        for number in range(3):
            add(archive, f"{number}.json", json.dumps({"text": sentence(rng)}).encode())
            for suffix, data in planted.items():
                add(archive, f"{number}.{suffix}", data)
        for suffix, data in planted.items():
            add(archive, f"alone.{suffix}", data)

    def plant(folder: Path) -> None:
        for suffix, data in planted.items():
            (folder / f"planted.{suffix}").write_bytes(data)

    for name, data in (("pytorch_model.bin", planted["bin"]), ("training_args.bin", planted["bin"])):
        (world.model / name).write_bytes(data)
    (world.model / "modeling_mine.py").write_text(f"open({str(trace)!r}, 'w')\n")
    plant(world.corpus)
    run = tmp_path / "run"
    columns = ["--id-column", "__key__"]
    target = ["--data", str(world.target), "--eval", str(world.evaluation)]
    commands = [
        ["plan", str(run), str(world.corpus / "c.tar"), *columns],
        ["target", str(run), *target, *features_options(world.model)],
        ["score", str(run), "--workers", "1"],
        ["select", str(run), "--samples", "2"],
        ["export", str(run)],
        ["status", str(run)],
        ["audit", str(run), "--sql", "SELECT count(*) FROM features"],
        ["report", str(run)],
    ]
    for command in commands:
        assert main(command) == 0, command
        for folder in [path for path in run.rglob("*") if path.is_dir()]:
            plant(folder)
    assert not trace.exists()
    opened = Run.open(str(run))
    assert table(opened, "features")["source_id"].to_pylist() == ["0", "1", "2"]
    [reject] = table(opened, "rejects").to_pylist()
    assert reject["reason"] == "missing_column" and "alone" in reject["detail"]


def test_invariant_8_pickles_in_a_shard_are_never_loaded(tmp_path: Path) -> None:
    """A shard that was replaced is refused by its size or hash; its members are never opened by their suffix."""
    trace = tmp_path / "ran"
    world = make_world(tmp_path / "w", rows=12)
    run = str(tmp_path / "w/run")
    for command in (
        ["score", run, *features_options(world.model)],
        ["select", run, "--selector", "random", "--target", "none", "--samples", "4"],
    ):
        assert main(command) == 0
    report = export(world.run, "random", IN_PROCESS)
    entry = report.index.shards[0]
    shard = Path(report.url) / entry.name
    with tarfile.open(shard, "a") as archive:
        for suffix, data in bombs(trace).items():
            add(archive, f"000000000000.{suffix}", data)
    with pytest.raises(LehrError):
        list(read_shard(report.url, read_index(report.url).shards[0]))
    assert not trace.exists()
