"""Trainings from start to manifest: parity with transformers, journal, budget, resume, refusals."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

from schemas.errors import InputError, LehrError
from schemas.manifest import Manifest
from schemas.parquet import read_part, read_table
from schemas.run import Run
from schemas.storage import TEMPORARY_PREFIX, list_names
from tests.tiny import save_tiny_model, tiny_tokenizer
from tests.trainer.streams import make_run, ranked, sample, texts, write_stream
from trainer.loop import Progress, _Training, train
from trainer.parallel import OneProcess
from trainer.prepare import prepare
from trainer.settings import TrainSettings
from trainer.stream import RankedStream, shuffled_ranks


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    return make_run(tmp_path_factory.mktemp("world"))


def settings(folder: Path, /, name: str, **changes: Any) -> TrainSettings:
    base: dict[str, Any] = {
        "model": str(folder),
        "name": name,
        "policy": "full",
        "candidates": 8,
        "n_keep": 4,
        "lr": 1e-2,
        "dtype": "float32",
        "warmup_select": 2,
        "proj_rank": 4,
        "mode": "two-pass",
    }
    return TrainSettings(**{**base, **changes})


def journal(run: Run, name: str, table: str = "steps") -> list[dict[str, Any]]:
    folder = run.path(f"{run.training_folder(name)}/{table}")
    tables = [read_table(f"{folder}/{file}", schema=table) for file in list_names(folder, ".parquet")]
    return pa.concat_tables(tables).to_pylist()


def results(run: Run, name: str) -> dict[str, bytes]:
    """Bytes of everything that two equal trainings must share: manifest, journal, every checkpoint.

    Not what a killed process was writing, which no manifest may list.
    """
    folder = Path(run.path(run.training_folder(name)))
    files = [p for p in folder.rglob("*") if p.is_file() and "timings" not in p.parts]
    found = {str(p.relative_to(folder)): p.read_bytes() for p in files if not p.name.startswith(TEMPORARY_PREFIX)}
    found["manifest"] = Path(run.path(run.manifest_path("train", name))).read_bytes()
    assert TEMPORARY_PREFIX.encode() not in found["manifest"]
    return found


def weights(run: Run, name: str, step: int) -> dict[str, torch.Tensor]:
    folder = run.path(f"{run.training_folder(name)}/checkpoints/step-{step:08d}")
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def test_full_reproduces_transformers_token_mean_training(world: tuple[Run, Path]) -> None:
    """Six steps by transformers' own loss, scheduler and torch's clipping, on the same batches.

    float32 on both sides. A loss of 6.6 is a mean over some seventy tokens, gathered in another order: relative 1e-6. An
    AdamW step moves an entry by at most lr = 0.01; where a gradient entry is near zero its rounding (1e-7 of the largest)
    can turn a share of that, so entries agree to 6 steps x 0.01 x 1 % and the norm of the difference to 1e-4 of the norm.
    """
    run, folder = world
    train(run, settings(folder, "parity", lr=1e-2, weight_decay=0.0))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, 6)
    items = list(RankedStream(run.path("streams/match/gen-000001")))
    tokenizer = tiny_tokenizer()
    losses, norms = [], []
    for start in range(0, 48, 8):
        batch = tokenizer(
            [item.ranked.sample.text for item in items[start : start + 8]], return_tensors="pt", padding=True
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    rows = journal(run, "parity")
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-4)
    for name, found in weights(run, "parity", 6).items():
        true = model.state_dict()[name]
        assert float((found - true).norm() / true.norm()) < 1e-4, name
        assert float((found - true).abs().max()) < 6e-4, name


def test_trainer_of_transformers_gives_the_same_numbers(world: tuple[Run, Path], tmp_path: Path) -> None:
    """transformers.Trainer itself over the ranked order: the logged losses and the final weights, tolerances as above."""
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    run, folder = world
    train(run, settings(folder, "trainer", order="ranked", clip=1.0))
    tokenizer = tiny_tokenizer()
    data = [
        {"input_ids": tokenizer(item.ranked.sample.text)["input_ids"]}
        for item in RankedStream(run.path("streams/match/gen-000001"), order="ranked")
    ]

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(data)  # type: ignore[arg-type]

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=8, num_train_epochs=1, learning_rate=1e-2, logging_steps=1,
        lr_scheduler_type="linear", weight_decay=0.0, max_grad_norm=1.0, report_to=[], save_strategy="no", use_cpu=True,
        optim="adamw_torch", disable_tqdm=True,
    )  # fmt: skip
    theirs = InOrder(
        model=model, args=arguments, train_dataset=data, data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False)
    )  # fmt: skip
    theirs.train()
    logged = [float(entry["loss"]) for entry in theirs.state.log_history if "loss" in entry]
    # Logged with four decimals or more.
    assert [row["loss"] for row in journal(run, "trainer")] == pytest.approx(logged, abs=1e-4)
    for name, found in weights(run, "trainer", 6).items():
        true = model.state_dict()[name]
        assert float((found - true).norm() / true.norm()) < 1e-4, name


@pytest.mark.parametrize("policy", ["full", "random", "filter-then-weight"])
def test_journal_and_manifest_say_what_happened(world: tuple[Run, Path], policy: str) -> None:
    run, folder = world
    events: list[Progress] = []
    summary = train(
        run, settings(folder, f"said-{policy}", policy=policy, checkpoint_every=4, eval_every=3), events.append
    )
    steps, decisions = journal(run, f"said-{policy}"), journal(run, f"said-{policy}", "decisions")
    assert [row["step"] for row in steps] == list(range(1, 7)) == [event.step for event in events]
    assert [row["position"] for row in decisions] == list(range(48))
    order = shuffled_ranks(0, 48, 0).tolist()
    assert [row["rank"] for row in decisions] == order
    for row in steps:
        mine = [d for d in decisions if d["step"] == row["step"]]
        kept = [d for d in mine if d["kept"]]
        assert row["offered"] == len(mine) == 8
        assert row["kept"] == len(kept)
        assert row["trained_tokens"] == sum(d["tokens"] for d in kept)
        assert row["weight_sum"] == pytest.approx(len(kept), rel=1e-12)
        assert all((d["step_weight"] > 0) == d["kept"] for d in mine)
        assert row["mode"] == ("two-pass" if policy == "filter-then-weight" else "plain")
        assert (row["eval_loss"] is not None) == (row["step"] in (3, 6))
    assert steps[-1]["total_trained_tokens"] == summary["trained_tokens"] == sum(r["trained_tokens"] for r in steps)
    assert steps[-1]["total_offered_tokens"] == summary["offered_tokens"] == sum(d["tokens"] for d in decisions)
    assert summary["eval_loss"] == steps[-1]["eval_loss"] < summary["initial_eval_loss"]
    assert summary["ended"] == "steps"
    if policy != "full":
        assert {row["kept"] for row in steps} <= {1, 2, 3, 4}
    manifest = run.manifest("train", f"said-{policy}")
    paths = [part.path for part in manifest.parts]
    assert [p for p in paths if "/steps/" in p] == [
        f"trainings/said-{policy}/steps/part-{a:06d}-{b:06d}.parquet" for a, b in ((1, 4), (5, 6))
    ]
    assert f"trainings/said-{policy}/checkpoints/step-00000006/model.safetensors" in paths
    for part in manifest.parts:
        read_part(run.url, part)
    assert not any("timings" in path for path in paths)
    assert journal(run, f"said-{policy}", "timings")[0]["seconds"] > 0


def test_the_final_checkpoint_is_a_model_folder(world: tuple[Run, Path]) -> None:
    run, folder = world
    summary = train(run, settings(folder, "folder", steps=1))
    url = run.path(summary["checkpoint"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(url), AutoTokenizer.from_pretrained(url)
    assert tokenizer("glass is")["input_ids"] == tiny_tokenizer()("glass is")["input_ids"]
    before = AutoModelForCausalLM.from_pretrained(folder)
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters())]
    assert all(moved)  # every parameter takes part in the update, the embedding and the norms too
    assert {path.suffix for path in Path(url).iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_transformers_loads_the_final_model_with_the_same_logits_bitwise(tmp_path: Path, kind: str) -> None:
    """Also where the head is tied (GPT-2): what was in memory after the last step is what anybody loads."""
    run, folder = make_run(tmp_path, samples=16, kind=kind)
    chosen = settings(folder, "final", policy="filter-then-weight")
    ready = prepare(run, chosen, OneProcess())
    assert not isinstance(ready, Manifest)
    training = _Training(run, chosen, ready, "", OneProcess())
    training.restore()
    while not training.state.ended:
        training.advance()
    url = run.path(training.finish()["checkpoint"])
    loaded = AutoModelForCausalLM.from_pretrained(url, attn_implementation=ready.spec["attention"], dtype=torch.float32)
    ids_BT = torch.arange(24)[None] * 7 % 300 + 3
    with torch.no_grad():
        mine, theirs = ready.model.eval()(ids_BT).logits, loaded.eval()(ids_BT).logits
        start = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids_BT).logits
    assert torch.equal(mine, theirs)
    assert not torch.equal(mine, start)


@pytest.mark.parametrize("policy", ["full", "random", "filter-then-weight"])
def test_token_budget(world: tuple[Run, Path], policy: str) -> None:
    """Never more than the budget, never less than it by a whole sample; the rate follows the tokens spent."""
    run, folder = world
    name = f"budget-{policy}"
    summary = train(run, settings(folder, name, policy=policy, token_budget=150, epochs=4))
    longest = max(row["tokens"] for row in journal(run, name, "decisions"))
    assert 150 - longest < summary["trained_tokens"] <= 150
    assert summary["ended"] == "token budget"
    spent = 0
    for row in journal(run, name):
        assert row["learning_rate"] == pytest.approx(1e-2 * (1 - spent / 150), rel=1e-12)
        spent += row["trained_tokens"]
    assert summary["eval_loss"] is not None


def test_a_budget_below_every_sample_is_refused(world: tuple[Run, Path]) -> None:
    run, folder = world
    with pytest.raises(InputError, match="token budget of 1 is shorter"):
        train(run, settings(folder, "tiny-budget", token_budget=1))


def test_a_stream_that_ends_before_the_budget_is_said(
    world: tuple[Run, Path], caplog: pytest.LogCaptureFixture
) -> None:
    run, folder = world
    with caplog.at_level(logging.WARNING):
        summary = train(run, settings(folder, "short", token_budget=10**6))
    assert summary["ended"] == "stream"
    assert "the stream ended after" in caplog.text
    with caplog.at_level(logging.WARNING):
        assert train(run, settings(folder, "fewer", steps=100))["steps"] == 6
    assert "Raise epochs" in caplog.text


class Stop(Exception):
    pass


def stopping(at: int) -> Any:
    def progress(event: Progress) -> None:
        if event.step == at:
            raise Stop

    return progress


@pytest.mark.parametrize(
    "policy,at,dtype",
    [
        ("full", 3, "float32"),
        ("random", 5, "float32"),
        ("filter-then-weight", 1, "float32"),
        ("filter-then-weight", 2, "float32"),
        ("filter-then-weight", 5, "bfloat16"),
    ],
)
def test_resume_gives_the_same_bytes(tmp_path: Path, policy: str, at: int, dtype: str) -> None:
    """A training stopped behind step `at` (before, on and behind a checkpoint) against one that was not, dropout included."""
    model_changes = {"policy": policy, "checkpoint_every": 2, "eval_every": 3, "dtype": dtype, "weight_decay": 0.1}
    found = []
    for place in ("whole", "cut"):
        run, folder = make_run(tmp_path / place, kind="gpt2")
        config = folder / "config.json"
        config.write_text(config.read_text().replace('pdrop": 0.0', 'pdrop": 0.2'))
        chosen = settings(folder, "t", **model_changes)
        if place == "cut":
            with pytest.raises(Stop):
                train(run, chosen, stopping(at))
            assert not Path(run.path(run.manifest_path("train", "t"))).exists()
            seen: list[int] = []
            train(run, chosen, lambda event: seen.append(event.step))  # noqa: B023
            assert seen[0] == at // 2 * 2 + 1
        else:
            train(run, chosen)
        found.append(results(run, "t"))
    assert found[0].keys() == found[1].keys()
    assert [name for name in found[0] if found[0][name] != found[1][name]] == []


def test_resume_with_other_checkpoints_leaves_the_same_rows(tmp_path: Path) -> None:
    """Cadence is execution: rows, losses and weights agree though the parts are cut elsewhere; no row stands twice."""
    run, folder = make_run(tmp_path)
    train(run, settings(folder, "whole", checkpoint_every=2))
    with pytest.raises(Stop):
        train(run, settings(folder, "cut", checkpoint_every=2), stopping(5))
    train(run, settings(folder, "cut", checkpoint_every=1, keep_checkpoints=5))
    assert journal(run, "cut") == journal(run, "whole")
    assert journal(run, "cut", "decisions") == journal(run, "whole", "decisions")
    one, other = weights(run, "whole", 6), weights(run, "cut", 6)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_finished_training_is_left_alone(world: tuple[Run, Path]) -> None:
    run, folder = world
    summary = train(run, settings(folder, "twice"))
    before = results(run, "twice")
    events: list[Progress] = []
    assert train(run, settings(folder, "twice"), events.append) == summary
    assert events == []
    assert results(run, "twice") == before


def test_a_torn_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, folder = make_run(tmp_path)
    chosen = settings(folder, "t", checkpoint_every=2)
    train(run, settings(folder, "whole", checkpoint_every=2))
    for harm in ("manifest", "bytes", "missing"):
        name = f"torn-{harm}"
        chosen = settings(folder, name, checkpoint_every=2)
        with pytest.raises(Stop):
            train(run, chosen, stopping(5))
        torn = Path(run.path(f"{run.training_folder(name)}/checkpoints/step-00000004"))
        if harm == "manifest":
            (torn / "manifest.json").unlink()
        elif harm == "missing":
            (torn / "optimizer.safetensors").unlink()
        else:
            data = bytearray((torn / "model.safetensors").read_bytes())
            data[-1] ^= 1
            (torn / "model.safetensors").write_bytes(bytes(data))
        events: list[Progress] = []
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            train(run, chosen, events.append)
        assert "step-00000004 is torn and passed over" in caplog.text
        assert events[0].step == 3
        assert journal(run, name) == journal(run, "whole")


def test_parts_that_no_checkpoint_vouches_for_are_written_anew(tmp_path: Path) -> None:
    """The checkpoint behind the part of steps 3-4 is torn, and the parts are cut elsewhere from then on: no row stands twice."""
    run, folder = make_run(tmp_path)
    train(run, settings(folder, "whole", checkpoint_every=2))
    with pytest.raises(Stop):
        train(run, settings(folder, "cut", checkpoint_every=2), stopping(5))
    (Path(run.path(run.training_folder("cut"))) / "checkpoints/step-00000004/manifest.json").unlink()
    train(run, settings(folder, "cut", checkpoint_every=1))
    for table in ("steps", "decisions"):
        assert journal(run, "cut", table) == journal(run, "whole", table)


def test_the_target_batch_is_drawn_anew(world: tuple[Run, Path]) -> None:
    """The weights stand still, so only another batch can have another loss; every target sample is drawn in time."""
    run, folder = world
    train(run, settings(folder, "still", policy="filter-then-weight", lr=0.0, target_batch=3))
    train(run, settings(folder, "all", policy="filter-then-weight", lr=0.0, target_batch=9))
    assert len({row["target_loss"] for row in journal(run, "still")}) > 3
    # All nine each time: one number, but for the order of a float32 sum.
    losses = [row["target_loss"] for row in journal(run, "all")]
    assert max(losses) - min(losses) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 2e-2},
        {"seed": 1},
        {"policy": "random"},
        {"candidates": 4},
        {"order": "ranked"},
        {"steps": 3},
        {"batch_tokens": 100},
    ],
)
def test_another_spec_under_the_same_name_is_refused_by_naming_it(
    world: tuple[Run, Path], changes: dict[str, Any]
) -> None:
    run, folder = world
    train(run, settings(folder, "named"))
    with pytest.raises(InputError, match=rf"'named' exists with another spec: {next(iter(changes))} was"):
        train(run, settings(folder, "named", **changes))


def test_two_seeds_are_two_trainings(world: tuple[Run, Path]) -> None:
    run, folder = world
    train(run, settings(folder, "seed-0", policy="random", seed=0))
    train(run, settings(folder, "seed-1", policy="random", seed=1))
    assert journal(run, "seed-0", "decisions") != journal(run, "seed-1", "decisions")


def test_no_stream(world: tuple[Run, Path], tmp_path: Path) -> None:
    run, folder = world
    with pytest.raises(InputError, match=r"no finished stream 'direct' \(finished: match\)"):
        train(run, settings(folder, "x", stream="direct"))
    with pytest.raises(InputError, match=r"no index.json"):
        train(run, settings(folder, "x", stream=str(tmp_path / "nowhere")))


def test_a_stream_of_another_tokenizer_is_refused(world: tuple[Run, Path], tmp_path: Path) -> None:
    run, _ = world
    other = save_tiny_model(tmp_path / "other", chat_template="{{ messages }}")
    with pytest.raises(InputError, match="cut with a tokenizer of fingerprint"):
        train(run, settings(other, "x"))


def test_filter_then_weight_without_a_target_is_refused(world: tuple[Run, Path], tmp_path: Path) -> None:
    run, folder = world
    tokenizer = RankedStream(run.path("streams/match/gen-000001")).index.tokenizer
    items = ranked([sample("words", row, text) for row, text in enumerate(texts(16))])
    write_stream(str(tmp_path / "bare"), items, tokenizer=tokenizer)
    chosen = settings(folder, "bare", stream=str(tmp_path / "bare"), policy="filter-then-weight")
    with pytest.raises(InputError, match=r"holds none.*--policy full or random"):
        train(run, chosen)
    summary = train(run, settings(folder, "bare-full", stream=str(tmp_path / "bare")))
    assert summary["eval_loss"] is None


def test_a_model_that_produces_nan_is_a_named_error(world: tuple[Run, Path], tmp_path: Path) -> None:
    run, _ = world
    folder = save_tiny_model(tmp_path / "nan")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    model.save_pretrained(folder)
    first = RankedStream(run.path("streams/match/gen-000001")).take(1)[0].ranked.sample.sample_id
    for policy in ("full", "filter-then-weight"):
        with pytest.raises(
            LehrError, match=r"step 1: .*not finite|step 1: the loss of the target batch is nan"
        ) as caught:
            train(run, settings(folder, f"nan-{policy}", policy=policy))
        assert policy != "full" or first in str(caught.value)
        assert not Path(run.path(run.manifest_path("train", f"nan-{policy}"))).exists()


def test_an_environment_of_several_processes_that_is_not_whole_is_refused(
    world: tuple[Run, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = world
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        InputError, match="WORLD_SIZE is 2, and RANK, MASTER_ADDR, MASTER_PORT is not set: start with torchrun"
    ):
        train(run, settings(folder, "parallel"))


def test_unusable_models(world: tuple[Run, Path], tmp_path: Path) -> None:
    run, _ = world
    with pytest.raises(InputError, match="--model"):
        train(run, TrainSettings(policy="full"))
    with pytest.raises(InputError, match="nowhere"):
        train(run, settings(tmp_path / "nowhere", "x"))


def test_read_only_output(tmp_path: Path) -> None:
    """Root may write anywhere, so the training's place is taken by a file instead: no folder can be made there either."""
    run, folder = make_run(tmp_path)
    if os.geteuid():
        Path(run.url).chmod(0o555)
    else:
        Path(run.path("trainings")).write_text("in the way")
    try:
        with pytest.raises(InputError, match=r"cannot write .*trainings"):
            train(run, settings(folder, "t"))
    finally:
        Path(run.url).chmod(0o755)


def test_runs_on_an_object_store(world: tuple[Run, Path]) -> None:
    """The same training with its run directory in memory:// : the same journal and weights, byte for byte."""
    import fsspec

    run, folder = world
    memory = fsspec.filesystem("memory")
    remote = Run.create("memory://lehr/run", corpus="words", root="x")
    memory.put(run.path("streams"), "/lehr/run/streams", recursive=True)
    memory.put(run.path("stages/export"), "/lehr/run/stages/export", recursive=True)
    try:
        chosen = settings(folder, "remote", policy="filter-then-weight", checkpoint_every=2, keep_checkpoints=1)
        train(remote, chosen)
        train(run, chosen)
        local = results(run, "remote")
        for name, data in local.items():
            place = "/lehr/run/stages/train/remote.json" if name == "manifest" else f"/lehr/run/trainings/remote/{name}"
            assert memory.cat_file(place) == data, name
        assert not memory.exists("/lehr/run/trainings/remote/checkpoints/step-00000002/model.safetensors")
    finally:
        memory.rm("/lehr", recursive=True)


def test_journal_opens_without_lehr(world: tuple[Run, Path]) -> None:
    run, folder = world
    train(run, settings(folder, "open", steps=2))
    path = run.path(f"{run.training_folder('open')}/steps/part-000001-000002.parquet")
    table = pq.read_table(path)
    assert table["step"].to_pylist() == [1, 2]
    assert table.schema.field("loss").metadata[b"unit"] == b"nats per token"
