"""Input and machines as they are: each gives the reject row, the exit status and the message that a user would want."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gzip
import json
import logging
import os
import random
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from lehr.cli import EXIT_ERROR, main
from pipelines.export import export
from pipelines.readers import get_reader, read_unit
from pipelines.select import run_select
from schemas.parquet import read_table
from schemas.run import Run
from schemas.sample import Row, Sample
from schemas.shards import read_index, read_shard
from schemas.spec import EncodingSpec, PlanSpec
from schemas.storage import TEMPORARY_PREFIX
from selection_ops.encoding import Encoder
from selection_ops.selectors import Budget, SelectorSettings
from tests.disks import can_mount, small_disk
from tests.pipelines.worlds import IN_PROCESS, SCORING, World, corpus_rows, make_world, sentence, tree_hashes
from tests.tiny import save_tiny_model, tiny_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NOBODY = 65534


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a command said."""

    status: int
    out: str
    error: str


Command = Callable[..., Answer]


@pytest.fixture
def lehr(capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs `lehr VERB ...` in this process; no answer may hold a traceback, whatever happened."""

    def run(*arguments: object) -> Answer:
        capfd.readouterr()
        # As `logging.basicConfig` does, which does nothing where pytest has installed its own handlers.
        handler = logging.StreamHandler()
        logging.getLogger().addHandler(handler)
        try:
            status = main([str(argument) for argument in arguments])
        finally:
            logging.getLogger().removeHandler(handler)
        out, error = capfd.readouterr()
        assert "Traceback" not in out + error, error
        return Answer(status, out, error)

    return run


def features_options(model: Path, **changes: object) -> list[str]:
    """The options of a scoring as the command takes them."""
    given = {**dataclasses.asdict(dataclasses.replace(SCORING, model=str(model))), **changes}
    return [
        part
        for name, value in given.items()
        if value is not None
        for part in (f"--{name.replace('_', '-')}", str(value))
    ] + ["--workers", "1"]


def table(run: Run, kind: str, stage: str = "score", name: str = "base") -> pa.Table:
    """Every row of a kind of part that a stage lists."""
    parts = [
        part.path
        for part in run.manifest(stage, name).parts
        if part.path.startswith(f"{kind}/") and part.path.endswith(".parquet")
    ]
    schema = {"selections": "selection"}.get(kind, kind)
    return pa.concat_tables([read_table(run.path(path), schema=schema) for path in parts])


def write_lines(path: Path, records: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A planned run with a target, not scored."""
    world = make_world(tmp_path_factory.mktemp("world"), rows=30)
    world.describe()
    return world


@pytest.fixture(scope="module")
def finished(described: World) -> World:
    """The same run as an undisturbed user has it at the end: scored, selected, exported."""
    folder = described.folder / "finished"
    shutil.copytree(described.folder / "run", folder)
    world = dataclasses.replace(described, run=Run.open(str(folder)))
    world.score()
    run_select(world.run, "s", "base", "target", Budget(samples=20), SelectorSettings(selector="target-cosine"))
    export(world.run, "s", IN_PROCESS, shard_samples=5)
    return world


# Rows and files.


def write_hostile(folder: Path) -> dict[tuple[str, int], str]:
    """A corpus of every kind of damage; returns the reason expected of each bad row."""
    rng = random.Random(3)
    good: list[dict[str, object]] = [{"text": sentence(rng), "name": str(number)} for number in range(6)]
    write_lines(folder / "a-good.jsonl", good)
    (folder / "b-empty.jsonl").write_bytes(b"")
    (folder / "c-empty.parquet").write_bytes(b"")
    packed = gzip.compress("".join(json.dumps(record) + "\n" for record in corpus_rows(200, 9)).encode())
    (folder / "d-cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    pq.write_table(pa.Table.from_pylist(good), folder / "e-cut.parquet")
    whole = (folder / "e-cut.parquet").read_bytes()
    (folder / "e-cut.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "f-noise.parquet").write_bytes(rng.randbytes(3000))
    lines = [
        json.dumps(good[0]).encode(),
        b'{"text": "caf\xe9 au lait"}',
        b'{"name": "no text"}',
        b'{"text": null}',
        b'{"text": ""}',
        b'{"text": "  \\n\\t "}',
        b'{"text": "\\ud800 alone"}',
        b'{"text": 5}',
        b"[1, 2]",
        b'{"text": "cut',
        b'{"text": "glass"}',
        json.dumps(good[1]).encode(),
    ]
    (folder / "g-rows.jsonl").write_bytes(b"\n".join(lines))
    return {
        ("c-empty.parquet", 0): "unreadable_file",
        ("e-cut.parquet", 0): "unreadable_file",
        ("f-noise.parquet", 0): "unreadable_file",
        ("g-rows.jsonl", 1): "invalid_utf8",
        ("g-rows.jsonl", 2): "missing_column",
        ("g-rows.jsonl", 3): "wrong_type",
        ("g-rows.jsonl", 4): "empty_text",
        ("g-rows.jsonl", 5): "empty_text",
        ("g-rows.jsonl", 6): "invalid_json",
        ("g-rows.jsonl", 7): "wrong_type",
        ("g-rows.jsonl", 8): "not_an_object",
        ("g-rows.jsonl", 9): "invalid_json",
        ("g-rows.jsonl", 10): "too_short",
    }


def test_invariant_6_every_bad_row_and_file_costs_itself(tmp_path: Path, model: Path, lehr: Command) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    expected = write_hostile(corpus)
    planned = lehr("plan", tmp_path / "run", corpus)
    assert planned.status == 0
    for name in ("b-empty.jsonl", "c-empty.parquet", "d-cut.jsonl.gz", "e-cut.parquet", "f-noise.parquet"):
        assert f"{name}" in planned.out, name
    scored = lehr("score", tmp_path / "run", *features_options(model))
    assert scored.status == 0, scored.error
    run = Run.open(str(tmp_path / "run"))
    rejects = table(run, "rejects").to_pylist()
    found = {(record["path"], record["row"]): record["reason"] for record in rejects}
    cut = {place: reason for place, reason in found.items() if place[0] == "d-cut.jsonl.gz"}
    assert list(cut.values()) == ["truncated"]
    assert {place: reason for place, reason in found.items() if place not in cut} == expected
    assert all(record["detail"] for record in rejects)
    kept = collections.Counter(table(run, "features")["path"].to_pylist())
    assert kept["a-good.jsonl"] == 6 and kept["g-rows.jsonl"] == 2
    [row_cut] = [row for _, row in cut]
    assert kept["d-cut.jsonl.gz"] == row_cut > 50
    assert lehr("verify", tmp_path / "run").status == 0


@pytest.mark.parametrize("body", [b"", b"\n\n \n"])
def test_a_corpus_without_a_row_is_an_error_that_names_it(tmp_path: Path, lehr: Command, body: bytes) -> None:
    (tmp_path / "c.jsonl").write_bytes(body)
    answer = lehr("plan", tmp_path / "run", tmp_path / "c.jsonl")
    assert answer.status == EXIT_ERROR
    assert "c.jsonl" in answer.error and "no row" in answer.error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_document_of_5_mb_is_windowed_in_seconds(tmp_path: Path) -> None:
    rng = random.Random(4)
    text = " ".join(sentence(rng) for _ in range(40_000))[: 5 << 20]
    assert len(text) == 5 << 20
    write_lines(tmp_path / "c.jsonl", [{"text": text}])
    spec = PlanSpec(corpus="long")
    [unit] = get_reader("jsonl").scan(str(tmp_path), "c.jsonl", spec)
    encoder = Encoder(tiny_tokenizer(), EncodingSpec(max_tokens=512))
    began = time.process_time()
    [row] = read_unit(str(tmp_path), unit, spec)
    assert isinstance(row, Row)
    samples = [made for made in encoder.samples(row, "long") if isinstance(made, Sample)]
    # Reading a document costs about its tokenization, twice; 60 s is what quadratic time would need for 1 MB.
    assert time.process_time() - began < 60
    assert "".join(made.text for made in samples) == text[: samples[-1].char_end]
    assert len(text) - samples[-1].char_end < 512 * 8
    lengths = [len(encoder.encode(made.text, made.loss_spans).ids) for made in samples[:: len(samples) // 100]]
    assert max(lengths) <= 512


# Models.


def bert(folder: Path) -> None:
    config = BertConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def t5(folder: Path) -> None:
    config = T5Config(vocab_size=400, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def no_tokenizer(folder: Path) -> None:
    save_tiny_model(folder)
    for path in folder.glob("*token*"):
        path.unlink()


def pickled(folder: Path) -> None:
    save_tiny_model(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")


def own_code(folder: Path) -> None:
    save_tiny_model(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")


def cut_weights(folder: Path) -> None:
    save_tiny_model(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def missing(folder: Path) -> None:
    folder.rmdir()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (missing, "no such folder"),
        (lambda folder: None, "no weights"),
        (bert, "is it the checkpoint of a causal language model?"),
        (t5, "is not a causal language model"),
        (no_tokenizer, "no tokenizer"),
        (pickled, "pickled, which is never read"),
        (own_code, "run code from its folder, which Lehr never does"),
        (cut_weights, "cannot be loaded"),
    ],
)
def test_a_model_that_cannot_be_used_is_named_with_the_reason(
    described: World, tmp_path: Path, lehr: Command, make: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    make(folder)
    answer = lehr("score", described.run.url, "--scoring", "other", *features_options(folder))
    assert answer.status == EXIT_ERROR
    assert str(folder) in answer.error and message in answer.error
    assert not (folder / "ran").exists()
    assert not Path(described.run.path("stages/scoring/other.json")).exists()


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("verb", ["score", "export"])
def test_a_model_that_is_gone_by_now_is_named(
    described: World, finished: World, tmp_path: Path, lehr: Command, verb: str, workers: int
) -> None:
    """The scoring is declared; the workers find nothing where its model lay."""
    run = tmp_path / "run"
    shutil.copytree((described if verb == "score" else finished).run.url, run)
    shutil.rmtree(run / "streams", ignore_errors=True)
    location = run / "timings/scoring/base/model.json"
    location.write_text(json.dumps({"model": str(tmp_path / "gone"), "revision": None}))
    options = ["--selection", "s"] if verb == "export" else []
    answer = lehr(verb, run, *options, "--workers", workers)
    assert answer.status == EXIT_ERROR
    assert str(tmp_path / "gone") in answer.error and "no such folder" in answer.error
    assert "while running" not in answer.error


# Targets.


def test_ten_targets_warn_in_match_and_stop_direct(finished: World, tmp_path: Path, lehr: Command) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.run.url, run)
    assert lehr("target", run, "--data", finished.evaluation, "--name", "few", "--workers", "1").status == 0
    assert lehr("score", run, "--workers", "1").status == 0
    matched = lehr("select", run, "--target", "few", "--samples", 10)
    assert matched.status == 0
    assert "note: M < k (10 target samples" in " ".join(matched.out.split())
    refused = lehr("select", run, "--target", "few", "--samples", 10, "--selector", "direct")
    assert refused.status == EXIT_ERROR
    assert "at least 50 target samples, and this target has 10" in refused.error and "few_targets" in refused.error
    assert not (run / "stages/select/direct.json").exists()


def test_a_target_without_a_usable_row_is_an_error_that_says_why(
    described: World, tmp_path: Path, lehr: Command
) -> None:
    data = write_lines(tmp_path / "t.jsonl", [{"text": ""}, {"text": "glass"}])
    answer = lehr("target", described.run.url, "--data", data, "--name", "none", "--workers", "1")
    assert answer.status == EXIT_ERROR
    assert "t.jsonl row 0: empty_text" in answer.error and "t.jsonl row 1: too_short" in answer.error


# Disks.


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """For root, the rights of nobody: root writes into folders that are read-only."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another user may enter, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="lehr-test-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        subprocess.run(["chmod", "-R", "u+w", str(folder)], check=True)
        shutil.rmtree(folder)


def read_only(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)


@pytest.mark.parametrize("verb", ["plan", "target", "score", "select", "export"])
def test_a_read_only_output_is_an_error_that_names_the_place(
    described: World, finished: World, open_folder: Path, lehr: Command, verb: str
) -> None:
    home = open_folder / "home"
    home.mkdir()
    for name in ("corpus", "model"):
        shutil.copytree(described.folder / name, home / name)
    for name in ("target.jsonl", "eval.jsonl"):
        shutil.copy(described.folder / name, home)
    run = home / "run"
    shutil.copytree((finished if verb in ("select", "export") else described).run.url, run)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "root": str(home / "corpus")}))
    (run / "timings/scoring/base/model.json").write_text(json.dumps({"model": str(home / "model"), "revision": None}))
    options: dict[str, list[object]] = {
        "plan": [home / "corpus", "--name", "tiny"],
        "target": ["--data", home / "target.jsonl", "--name", "again", "--workers", "1"],
        "score": ["--workers", "1"],
        "select": ["--samples", "10"],
        "export": ["--selection", "s", "--stream", "again"],
    }
    before = tree_hashes(run)
    read_only(home)
    with unprivileged():
        answer = lehr(verb, home / "new" if verb == "plan" else run, *options[verb])
    assert answer.status == EXIT_ERROR, answer.error
    assert f"cannot write {home}/" in answer.error and "Permission denied" in answer.error
    assert tree_hashes(run) == before


def test_a_run_directory_below_a_file_is_an_error(described: World, tmp_path: Path, lehr: Command) -> None:
    (tmp_path / "file").write_text("")
    answer = lehr("plan", tmp_path / "file" / "run", described.corpus)
    assert answer.status == EXIT_ERROR
    assert f"{tmp_path}/file/run" in answer.error


class FullDisk:
    """A place with room for some of what a stage writes, until `grow`."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack, mounted: bool) -> None:
        self.run, self._folder, self._mounted, self._stack = folder / "disk" / "run", folder, mounted, stack

    def copy(self, run: str, without: list[str], room: int) -> None:
        """Put a run directory there, without some folders, and leave `room` bytes."""
        if self._mounted:
            self._stack.enter_context(small_disk(self._folder / "disk", "64m"))
        shutil.copytree(run, self.run)
        for folder in without:
            shutil.rmtree(self.run / folder)
        if self._mounted:
            state = os.statvfs(self.run)
            self._resize(str((state.f_blocks - state.f_bfree) * state.f_frsize + room))
        else:
            # Without the right to mount: no file of more than 4 KiB, which the kernel refuses in mid-write as well.
            resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 10, resource.RLIM_INFINITY))

    def grow(self) -> None:
        if self._mounted:
            self._resize("64m")
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def _resize(self, size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self._folder / "disk")], check=True)


@pytest.fixture(params=["mounted", "limited"] if can_mount() else ["limited"])
def full_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FullDisk]:
    with contextlib.ExitStack() as stack:
        disk = FullDisk(tmp_path, stack, request.param == "mounted")
        try:
            yield disk
        finally:
            if disk.run.exists():
                disk.grow()


MADE = {
    "target": ["targets", "stages/target"],
    "score": ["features", "rejects", "curvature", "stages/score", "stages/curvature"],
    "select": ["selections", "stages/select"],
    "export": ["streams", "stages/export"],
}
"""What each stage makes, in order."""


@pytest.mark.parametrize("verb", list(MADE))
def test_invariant_5_a_full_disk_is_a_message_and_the_same_command_resumes(
    finished: World, full_disk: FullDisk, lehr: Command, verb: str
) -> None:
    options: dict[str, list[object]] = {
        "target": ["--data", finished.target, "--eval", finished.evaluation, "--workers", 1],
        "score": ["--workers", 1],
        "select": ["--name", "s", "--selector", "target-cosine", "--samples", 20],
        "export": ["--selection", "s", "--shard-samples", 5],
    }
    later = list(MADE)[list(MADE).index(verb) :]
    full_disk.copy(
        finished.run.url,
        [folder for stage in later for folder in MADE[stage]],
        # A selection is two small files; the others get far enough to leave some of their parts.
        room=(4 << 10) if verb == "select" else (48 << 10),
    )
    before = tree_hashes(full_disk.run)
    answer = lehr(verb, full_disk.run, *options[verb])
    assert answer.status == EXIT_ERROR, answer.error
    assert "cannot write" in answer.error and ("No space left" in answer.error or "File too large" in answer.error)
    assert before.items() <= tree_hashes(full_disk.run).items()
    assert not any((full_disk.run / folder).exists() for folder in MADE[verb] if folder.startswith("stages"))
    assert not list(full_disk.run.rglob(f"{TEMPORARY_PREFIX}*"))
    full_disk.grow()
    again = lehr(verb, full_disk.run, *options[verb])
    assert again.status == 0, again.error
    expected, found = tree_hashes(Path(finished.run.url)), tree_hashes(full_disk.run)
    outside = tuple(folder for stage in later[1:] for folder in MADE[stage])
    assert found == {path: digest for path, digest in expected.items() if not path.startswith(outside or ("-",))}


# Words.

STRANGE = [
    "'; DROP TABLE features; --",
    "\"quoted\" and 'single'",
    "\x1b[31mred\x07",
    "tab\tnew\nline",
    "../../etc/passwd",
    "\u202eright to left",
    "nul\x00byte",
    "<script>alert(1)</script>",
    "[bold]markup[/bold]",
    "{{ jinja }}",
]


def test_strange_ids_and_domains_travel_as_they_are_and_print_harmless(
    described: World, tmp_path: Path, model: Path, lehr: Command
) -> None:
    rng = random.Random(8)
    rows: list[dict[str, object]] = [
        {"name": f"{word}-{number}", "topic": word, "text": sentence(rng, 10, 30)}
        for word in STRANGE
        for number in range(3)
    ]
    write_lines(tmp_path / "corpus" / "c.jsonl", rows)
    run = tmp_path / "run"
    columns = ["--id-column", "name", "--domain-column", "topic"]
    target = ["--data", described.target, "--eval", described.evaluation]
    commands: list[list[object]] = [
        ["plan", run, tmp_path / "corpus", *columns],
        ["target", run, *target, *features_options(model)],
        ["score", run, "--workers", 1],
        ["select", run, "--samples", 12],
        ["export", run, "--shard-samples", 5],
        ["audit", run, "--query", "domains-before-after"],
        ["audit", run, "--sql", "SELECT source_id, domain FROM features ORDER BY path, row"],
        ["status", run],
        ["verify", run],
    ]
    said = ""
    for command in commands:
        answer = lehr(*command)
        assert answer.status == 0, (command, answer.error)
        said += answer.out
    assert not set(said) & set("\x00\x07\x1b\u202e")
    opened = Run.open(str(run))
    features = table(opened, "features").to_pylist()
    assert [record["source_id"] for record in features] == [row["name"] for row in rows]
    assert [record["domain"] for record in features] == [row["topic"] for row in rows]
    report = export(opened, "match", IN_PROCESS, shard_samples=5)
    known = {record["sample_id"]: record["source_id"] for record in features}
    ranked = [item for entry in report.index.shards for item in read_shard(report.url, entry)]
    assert len(ranked) == 12
    assert all(item.sample.source_id == known[item.sample.sample_id] for item in ranked)
    held = collections.Counter(domain for entry in report.index.shards for domain in entry.domains)
    assert set(held) <= set(STRANGE)
    domain = STRANGE[1]
    quota = SelectorSettings(selector="random", quotas={domain: 0.0})
    run_select(opened, "without", "base", "target", Budget(samples=20), quota)
    chosen = [r for r in table(opened, "selections", "select", "without").to_pylist() if r["selected"]]
    assert len(chosen) == 20 and domain not in {record["domain"] for record in chosen}


STRANGE_FILES = (
    "it's.jsonl", '"q".jsonl', "'; DROP TABLE features; --.jsonl", "[bold]x[1].jsonl", "a*b?.jsonl", "{a,b}.jsonl", "%20.jsonl",
    "a#b.jsonl", "a::b.jsonl", ":heart:.jsonl", "\x1b[31mred.jsonl", "new\nline.jsonl", "\u202eleft.jsonl",
)  # fmt: skip


def test_strange_names_of_folders_files_and_columns_are_names(
    described: World, tmp_path: Path, model: Path, lehr: Command
) -> None:
    """Quotes, SQL, markup and patterns: what is printed can be typed again, what is queried is what is there."""
    rng = random.Random(9)
    home = tmp_path / 'it\'s "a" [bold] :heart: {x} %s; DROP TABLE features'
    for number, name in enumerate(STRANGE_FILES):
        rows: list[dict[str, object]] = [
            {"text": sentence(rng, 10, 30), "na'me; DROP": f"{number}-{row}", 'q"': "x"} for row in range(2)
        ]
        write_lines(home / "corpus" / name, rows)
    run = home / "run"
    columns = ["--id-column", "na'me; DROP", "--domain-column", 'q"']
    target = ["--data", described.target, "--eval", described.evaluation]
    commands: list[list[object]] = [
        ["plan", run, home / "corpus", *columns],
        ["target", run, *target, *features_options(model)],
        ["score", run, "--workers", 1],
        ["select", run, "--samples", 6],
        ["export", run, "--shard-samples", 5],
        ["verify", run],
        ["status", run],
        ["report", run],
    ]
    for command in commands:
        answer = lehr(*command)
        assert answer.status == 0, (command, answer.error)
        if command[0] in ("target", "score", "select", "export"):
            assert "".join(str(run).split()) in "".join(answer.out.split()), command
    query = "SELECT path, count(*) AS n, min(source_id) AS s FROM features GROUP BY path ORDER BY path"
    found = json.loads(lehr("audit", run, "--sql", query, "--format", "json").out)
    wanted = sorted((name, 2, f"{number}-0") for number, name in enumerate(STRANGE_FILES))
    assert [(row["path"], row["n"], row["s"]) for row in found] == wanted


# Prompts and messages.


def answers(count: int, seed: int) -> list[dict[str, object]]:
    rng = random.Random(seed)
    made: list[dict[str, object]] = []
    for number in range(count):
        question, answer = f"{number} {sentence(rng, 8, 20)}?", sentence(rng, 8, 20)
        made.append(
            {
                "q": question,
                "a": answer,
                "chat": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            }
        )
    return made


@pytest.mark.parametrize("kind", ["prompt", "messages"])
def test_loss_is_taken_on_answers_from_corpus_to_shard(tmp_path: Path, lehr: Command, kind: str) -> None:
    model = save_tiny_model(tmp_path / "model", chat_template=CHAT)
    corpus = write_lines(tmp_path / "corpus" / "c.jsonl", answers(30, 1)).parent
    target = write_lines(tmp_path / "t.jsonl", answers(20, 2))
    columns = {
        "prompt": ["--prompt-column", "q", "--completion-column", "a"],
        "messages": ["--messages-column", "chat"],
    }[kind]
    run = tmp_path / "run"
    commands: list[list[object]] = [
        ["plan", run, corpus, *columns],
        ["target", run, "--data", target, *columns, *features_options(model, max_tokens=400)],
        ["score", run, "--workers", 1],
        ["select", run, "--samples", 8],
        ["export", run],
        ["verify", run],
    ]
    for command in commands:
        answer = lehr(*command)
        assert answer.status == 0, (command, answer.error)
    features = table(Run.open(str(run)), "features").to_pylist()
    assert len(features) == 30
    tokenizer = tiny_tokenizer()
    for record, row in zip(features, answers(30, 1)):
        spoken = len(tokenizer(str(row["a"]))["input_ids"])
        assert record["loss_tokens"] < record["tokens"]
        # The answer's own tokens, its end (`<eos>`, or `</assistant>` in letters), a token that it shares with its prompt.
        assert spoken <= record["loss_tokens"] <= spoken + 14
    folder = f"{run}/{Run.open(str(run)).stream_folder('match', 1)}"
    ranked = [item for entry in read_index(folder).shards for item in read_shard(folder, entry)]
    assert len(ranked) == 8
    for item in ranked:
        [(start, end)] = item.sample.loss_spans
        row = answers(30, 1)[item.sample.row]
        assert item.sample.text[start:end] == str(row["a"]) + ("<eos>" if kind == "prompt" else "</assistant>")
        assert str(row["q"]) in item.sample.text[:start]


def test_messages_without_a_chat_template_say_which_option_gives_one(
    tmp_path: Path, model: Path, lehr: Command
) -> None:
    corpus = write_lines(tmp_path / "corpus" / "c.jsonl", answers(5, 1)).parent
    run = tmp_path / "run"
    assert lehr("plan", run, corpus, "--messages-column", "chat").status == 0
    options = features_options(model)
    refused = lehr("score", run, *options)
    assert refused.status == EXIT_ERROR
    assert "no chat template" in refused.error and "--chat-template" in refused.error
    assert refused.error.count("no chat template") == 1
    given = lehr("score", run, "--scoring", "given", *options, "--chat-template", CHAT)
    assert given.status == 0, given.error
    assert table(Run.open(str(run)), "features", "score", "given").num_rows == 5
