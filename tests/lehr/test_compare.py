"""`lehr compare`: arms trained on equally many tokens, paired differences, verdicts; resumable, the same bytes again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from lehr.audit import ask
from lehr.cli import EXIT_ERROR, main
from lehr.compare.arms import CompareSettings, SharedSettings, parse_arm, training_name
from lehr.compare.run import Comparison, Watch, compare, read_comparison, read_seconds
from schemas.errors import InputError
from schemas.manifest import Manifest, write_manifest
from schemas.run import Run
from schemas.shards import read_index
from selection_ops.batching import collate
from selection_ops.encoding import Encoder
from selection_ops.flops import model_size
from selection_ops.losses import HeadRoute
from selection_ops.model import load_model, tokenizer_fingerprint
from selection_ops.paired import mean_interval
from tests.pipelines.worlds import make_world
from tests.tiny import tiny_llama
from tests.trainer.streams import ENCODING, make_run, ranked, sample, texts, write_stream
from trainer.loggers import Begun, LoggerType, Progress
from trainer.loop import train
from trainer.settings import TrainSettings

Place = tuple[Run, Path]
BUDGET = 160
GUARD = texts(5, seed=9)


def make_place(folder: Path) -> Place:
    """A run with two streams for one target: `match`, texts like the held-out ones, and `random`, of one word."""
    run, model = make_run(folder, samples=80)
    beside: dict[str, Any] = {
        "target": ranked([sample("target", row, text) for row, text in enumerate(texts(9, seed=1))]),
        "evaluation": ranked([sample("eval", row, text) for row, text in enumerate(texts(6, seed=2))]),
    }
    for name, made in (("random", ["the the the the the the the the"] * 80), ("draw-0", texts(80, seed=5)), ("draw-1", texts(80, seed=6)), ("draw-2", texts(80, seed=7))):  # fmt: skip
        write_stream(
            run.path(run.stream_folder(name, 1)),
            ranked([sample(name, row, text) for row, text in enumerate(made)]),
            tokenizer=tokenizer_fingerprint(str(model)),
            name=name,
            **beside,
        )
        write_manifest(
            run.path(run.manifest_path("export", f"{name}.gen-000001")),
            Manifest(stage="export", name=f"{name}.gen-000001", spec={"stream": name, "generation": 1}, inputs={}),
        )
    (folder / "guard.jsonl").write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in GUARD))
    return run, model


def choose(folder: Path | str, *arms: str, **changes: Any) -> CompareSettings:
    shared: dict[str, Any] = {
        "model": str(folder), "token_budget": BUDGET, "lr": 1e-2, "dtype": "float32", "candidates": 8, "n_keep": 4,
        "proj_rank": 4, "warmup_select": 1, "loggers": (), "checkpoint_every": 2,
    }  # fmt: skip
    rule: dict[str, Any] = {
        "control": "random:full", "seeds": (0, 1, 2), "interval": "student", "level": 0.95, "margin": 0.0, "tolerance": 1.0,
    }  # fmt: skip
    given = {name: changes.pop(name) for name in list(changes) if name in rule}
    return CompareSettings(
        arms=arms or ("match:full", "match:filter-then-weight"),
        shared=SharedSettings(**{**shared, **changes}),
        **{**rule, **given},
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="module")
def finished(place: Place) -> Comparison:
    run, model = place
    return compare(run, choose(model), guard=str(model.parent / "guard.jsonl"))


def by_arm(found: Comparison) -> dict[str, dict[str, Any]]:
    return {row["arm"]: row for row in found.arms}


def test_arms_train_equal_tokens_from_one_start(place: Place, finished: Comparison) -> None:
    run, _ = place
    assert len(finished.trainings) == 9
    longest = max(row["tokens"] for row in ask(run, "SELECT max(tokens) AS tokens FROM decisions").table.to_pylist())
    for row in finished.trainings:
        spec, summary = run.manifest("train", row["training"]).spec, run.manifest("train", row["training"]).summary
        assert BUDGET - longest < row["trained_tokens"] == summary["trained_tokens"] <= BUDGET
        assert summary["ended"] == "token budget"
        assert (spec["seed"], spec["token_budget"], spec["schedule"], spec["lr"]) == (
            row["seed"],
            BUDGET,
            "linear",
            1e-2,
        )
        assert row["eval_loss"] == summary["eval_loss"]
    assert len({run.manifest("train", row["training"]).spec["model"] for row in finished.trainings}) == 1
    for row in finished.arms:
        own = [t["trained_tokens"] for t in finished.trainings if t["arm"] == row["arm"]]
        assert (row["least_tokens"], row["most_tokens"]) == (min(own), max(own))


def test_the_learning_rate_comes_to_its_end(place: Place, finished: Comparison) -> None:
    run, _ = place
    for row in finished.trainings:
        (last,) = ask(
            run,
            f"SELECT learning_rate, total_trained_tokens - trained_tokens AS before FROM steps WHERE training = '{row['training']}' "
            "ORDER BY step DESC LIMIT 1",
        ).table.to_pylist()
        assert last["learning_rate"] == pytest.approx(1e-2 * (1 - last["before"] / BUDGET))


def test_differences_are_paired_over_seeds(finished: Comparison) -> None:
    losses = {(row["arm"], row["seed"]): row for row in finished.trainings}
    for label, row in by_arm(finished).items():
        assert row["eval_loss"] == pytest.approx(np.mean([losses[label, seed]["eval_loss"] for seed in range(3)]))
        if label == "random:full":
            assert row["control"] and row["verdict"] == "" and row["difference"] is None
            continue
        for name, ends in (("eval_loss", "difference"), ("guard_loss", "guard")):
            apart = [losses[label, seed][name] - losses["random:full", seed][name] for seed in range(3)]
            interval = mean_interval(apart, "student")
            assert (row[f"{ends}_low"], row[f"{ends}_high"]) == (interval.low, interval.high)
        apart = [losses[label, seed]["eval_loss"] - losses["random:full", seed]["eval_loss"] for seed in range(3)]
        assert row["difference"] == pytest.approx(np.mean(apart))
        assert (row["bootstrap_low"], row["bootstrap_high"]) == (min(apart), max(apart))  # three seeds: the range


def test_text_like_the_held_out_is_adopted_over_one_word(finished: Comparison) -> None:
    """The planted difference is large and of one sign: every interval excludes zero."""
    found = by_arm(finished)
    assert found["match:full"]["difference"] < -0.05
    assert finished.manifest.summary["verdicts"] == {"match:full": "adopt", "match:filter-then-weight": "adopt"}


def test_guard_loss_is_the_token_mean_of_the_final_model(place: Place, finished: Comparison) -> None:
    run, _ = place
    row = finished.trainings[4]
    loaded = load_model(
        run.path(run.manifest("train", row["training"]).summary["checkpoint"]), dtype="float32", attention="sdpa"
    )
    encoder = Encoder(loaded.tokenizer, ENCODING)
    encoded = [encoder.encode(text, ((0, len(text)),)) for text in GUARD]
    total = sum(
        float(HeadRoute(loaded.model).sample_losses(collate([item])).detach().double().sum()) for item in encoded
    )
    assert row["guard_loss"] == pytest.approx(total / sum(sum(item.loss_mask) for item in encoded), rel=1e-6)


def test_flops_are_those_of_the_journal(place: Place, finished: Comparison) -> None:
    run, _ = place
    size = model_size(tiny_llama())
    for row in finished.trainings:
        lengths = ask(run, f"SELECT tokens, kept FROM decisions WHERE training = '{row['training']}'").table.to_pylist()
        plain = size.trained(d["tokens"] for d in lengths if d["kept"])
        assert row["flops"] - row["selection_flops"] == pytest.approx(plain)
        assert (row["selection_flops"] > 0) == row["arm"].endswith("weight")
    seconds = read_seconds(run, "compare")
    assert seconds["match:full"]["training"] > 0 and seconds["match:full"]["offline"] == {}


class Silent:
    """A console that says nothing."""

    def __init__(self, begun: Begun) -> None:
        pass

    def step(self, event: Progress) -> None:
        pass

    def close(self) -> None:
        pass


def counted(settings: CompareSettings, run: Run, **options: Any) -> tuple[list[str], Comparison]:
    """Labels of the arms that were trained, and the comparison."""
    begun: list[str] = []

    def console(arm: Any) -> LoggerType:
        begun.append(f"{arm.label} {arm.seed}")
        return Silent

    return begun, compare(run, settings, watch=Watch(console=console), **options)


def test_finished_arms_are_not_trained_again(place: Place, finished: Comparison) -> None:
    run, model = place
    guard = str(model.parent / "guard.jsonl")
    begun, again = counted(choose(model), run, guard=guard)
    assert begun == [] and again == finished
    # Another comparison shares what it can: one arm and one seed are new.
    begun, _ = counted(choose(model, "match:full", name="more", seeds=(0, 1, 2, 3)), run, guard=guard)
    assert begun == ["random:full 3", "match:full 3"]


class Killed(Exception):
    pass


class Fatal:
    """A logger that ends the process in the third step."""

    def __init__(self, begun: Begun) -> None:
        pass

    def step(self, event: Progress) -> None:
        if event.step == 3:
            raise Killed

    def close(self) -> None:
        pass


@pytest.mark.parametrize("at", [pytest.param(0, marks=pytest.mark.slow), 5, pytest.param(9, marks=pytest.mark.slow)])
def test_a_comparison_that_was_stopped_ends_the_same(
    place: Place, finished: Comparison, tmp_path: Path, at: int
) -> None:
    """Stopped within training `at` (or, at 9, before it judges); the same command again gives the same bytes."""
    run, model = make_place(tmp_path)
    settings = choose(model, loggers=("console",))
    guard = str(model.parent / "guard.jsonl")
    ended: list[int] = []

    def stop(done: int, total: int) -> None:
        ended.append(done)
        if done == total == at:
            raise Killed

    with pytest.raises(Killed):
        watch = Watch(trainings=stop, console=lambda arm: Fatal if ended[-1] == at else Silent)
        compare(run, settings, guard=guard, watch=watch)
    assert ended[-1] == at
    begun, found = counted(settings, run, guard=guard)
    assert len(begun) == 9 - at
    assert (found.arms, found.trainings) == (finished.arms, finished.trainings)
    for name in (
        "comparisons/compare/arms.parquet",
        "comparisons/compare/trainings.parquet",
        "stages/compare/compare.json",
    ):
        mine, other = Path(run.path(name)).read_bytes(), Path(place[0].path(name)).read_bytes()
        assert mine == other, name


def test_options_of_the_rule_change_the_verdict(place: Place, finished: Comparison) -> None:
    run, model = place
    guard = str(model.parent / "guard.jsonl")

    def verdict(name: str, **changes: Any) -> tuple[dict[str, Any], str]:
        _, found = counted(choose(model, "match:full", name=name, **changes), run, guard=guard)
        row = by_arm(found)["match:full"]
        return row, row["verdict"]

    base, word = verdict("rule")
    assert word == "adopt"
    assert verdict("margin", margin=100.0)[1] == "inconclusive"
    assert verdict("tolerance", tolerance=0.0)[1] == "inconclusive"
    wide, _ = verdict("level", level=0.999)
    assert wide["difference_low"] < base["difference_low"] < base["difference_high"] < wide["difference_high"]
    percentile, _ = verdict("percentile", interval="percentile")
    assert (percentile["difference_low"], percentile["difference_high"]) == (
        base["bootstrap_low"],
        base["bootstrap_high"],
    )
    turned = by_arm(compare(run, choose(model, "random:full", name="turned", control="match:full"), guard=guard))
    assert turned["random:full"]["verdict"] == "reject"
    assert turned["random:full"]["difference"] == pytest.approx(-base["difference"])
    bare = by_arm(compare(run, choose(model, "match:full", name="bare")))["match:full"]
    assert bare["guard_loss"] is None and bare["guard_high"] is None and bare["difference"] == base["difference"]


def test_a_stream_can_be_drawn_anew_for_every_seed(place: Place) -> None:
    run, model = place
    begun, found = counted(choose(model, "match:full", control="draw-{seed}:full", name="drawn"), run)
    assert [line for line in begun if line.startswith("draw")] == [f"draw-{{seed}}:full {seed}" for seed in range(3)]
    inputs = [
        run.manifest("train", r["training"]).inputs["stream"] for r in found.trainings if r["arm"].startswith("draw")
    ]
    assert len(set(inputs)) == 3
    # Here control and arm both vary with the seed: a pairing of other seeds has another interval.
    loss = {(row["arm"], row["seed"]): row["eval_loss"] for row in found.trainings}
    mine, other = ([loss[arm, seed] for seed in range(3)] for arm in ("match:full", "draw-{seed}:full"))
    paired = mean_interval([a - b for a, b in zip(mine, other)])
    crossed = mean_interval([a - b for a, b in zip(mine, reversed(other))])
    row = by_arm(found)["match:full"]
    assert (row["difference_low"], row["difference_high"]) == (paired.low, paired.high) != (crossed.low, crossed.high)


def test_arms_branch_off_a_training(place: Place) -> None:
    """Every arm goes on from one checkpoint with its moments: the start is that model, and the comparison says which checkpoint it was."""
    run, model = place
    before = train(
        run,
        TrainSettings(
            model=str(model),
            stream="draw-0",
            policy="full",
            name="stable",
            steps=2,
            candidates=8,
            lr=1e-2,
            dtype="float32",
        ),
    )
    _, found = counted(choose("", "match:full", name="branched", start_from="stable"), run)
    assert found.manifest.summary["start"]["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-6)
    specs = [run.manifest("train", row["training"]).spec for row in found.trainings]
    assert len({spec["start_from"] for spec in specs}) == 1 and specs[0]["start_from"]
    _, cold = counted(choose("", "match:full", name="cold", start_from="stable@2", from_optimizer=False), run)
    assert not {row["training"] for row in cold.trainings} & {row["training"] for row in found.trainings}
    assert cold.arms[0]["eval_loss"] != found.arms[0]["eval_loss"]


@pytest.mark.parametrize(
    "arms,changes,message",
    [
        (("match",), {}, "an arm is STREAM:POLICY, such as match:full, with options behind commas; 'match' is not"),
        (("match:full,lr=1",), {}, "not in 'lr=1'"),
        (("match:full,candidates=many",), {}, "candidates is no int: 'many'"),
        (("match:full,selection_weights=2",), {}, "selection_weights is true or false"),
        (("nothing:full",), {}, "has no finished stream 'nothing'"),
        (("match:none",), {}, "unknown policy 'none'"),
        ((), {"control": ""}, "name the arm that the others are compared with"),
        (("random:full",), {}, "name at least one arm beside the control"),
        (("match:full", "match:full,generation=1"), {}, "cannot fill|are the same|generation"),
        ((), {"seeds": (1, 1, 2)}, "seeds must differ: 1 1 2"),
        ((), {"seeds": (1, 2), "name": "two"}, "2 seeds give no interval; take at least 3"),
        ((), {"token_budget": 0}, "give --token-budget. About [0-9,]+ is what the shortest"),
        ((), {"token_budget": 10**6}, "cannot fill a budget of 1,000,000"),
        ((), {"model": ""}, "name the model that every arm starts from"),
        ((), {"level": 95}, "level"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(
    place: Place, arms: tuple[str, ...], changes: dict[str, Any], message: str
) -> None:
    run, model = place
    before = set(run.folders("trainings"))
    with pytest.raises(InputError, match=message):
        compare(run, choose(model, *arms, **changes))
    assert set(run.folders("trainings")) == before


def test_other_options_under_a_name_are_refused(place: Place, finished: Comparison) -> None:
    run, model = place
    with pytest.raises(
        InputError, match=r"comparison 'compare' exists with another spec: .*margin was 0.0 and is now 0.5"
    ):
        compare(run, choose(model, margin=0.5), guard=str(model.parent / "guard.jsonl"))


def test_arms_judged_on_different_sets_are_refused(tmp_path: Path) -> None:
    run, model = make_place(tmp_path)
    write_stream(
        run.path(run.stream_folder("random", 2)),
        ranked([sample("random", row, text) for row, text in enumerate(texts(40, seed=5))]),
        tokenizer=tokenizer_fingerprint(str(model)), name="random",
        evaluation=ranked([sample("eval", row, text) for row, text in enumerate(texts(6, seed=3))]),
    )  # fmt: skip
    write_manifest(
        run.path(run.manifest_path("export", "random.gen-000002")),
        Manifest(stage="export", name="random.gen-000002", spec={"stream": "random", "generation": 2}, inputs={}),
    )
    with pytest.raises(InputError, match="would be judged on different held-out sets"):
        compare(run, choose(model))


def test_an_arm_whose_stream_ends_before_the_budget_is_refused(place: Place) -> None:
    """The filter keeps a part of what is offered: the stream is long enough, what is kept of it is not."""
    run, model = place
    with pytest.raises(
        InputError, match=r"ended with its stream after \d+ of 300 tokens, before its learning rate came to its end"
    ):
        compare(run, choose(model, "match:random,n_keep=2", token_budget=300, name="short"))


def test_the_name_of_a_training_follows_all_that_decides_it(place: Place) -> None:
    run, _ = place
    index = read_index(run.path(run.stream_folder("match", 1)))
    shared = SharedSettings()

    def name(changed: SharedSettings = shared, arm: str = "match:random", model: str = "m") -> str:
        return training_name(parse_arm(arm, 0, changed), index, model)

    others = [
        name(dataclasses.replace(shared, lr=0.5)), name(dataclasses.replace(shared, start_from="stable@2")), name(model="n"),
        name(arm="match:random,n_keep=3"), name(dataclasses.replace(shared, optimizer_state="elsewhere")),
    ]  # fmt: skip
    assert len({name(), *others}) == 6
    assert name() == name(dataclasses.replace(shared, checkpoint_every=1, loggers=(), cache_bytes=1))


def test_an_option_of_an_arm_is_its_own() -> None:
    shared = SharedSettings(n_keep=8, lr=0.5)
    found = parse_arm("a/b:random,n_keep=3,order=ranked,selection-weights=false", 7, shared)
    assert (found.stream, found.policy, found.seed, found.lr) == ("a/b", "random", 7, 0.5)
    assert (found.n_keep, found.order, found.selection_weights) == (3, "ranked", False)
    assert dataclasses.replace(found, n_keep=8, order="shuffled", selection_weights=True) == parse_arm(
        "a/b:random", 7, shared
    )


def test_the_command_prints_the_table_and_the_verdicts(
    place: Place, finished: Comparison, capsys: pytest.CaptureFixture[str], wide_console: None
) -> None:
    run, model = place
    command = [
        "compare", run.url, "--arm", "match:full", "--arm", "match:filter-then-weight", "--control", "random:full",
        "--model", str(model), "--token-budget", str(BUDGET), "--lr", "0.01", "--dtype", "float32", "--candidates", "8",
        "--n-keep", "4", "--proj-rank", "4", "--warmup-select", "1", "--guard", str(model.parent / "guard.jsonl"),
        "--tolerance", "1", "--checkpoint-every", "2",
    ]  # fmt: skip
    assert main([*command, "--name", "said"]) == 0
    printed = capsys.readouterr().out
    row = by_arm(finished)["match:full"]
    assert f"{row['eval_loss']:.4f}" in printed and f"{row['difference']:+.4f}" in printed
    assert "match:full: adopt, the held-out loss is lower by more than 0" in printed
    assert read_comparison(run, "said").arms == finished.arms
    assert main([*command, "--name", "said", "--seeds", "0", "1"]) == EXIT_ERROR


@pytest.mark.slow
def test_the_whole_path_counts_what_selection_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a corpus on: the scored arm pays for scoring and target by the formula, the random one for nothing; verify agrees."""
    world = make_world(tmp_path, rows=200)
    world.describe()
    world.score()
    run, model = world.run, str(world.model)
    for name, options in (("match", []), ("random", ["--seed", "1"])):
        command = ["select", run.url, "--selector", name, "--target", "target", "--samples", "120", "--name", name]
        assert main([*command, *options]) == 0
        assert main(["export", run.url, "--selection", name]) == 0
    assert main(
        ["compare", run.url, "--arm", "match:full", "--control", "random:full", "--model", model, "--token-budget", "900",
         "--dtype", "float32", "--lr", "0.01"]
    ) == 0  # fmt: skip
    found = by_arm(read_comparison(run, "compare"))
    assert found["random:full"]["offline_flops"] == 0
    lengths = ask(run, "SELECT tokens FROM features UNION ALL SELECT tokens FROM target_samples").table["tokens"]
    assert found["match:full"]["offline_flops"] == pytest.approx(model_size(tiny_llama()).scored(lengths.to_pylist()))
    seconds = read_seconds(run, "compare")
    assert set(seconds["match:full"]["offline"]) >= {"score", "select"}
    assert "score" not in seconds["random:full"]["offline"] and seconds["random:full"]["offline"]["select"] > 0
    assert main(["verify", run.url]) == 0
    assert main(["report", run.url]) == 0
    assert main(["status", run.url]) == 0
    assert "compare" in capsys.readouterr().out
