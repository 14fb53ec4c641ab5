"""Every option of the pipelines: changing it changes the result in the way its help states, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines.check import check
from pipelines.engines import base as engine_base
from pipelines.geometry import full_sketches, read_target, unit_sketches
from pipelines.options import CheckOptions, Execution, ScoringOptions, TargetOptions
from pipelines.plan import make_plan
from pipelines.score import parse_share, score
from pipelines.scorer import SampleScorer
from pipelines.select import run_select
from pipelines.target import describe
from schemas.errors import InputError
from schemas.parquet import read_table
from schemas.run import Run
from schemas.spec import CorpusColumns, PlanSpec
from schemas.units import read_plan
from selection_ops.batching import Batch
from selection_ops.encoding import Encoded
from selection_ops.engine import GradientEngine, SampleFeatures
from selection_ops.selectors import Budget, SelectorSettings
from tests.families import FAMILIES
from tests.pipelines.worlds import IN_PROCESS, World, make_world, sentence, tree_hashes
from tests.tiny import save_tiny_model, tiny_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LONG = CHAT.replace("<{{ m.role }}>", "<{{ m.role }} says>").replace("<assistant>", "<assistant says>")

# Features are float32 in these tests: gradients of one sample agree to 1e-5 of their norm however they are batched, and each
# stored number of a sketch is rounded to float16, by at most 2^-11 of itself; so two sketches differ by at most 2^-10.
SKETCH = 2**-10


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A described and scored world; tests add scorings, targets and selections of other names."""
    world = make_world(tmp_path_factory.mktemp("world"), rows=12)
    world.describe()
    world.score()
    return world


def table(run: Run, kind: str, scoring: str) -> pa.Table:
    """Features or rejects of a scoring, in corpus order."""
    parts = [part.path for part in run.manifest("score", scoring).parts if part.path.startswith(f"{kind}/")]
    return pa.concat_tables([read_table(run.path(path), schema=kind) for path in parts])


def scored(world: World, name: str, **changes: object) -> pa.Table:
    """Features of the corpus under the base options with changes, as scoring `name`."""
    options = dataclasses.replace(world.scoring_options, **changes)  # type: ignore[arg-type]
    score(world.run, name, options, IN_PROCESS)
    return table(world.run, "features", name)


def numbers(features: pa.Table, name: str) -> np.ndarray:
    return features[name].to_numpy().astype(np.float64)


def largest_gap(left: pa.Table, right: pa.Table) -> float:
    """Largest distance between the unit sketches of equal rows."""
    assert left["sample_id"].equals(right["sample_id"])
    difference = unit_sketches(left).astype(np.float64) - unit_sketches(right).astype(np.float64)
    return float(np.linalg.norm(difference, axis=1).max())


# What a sample is.


def test_max_tokens_cuts_longer_documents_into_windows(world: World) -> None:
    base, short = table(world.run, "features", "base"), scored(world, "short", max_tokens=50)
    assert base["tokens"].to_numpy().max() > 50 >= short["tokens"].to_numpy().max()
    assert max(base["window"].to_pylist()) == 0 < max(short["window"].to_pylist())
    assert short.num_rows > base.num_rows


def test_min_tokens_rejects_shorter_samples(world: World) -> None:
    lengths = table(world.run, "features", "base")["tokens"].to_numpy()
    bound = int(np.median(lengths))
    kept = scored(world, "long", min_tokens=bound)
    assert kept["tokens"].to_numpy().min() >= bound
    reasons = table(world.run, "rejects", "long")["reason"].to_pylist()
    assert reasons.count("too_short") == (lengths < bound).sum() > 0


def test_append_eos_always_adds_one_token_that_carries_loss(world: World) -> None:
    base, ended = table(world.run, "features", "base"), scored(world, "ended", append_eos="always")
    assert (numbers(ended, "tokens") == numbers(base, "tokens") + 1).all()
    assert (numbers(ended, "loss_tokens") == numbers(base, "loss_tokens") + 1).all()
    assert set(ended["content_id"].to_pylist()).isdisjoint(base["content_id"].to_pylist())


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A corpus of chat messages and of the same as prompt and completion, and a tokenizer with a template."""
    folder = tmp_path_factory.mktemp("spoken")
    model = save_tiny_model(folder / "model", chat_template=CHAT)
    rng = random.Random(1)
    rows = []
    for _ in range(6):
        question, answer = sentence(rng, 4, 8), sentence(rng, 4, 8)
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"chat": chat, "q": question, "a": answer})
    (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, columns in (
        ("chat", CorpusColumns(messages="chat")),
        ("pairs", CorpusColumns(prompt="q", completion="a")),
    ):
        make_plan(str(folder / name), str(folder / "c.jsonl"), PlanSpec(corpus=name, columns=columns))
    return World(folder, folder / "c.jsonl", folder / "c.jsonl", folder / "none", model, Run.open(str(folder / "chat")))


def test_chat_template_replaces_that_of_the_tokenizer(spoken: World) -> None:
    own = scored(spoken, "own")
    assert scored(spoken, "same", chat_template=CHAT)["content_id"].equals(own["content_id"])
    longer = scored(spoken, "other", chat_template=LONG)
    assert (numbers(longer, "tokens") > numbers(own, "tokens")).all()
    # Only the header of the assistant's turn grew, and it carries no loss.
    assert (numbers(longer, "loss_tokens") - numbers(own, "loss_tokens") <= 1).all()


def test_append_eos_never_leaves_completions_without_an_end(spoken: World) -> None:
    pairs = dataclasses.replace(spoken, run=Run.open(str(spoken.folder / "pairs")))
    ended, bare = scored(pairs, "ended"), scored(pairs, "bare", append_eos="never")
    assert (numbers(ended, "loss_tokens") == numbers(bare, "loss_tokens") + 1).all()


# What a sketch is.


def test_proj_rank_changes_the_sketch_and_no_loss(world: World) -> None:
    base, other = table(world.run, "features", "base"), scored(world, "rank", proj_rank=8)
    assert largest_gap(base, other) > 0.1
    assert other["loss"].equals(base["loss"])


def test_higher_proj_rank_estimates_inner_products_better(world: World) -> None:
    """The error of an inner product of sketches falls with the number of independent numbers in it."""
    wide = full_sketches(scored(world, "wide", proj_rank=16, k=0)).numpy()
    exact = wide @ wide.T
    errors = []
    for rank, name in ((2, "thin"), (8, "thick")):
        rows = full_sketches(scored(world, name, proj_rank=rank, k=0)).numpy()
        errors.append(np.linalg.norm(rows @ rows.T - exact) / np.linalg.norm(exact))
    assert errors[1] < errors[0]


def test_attribute_all_adds_every_other_parameter(world: World) -> None:
    """With every number kept, the blocks' part of the sketch stays as it is, and the rest comes beside it."""
    blocks, everything = scored(world, "blocks", k=0), scored(world, "everything", k=0, attribute="all")
    assert everything["loss"].equals(blocks["loss"])
    spec, narrow = world.run.scoring("everything"), world.run.scoring("blocks")
    names = [site for group in spec.input_groups for site in group.sites]
    own = [site for group in narrow.input_groups for site in group.sites]
    assert spec.small_sites and set(own) < set(names)
    size = spec.proj_rank**2
    columns = np.concatenate([np.arange(size) + names.index(site) * size for site in own])
    found, wanted = full_sketches(everything).numpy(), full_sketches(blocks).numpy()
    assert found.shape[1] == spec.sketch_size > wanted.shape[1]
    # Rows are stored in float16, at another norm.
    assert np.linalg.norm(found[:, columns] - wanted) < 2e-3 * np.linalg.norm(wanted)
    assert (numbers(everything, "grad_norm") > numbers(blocks, "grad_norm")).all()
    summary = world.run.manifest("scoring", "everything").summary
    assert summary["attributed_share"] == 1.0 and not summary["not_attributed"]
    report = check(world.run, "everything", CheckOptions(rows=6, target_rows=0))
    assert report.intact and report.faithful


def test_k_is_the_length_of_a_sketch_and_0_keeps_every_number(world: World) -> None:
    sites = sum(len(group.sites) for group in world.run.scoring("base").input_groups)
    assert unit_sketches(table(world.run, "features", "base")).shape[1] == 64
    narrow, whole = scored(world, "narrow", k=16), scored(world, "all", k=0)
    assert unit_sketches(narrow).shape[1] == 16
    assert unit_sketches(whole).shape[1] == sites * 4 * 4
    # The norm of the gradient is estimated before the fold, so only the norm of the sketch knows of k.
    assert narrow["grad_norm"].equals(whole["grad_norm"])
    np.testing.assert_allclose(numbers(whole, "sketch_norm"), numbers(whole, "grad_norm"), rtol=1e-5)
    assert not narrow["sketch_norm"].equals(whole["sketch_norm"])


def test_seed_changes_the_sketch_and_no_loss(world: World) -> None:
    base, other = table(world.run, "features", "base"), scored(world, "seed", seed=1)
    assert largest_gap(base, other) > 0.5
    assert other["loss"].equals(base["loss"])


def test_loss_mean_is_the_sum_over_loss_tokens(world: World) -> None:
    base, mean = table(world.run, "features", "base"), scored(world, "mean", loss="mean")
    for name in ("loss", "grad_norm", "sketch_norm"):
        np.testing.assert_allclose(
            numbers(mean, name), numbers(base, name) / numbers(base, "loss_tokens"), rtol=1e-5, err_msg=name
        )
    assert largest_gap(base, mean) < SKETCH


def test_dtype_changes_the_arithmetic(world: World) -> None:
    base = table(world.run, "features", "base")
    double, half = scored(world, "double", dtype="float64"), scored(world, "half", dtype="bfloat16")
    np.testing.assert_allclose(numbers(double, "loss"), numbers(base, "loss"), rtol=1e-5)
    assert largest_gap(base, double) < SKETCH
    gap = np.abs(numbers(half, "loss") / numbers(base, "loss") - 1).max()
    # bfloat16 keeps 8 bits: a loss of some hundred tokens is off by about 2^-9 and at most by a few 2^-8.
    assert 2**-16 < gap < 2**-5


def test_attention_is_the_implementation_used(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    original = SampleScorer._loaded_engine

    def watched(self: SampleScorer) -> object:
        engine = original(self)
        used.append(engine.model.config._attn_implementation)  # type: ignore[attr-defined]
        return engine

    monkeypatch.setattr(SampleScorer, "_loaded_engine", watched)
    tables = [scored(world, f"by-{name}", attention=name) for name in ("eager", "sdpa")]
    assert set(used) == {"eager", "sdpa"}
    assert largest_gap(*tables) < SKETCH
    with pytest.raises(InputError, match="magic"):
        scored(world, "magic", attention="magic")


@pytest.mark.parametrize("limit", [150, 600])
def test_batch_tokens_bounds_every_batch(world: World, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    sizes: list[tuple[int, int]] = []
    original = SampleScorer._features

    def watched(self: SampleScorer, engine: object, batch: list[Encoded]) -> object:
        sizes.append((len(batch), max(len(item.ids) for item in batch)))
        return original(self, engine, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(SampleScorer, "_features", watched)
    features = scored(world, f"batch-{limit}", batch_tokens=limit)
    # A sample longer than the bound is a batch of its own.
    assert all(count * longest <= limit or count == 1 for count, longest in sizes)
    assert max(count for count, _ in sizes) >= limit // 150
    assert largest_gap(table(world.run, "features", "base"), features) < SKETCH


def test_layout_packed_gives_the_features_of_padded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens: list[tuple[int, ...]] = []
    original = SampleScorer._features

    def watched(self: SampleScorer, engine: GradientEngine, batch: list[Encoded]) -> SampleFeatures:
        run = engine.features

        def features(made: Batch) -> SampleFeatures:
            assert made.ids_BT.shape == (1, made.tokens)
            tokens.append(tuple(len(item.ids) for item in batch))
            return run(made)

        with monkeypatch.context() as patch:
            patch.setattr(engine, "features", features)
            return original(self, engine, batch)

    monkeypatch.setattr(SampleScorer, "_features", watched)
    padded, packed = table(world.run, "features", "base"), scored(world, "packed", layout="packed")
    assert max(len(batch) for batch in tokens) > 2
    assert all(sum(batch) <= 512 or len(batch) == 1 for batch in tokens)  # 512: batch_tokens of the world
    assert largest_gap(padded, packed) < SKETCH
    # Losses are sums of float32 token losses, and norms of gradients that agree to 1e-5.
    assert np.allclose(numbers(packed, "loss"), numbers(padded, "loss"), rtol=1e-5)
    assert np.allclose(numbers(packed, "sketch_norm"), numbers(padded, "sketch_norm"), rtol=1e-5)
    assert packed["loss_tokens"].equals(padded["loss_tokens"])
    with pytest.raises(InputError, match="declared with layout = 'packed', not 'padded'"):
        scored(world, "packed", layout="padded")


def test_layout_packed_is_refused_with_the_reason_before_anything_is_declared(world: World, tmp_path: Path) -> None:
    FAMILIES["opt"](torch.float32).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"OPTForCausalLM \(sdpa attention\).*layout packed.*samples before it.*layout padded"
    ):
        scored(world, "never", model=str(tmp_path), layout="packed")
    assert not Path(world.run.path("stages/scoring/never.json")).exists()
    assert scored(world, "opt", model=str(tmp_path)).num_rows > 0


def test_layout_packed_a_sample_that_is_not_finite_costs_itself(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Infinite in attention, where zero times infinity is NaN, and so for every sample of the row."""
    token: list[int] = []
    original = SampleScorer._loaded_engine

    def poisoned(self: SampleScorer) -> GradientEngine:
        engine = original(self)
        texts = [row["preview"] for row in base.to_pylist()]
        items = [self.encoder.encode(text, ()).ids for text in texts]
        counts = Counter(token for ids in items for token in set(ids))
        token[:] = [min(counts, key=lambda found: (counts[found], found))]
        with torch.no_grad():
            engine.model.get_input_embeddings().weight[token[0]] = float("nan")
        return engine

    base = table(world.run, "features", "base")
    monkeypatch.setattr(SampleScorer, "_loaded_engine", poisoned)
    padded, packed = scored(world, "sick", seed=5), scored(world, "sick-packed", seed=5, layout="packed")
    reasons = [table(world.run, "rejects", name)["reason"].to_pylist() for name in ("sick", "sick-packed")]
    assert reasons[0] == reasons[1]
    assert 0 < reasons[0].count("non_finite") < base.num_rows
    assert largest_gap(padded, packed) < SKETCH


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 1}, "max_tokens must be at least 2"),
        ({"min_tokens": 500}, r"min_tokens must lie in 2\.\.200"),
        ({"proj_rank": 0}, r"proj_rank must lie in 1\.\.512"),
        ({"k": -1}, "k must be 0"),
        ({"batch_tokens": -1}, "batch_tokens must be positive"),
        ({"loss": "median"}, "unknown loss 'median': sum, mean"),
        ({"dtype": "int8"}, "int8"),
        ({"layout": "stacked"}, "unknown layout 'stacked': padded, packed"),
        ({"append_eos": "maybe"}, "unknown append_eos 'maybe': never, completion, always"),
        ({"model": None}, "name the model with --model"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_before_anything_is_declared(
    world: World, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        scored(world, "never", **changes)
    assert not Path(world.run.path("stages/scoring/never.json")).exists()


# What is executed where, which changes nothing.


def without_scoring(world: World, folder: Path) -> World:
    """A run of the same corpus, planned and nothing else."""
    make_plan(str(folder / "run"), str(world.corpus), read_plan(world.run).spec)
    return dataclasses.replace(world, run=Run.open(str(folder / "run")))


def feature_bytes(world: World) -> dict[str, str]:
    hashes = tree_hashes(Path(world.run.url))
    return {path: digest for path, digest in hashes.items() if path.startswith(("features/base", "rejects/base"))}


@pytest.mark.parametrize("runner", ["apache_beam.runners.portability.fn_api_runner.FnApiRunner", "FnApiRunner"])
def test_a_runner_that_lehr_does_not_know_is_found_by_its_name(world: World, tmp_path: Path, runner: str) -> None:
    other = without_scoring(world, tmp_path)
    other.score(Execution(runner=runner))
    assert feature_bytes(other) == feature_bytes(world)


def test_beam_options_reach_beam(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    original = engine_base.PipelineOptions

    def watched(flags: list[str]) -> object:
        seen.extend(flags)
        return original(flags)

    monkeypatch.setattr(engine_base, "PipelineOptions", watched)
    other = without_scoring(world, tmp_path)
    other.score(Execution(workers=1, beam_options=("--job_name=mine",)))
    assert "--job_name=mine" in seen
    with pytest.raises(InputError, match="must look like --name=value"):
        Execution(beam_options=("job_name=mine",))
    with pytest.raises(InputError, match="Beam knows no option --job_nam, --x of --beam-options"):
        other.score(Execution(workers=1, beam_options=("--job_nam=mine", "--x")))


@pytest.mark.parametrize("runner", ["NoSuchRunner", "no.such.module.Runner"])
def test_an_unknown_runner_is_named(world: World, tmp_path: Path, runner: str) -> None:
    other = without_scoring(world, tmp_path)
    with pytest.raises(InputError, match=f"Beam does not know the runner '{runner}'"):
        other.score(Execution(runner=runner))


def test_workers_must_be_a_count() -> None:
    with pytest.raises(InputError, match="workers must be 0"):
        Execution(workers=-1)


@pytest.mark.parametrize("text", ["0/2", "3/2", "x", "1", "1/2/3", "1.5/2", "-1/2"])
def test_units_must_be_a_share(text: str) -> None:
    with pytest.raises(InputError, match="--units"):
        parse_share(text)


def test_units_scores_a_fixed_share(world: World, tmp_path: Path) -> None:
    other = without_scoring(world, tmp_path)
    report = other.score(share=parse_share("2/3"))
    assert not report.complete
    names = sorted(path.name for path in (tmp_path / "run/features/base").iterdir())
    assert names == sorted(f"part-{unit.unit_id}.parquet" for unit in read_plan(other.run).units[1::3])


# What a target is.


def described(world: World, name: str, **changes: object) -> dict[str, object]:
    options = dataclasses.replace(TargetOptions(data=str(world.target)), **changes)  # type: ignore[arg-type]
    return describe(world.run, name, "base", options, ScoringOptions(), IN_PROCESS).geometry


def test_energy_moves_the_elbow(world: World) -> None:
    low, high = described(world, "low", energy=0.5), described(world, "high", energy=0.99)
    assert low["k_star"] < high["k_star"]  # type: ignore[operator]
    with pytest.raises(InputError, match="energy"):
        described(world, "none", energy=1.5)


def test_eval_adds_the_evaluation_set_and_its_cosine(world: World) -> None:
    described(world, "alone")
    world.score()
    cosines = {}
    for target in ("target", "alone"):
        report = run_select(
            world.run, f"for-{target}", "base", target, Budget(samples=5), SelectorSettings(selector="target-cosine")
        )
        cosines[target] = report.solution["diagnostics"].get("set_cosine_evaluation")
    assert cosines["alone"] is None and -1 <= cosines["target"] <= 1
    spec = world.run.scoring("base")
    assert len(read_target(world.run, "target", "base", spec).samples["evaluation"]) == 10
    assert not read_target(world.run, "alone", "base", spec).samples["evaluation"]


def test_columns_choose_what_is_read(world: World, tmp_path: Path) -> None:
    rows = [{"body": json.loads(line)["text"]} for line in world.target.read_text().splitlines()]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    geometry = described(world, "body", data=str(tmp_path / "t.jsonl"), columns=CorpusColumns(text="body"))
    assert geometry["target_samples"] == 60
    with pytest.raises(InputError, match=r"no column 'text'; it has: body"):
        described(world, "text", data=str(tmp_path / "t.jsonl"))


def test_contrast_swap_describes_swapped_answers_for_selection(spoken: World) -> None:
    pairs = dataclasses.replace(spoken, run=Run.open(str(spoken.folder / "pairs")))
    options = TargetOptions(data=str(spoken.target), columns=CorpusColumns(prompt="q", completion="a"))
    for name, contrast in (("plain", "none"), ("swapped", "swap")):
        changed = dataclasses.replace(options, contrast=contrast)  # type: ignore[arg-type]
        describe(pairs.run, name, "base", changed, pairs.scoring_options, IN_PROCESS)
    pairs.score()
    spec = pairs.run.scoring("base")
    assert not read_target(pairs.run, "plain", "base", spec).samples["swapped"]
    data = read_target(pairs.run, "swapped", "base", spec)
    for index, (sample, swapped) in enumerate(zip(data.samples["reference"], data.samples["swapped"])):
        following = data.samples["reference"][(index + 1) % 6]
        start = sample.loss_spans[0][0]
        assert swapped.text[:start] == sample.text[:start]
        assert swapped.text[start:] == following.text[following.loss_spans[0][0] :]
    settings = SelectorSettings(contrast="swap", two_fold=False)
    with pytest.raises(InputError, match="swap"):
        run_select(pairs.run, "c", "base", "plain", Budget(samples=2), settings, keep_overlapping=True)
    scores = [
        run_select(
            pairs.run, f"c{number}", "base", "swapped", Budget(samples=2),
            dataclasses.replace(settings, contrast_weight=weight), keep_overlapping=True,
        ).solution["certificate"]["objective"]
        for number, weight in enumerate((0.5, 1.0))
    ]  # fmt: skip
    assert scores[0] != scores[1]


# What is selected.

Check = Callable[[pa.Table, pa.Table], bool]


def selected(world: World, name: str, budget: Budget, **changes: object) -> pa.Table:
    """Rows of a selection, by rank."""
    settings = SelectorSettings(**{"two_fold": False, "bound": False, **changes})  # type: ignore[arg-type]
    run_select(world.run, name, "base", "target", budget, settings)
    parts = [part.path for part in world.run.manifest("select", name).parts if part.path.endswith(".parquet")]
    rows = pa.concat_tables([read_table(world.run.path(path), schema="selection") for path in parts])
    return rows.filter(rows["selected"]).sort_by("rank")


def domains(rows: pa.Table) -> list[str]:
    return rows["domain"].to_pylist()


@pytest.mark.parametrize(
    ("base", "change", "check"),
    [
        ({"selector": "random"}, {"seed": 1}, lambda a, b: set(a["row"].to_pylist()) != set(b["row"].to_pylist())),
        ({"selector": "loss"}, {"lowest": True}, lambda a, b: max(numbers(b, "score")) < min(numbers(a, "score"))),
        ({"selector": "grad-norm"}, {"lowest": True}, lambda a, b: a["sample_id"][0] != b["sample_id"][0]),
        ({}, {"rows": "unit"}, lambda a, b: not a["sample_id"].equals(b["sample_id"])),
        ({}, {"gain": "flat"}, lambda a, b: not a["score"].equals(b["score"])),
        ({}, {"shortlist": 1.0}, lambda a, b: not a["sample_id"].equals(b["sample_id"])),
        ({}, {"quotas": {"math": 0.0}}, lambda a, b: "math" in domains(a) and "math" not in domains(b)),
        ({}, {"floors": {"math": 0.9}}, lambda a, b: domains(b).count("math") >= 7 > domains(a).count("math")),
        (
            {},
            {"fractional": True},
            lambda a, b: (
                set(a["selection_weight"].to_pylist()) == {1.0}
                and any(0 < weight < 1 for weight in b["selection_weight"].to_pylist())
                and abs(sum(b["selection_weight"].to_pylist()) - 8) < 1e-4
            ),
        ),
    ],
)
def test_selector_options_reach_the_selection(
    world: World, base: dict[str, object], change: dict[str, object], check: Check
) -> None:
    name = f"{base.get('selector', 'match')}-{next(iter(change))}"
    before = selected(world, f"{name}-before", Budget(samples=8), **base)
    assert check(before, selected(world, f"{name}-after", Budget(samples=8), **base, **change))


def test_bound_and_two_fold_are_computed_on_request_alone(world: World) -> None:
    found = {}
    for name, on in (("with", True), ("without", False)):
        settings = SelectorSettings(two_fold=on, bound=on)
        report = run_select(world.run, f"judged-{name}", "base", "target", Budget(samples=8), settings)
        found[name] = report.solution["diagnostics"]
    assert {"set_cosine_heldout", "set_cosine_bound"} <= found["with"].keys()
    assert found["without"].get("set_cosine_heldout") is None and found["without"].get("set_cosine_bound") is None


def test_a_larger_budget_selects_more(world: World) -> None:
    few, many = (selected(world, f"n{count}", Budget(samples=count), selector="random") for count in (3, 9))
    assert (few.num_rows, many.num_rows) == (3, 9)
    assert few["sample_id"].to_pylist() == many["sample_id"].to_pylist()[:3]


def test_scoring_options_are_those_tested_here() -> None:
    """A new option needs a test here; `revision` is of hub ids and is tested with the loading of models, what belongs to an
    optimizer's preconditioner in test_precondition.py."""
    tested = {
        "model", "revision", "attribute", "max_tokens", "min_tokens", "append_eos", "chat_template", "proj_rank", "k", "seed", "loss",
        "dtype", "attention", "batch_tokens", "layout", "optimizer_state", "metric", "precondition",
    }  # fmt: skip
    assert {field.name for field in dataclasses.fields(ScoringOptions)} == tested
    assert {field.name for field in dataclasses.fields(TargetOptions)} == {
        "data",
        "eval",
        "columns",
        "contrast",
        "energy",
        *("curvature", "draws", "damping"),  # in test_target_curvature
    }
    assert {field.name for field in dataclasses.fields(Execution)} == {
        "runner",
        "workers",
        "beam_options",
        *("accelerator", "min_ram"),  # in test_dataflow
    }
