"""The demo: the main job on a real model and a real pool, by the same commands a user types, and a table of how it went."""

from __future__ import annotations

import dataclasses
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import orjson
from rich.table import Table

from lehr.console import console, duration
from lehr.demo.model import prepare_model
from lehr.demo.pool import IN_DOMAIN, DemoCorpus, build_demo
from schemas.errors import LehrError
from schemas.fingerprint import pretty_json
from schemas.run import Run
from schemas.storage import write_whole

TARGET = "gsm8k"
STEP_SAMPLES = 8
EPOCHS = 2
"""Passes an arm may make: a set of short samples begins again until it has spent the token budget of all arms."""
OFFERED = 2
"""Filter-then-weight is offered this many times what it trains on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoSize:
    """How much of everything one size of the demo takes."""

    size: Literal["small", "full"]
    steps: int
    seeds: int
    learning_rate: float = 1e-4

    @property
    def budget_samples(self) -> int:
        """Samples an arm trains on, at the pool's mean length."""
        return self.steps * STEP_SAMPLES


SIZES = {
    "small": DemoSize(size="small", steps=12, seeds=1),
    "full": DemoSize(size="full", steps=24, seeds=3),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One row of the table: how a set is chosen and how it is trained on."""

    name: str
    selector: str = ""
    policy: str = "full"
    offered: int = 1
    """Budgets' worth of samples selected and offered."""
    select_options: tuple[str, ...] = ()
    train_options: tuple[str, ...] = ()


ARMS = (
    Arm(name="no training"),
    Arm(name="random", selector="random"),
    Arm(name="direct (published)", selector="direct", select_options=("--if-infeasible", "raise")),
    Arm(name="target-cosine", selector="target-cosine"),
    Arm(name="match", selector="match"),
    Arm(
        name="match + filter-then-weight",
        selector="match",
        policy="filter-then-weight",
        offered=OFFERED,
    ),
)


def run_demo(folder: Path, *, size: str = "small", cache: Path = Path(".cache/demo")) -> dict[str, Any]:
    """Run everything below `folder`, print the table, write `results.json`; returns what it holds."""
    settings = SIZES[size]
    started = time.monotonic()
    console.rule("Lehr demo")
    console.print(
        f"A real 135M model, a real pool, target GSM8K. Expected: about {duration(_estimate(settings))} on this machine, "
        "after the downloads."
    )
    _step("obtain the model and the corpora (checked by sha256)")
    model = prepare_model(cache)
    corpus = build_demo(folder.with_name(f"{folder.name}-corpus"), cache, size=settings.size)
    console.print(f"  pool {corpus.pool_rows:,} rows, target {corpus.target_rows}, held out {corpus.eval_rows}")
    url = str(folder)
    shared = _prepare(url, corpus, model, settings)
    budget = _token_budget(Run.open(url), settings)
    results = [
        _run_arm(url, model, arm, seed, budget, settings, shared)
        for seed in range(settings.seeds)
        for arm in ARMS
        if arm.selector or seed == 0
    ]
    _lehr("report", url)
    record = {
        "arms": _untrained_first(url, results),
        "environment": _environment(),
        "budget_tokens": budget,
        "shared_cpu_seconds": shared,
    }
    write_whole(f"{url}/results.json", pretty_json(record))
    _print_table(record, settings)
    console.print(
        f"Took {duration(time.monotonic() - started)}. Report: {url}/reports/report.html. Table: {url}/results.json"
    )
    return record


def _estimate(settings: DemoSize) -> float:
    """Seconds expected, from the arithmetic to be done and how fast this machine multiplies bfloat16 or float32."""
    import torch

    from selection_ops.model import default_dtype

    dtype = getattr(torch, default_dtype("cuda" if torch.cuda.is_available() else "cpu"))
    a, b = torch.randn(512, 576).to(dtype), torch.randn(576, 1536).to(dtype)
    for _ in range(10):
        a @ b
    start = time.perf_counter()
    for _ in range(20):
        a @ b
    rate = 20 * 2 * 512 * 576 * 1536 / (time.perf_counter() - start)
    rows = {"small": 1_460, "full": 90_000}[settings.size]
    tokens = 160
    scored = rows * tokens * 4 * 135e6
    trained = settings.seeds * 5 * settings.budget_samples * tokens * 8 * 135e6
    # Real passes reach a fraction of the speed of one large product: attention, norms and small batches take the rest.
    efficiency = 0.5
    return (scored + trained) / (rate * efficiency) + 20 * settings.seeds * len(ARMS)


def _step(text: str) -> None:
    console.print(text, style="bold")


def _lehr(verb: str, url: str, *arguments: str) -> float:
    """Run the command as a user would; returns the processor seconds it took, workers included.

    A command that an earlier, interrupted demo had finished takes little now: the larger figure is kept in the run.
    """
    command = shlex.join([verb, url, *arguments])
    console.print(f"  $ lehr {command}", style="dim", markup=False, highlight=False)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    process = subprocess.run([sys.executable, "-m", "lehr", verb, url, *arguments], env={**os.environ, **quiet})
    if process.returncode:
        raise LehrError(
            f"`lehr {verb}` ended with status {process.returncode}; the demo stops here. Run it again to resume"
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    path = Path(url) / "timings/demo/cpu-seconds.json"
    known = orjson.loads(path.read_bytes()) if path.exists() else {}
    known[command] = max(seconds, known.get(command, 0.0))
    write_whole(str(path), pretty_json(known))
    return known[command]


def _prepare(url: str, corpus: DemoCorpus, model: Path, settings: DemoSize) -> dict[str, float]:
    """Plan, target, score, and the optimizer state that every arm starts from; processor seconds of each."""
    seconds = {}
    _step("plan the corpus")
    columns = ["--domain-column", "domain", "--id-column", "id", "--keep-columns", "clean", "corrupt"]
    unit = ["--unit-tokens", "8192"] if settings.size == "small" else []
    seconds["plan"] = _lehr("plan", url, str(corpus.pool), "--name", "demo-pool", *columns, *unit)
    _step("describe the target")
    features = ["--model", str(model), "--max-tokens", "256"]
    data = ["--data", str(corpus.target), "--eval", str(corpus.evaluation), "--name", TARGET]
    seconds["target"] = _lehr("target", url, *data, *features)
    _step("score the corpus")
    seconds["score"] = _lehr("score", url)
    _step("warm the optimizer's second moment on four random batches, at learning rate 0")
    warm = [
        "--selector",
        "random",
        "--samples",
        str(4 * STEP_SAMPLES),
        "--seed",
        "1",
        "--name",
        "warmup",
        "--target",
        TARGET,
    ]
    seconds["warmup"] = _lehr("select", url, *warm) + _lehr("export", url, "--selection", "warmup")
    seconds["warmup"] += _lehr(
        "train", url, "--stream", "warmup", "--name", "warmup", "--model", str(model), "--policy", "full",
        "--candidates", str(STEP_SAMPLES), "--steps", "4", "--lr", "0", "--evaluate", "never",
    )  # fmt: skip
    return seconds


def _token_budget(run: Run, settings: DemoSize) -> int:
    summary = run.manifest("score", "base").summary
    return settings.budget_samples * summary["tokens"] // summary["samples"]


def _run_arm(
    url: str, model: Path, arm: Arm, seed: int, budget: int, settings: DemoSize, shared: dict[str, float]
) -> dict[str, Any]:
    if not arm.selector:
        return {"name": arm.name, "seed": seed}
    _step(f"arm: {arm.name}" + (f", seed {seed}" if settings.seeds > 1 else ""))
    selection = arm.selector if arm.offered == 1 else f"{arm.selector}-{arm.offered}x"
    if arm.selector == "random" and seed:
        selection = f"random-{seed}"
    training = f"{selection}-{arm.policy}-seed{seed}"
    seconds = 0.0
    seconds += _lehr(
        "select", url, "--selector", arm.selector, "--target", TARGET, "--samples", str(arm.offered * settings.budget_samples),
        "--name", selection, "--seed", str(seed if arm.selector == "random" else 0), *arm.select_options,
    )  # fmt: skip
    seconds += _lehr("export", url, "--selection", selection)
    state = Run.open(url).path(f"{Run.open(url).training_folder('warmup')}/checkpoints/step-00000004")
    keep = ["--n-keep", str(STEP_SAMPLES)] if arm.offered > 1 else []
    # Every arm starts from the same weights: the first of all says what they were worth.
    evaluate = "both" if (arm, seed) == (ARMS[1], 0) else "end"
    seconds += _lehr(
        "train", url, "--stream", selection, "--name", training, "--model", str(model), "--policy", arm.policy,
        "--candidates", str(arm.offered * STEP_SAMPLES), *keep, "--token-budget", str(budget), "--epochs", str(EPOCHS),
        "--lr", str(settings.learning_rate), "--optimizer-state", state, "--seed", str(seed), "--evaluate", evaluate,
        "--no-final-optimizer", *arm.train_options,
    )  # fmt: skip
    # Every arm but random needs the target described and the corpus scored; random needs neither.
    needed = 0.0 if arm.selector == "random" else shared["target"] + shared["score"]
    return {
        "name": arm.name,
        "seed": seed,
        "selection": selection,
        "training": training,
        "cpu_seconds": round(seconds + needed + shared["plan"], 1),
    }


def _untrained_first(url: str, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Complete every arm with what stands in the run directory."""
    run = Run.open(url)
    trained = [_read_back(run, result) for result in results if "training" in result]
    first = trained[0]
    untrained = {
        "name": ARMS[0].name,
        "seed": 0,
        "target_loss": first["untrained_loss"],
        "trained_tokens": 0,
        "offered_tokens": 0,
        "cpu_seconds": 0.0,
        "heldout_set_cosine": None,
        "clean_in_domain_share": None,
    }
    for arm in trained:
        del arm["untrained_loss"]
    return [untrained, *trained]


def _read_back(run: Run, result: dict[str, Any]) -> dict[str, Any]:
    from lehr.audit import ask

    summary = run.manifest("train", result["training"]).summary
    share = ask(
        run,
        f"""
        SELECT avg(CAST(coalesce(s.extra->>'clean' = 'true' AND s.domain = '{IN_DOMAIN}', false) AS DOUBLE)) AS share
        FROM decisions d JOIN selections s ON s.sample_id = d.sample_id AND s.selection = '{result["selection"]}'
        WHERE d.training = '{result["training"]}' AND d.kept
        """,
    )
    solution = orjson.loads(Path(run.path(f"{run.selection_folder(result['selection'])}/solution.json")).read_bytes())
    return {
        **result,
        "target_loss": summary["eval_loss"],
        "untrained_loss": summary["initial_eval_loss"],
        "trained_tokens": summary["trained_tokens"],
        "offered_tokens": summary["offered_tokens"],
        "heldout_set_cosine": solution["diagnostics"]["set_cosine_evaluation"],
        "clean_in_domain_share": share.table.to_pylist()[0]["share"],
    }


def _environment() -> dict[str, Any]:
    from importlib.metadata import version

    names = ("torch", "transformers", "apache-beam", "pyarrow", "lehr")
    return {
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in names},
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _print_table(record: dict[str, Any], settings: DemoSize) -> None:
    table = Table(title=f"Held-out GSM8K loss after {record['budget_tokens']:,} trained tokens", title_justify="left")
    table.add_column("arm")
    for name in ("loss", "trained", "offered", "CPU s", "cosine", "clean"):
        table.add_column(name, justify="right", no_wrap=True)
    for arm in record["arms"]:
        name = arm["name"] + (f" (seed {arm['seed']})" if settings.seeds > 1 and arm["trained_tokens"] else "")
        cosine, share = arm["heldout_set_cosine"], arm["clean_in_domain_share"]
        table.add_row(
            name,
            f"{arm['target_loss']:.4f}",
            f"{arm['trained_tokens']:,}",
            f"{arm['offered_tokens']:,}",
            f"{arm['cpu_seconds']:,.0f}",
            "" if cosine is None else f"{cosine:.3f}",
            "" if share is None else f"{share:.0%}",
        )
    console.print(table)
    console.print(
        "loss: held-out GSM8K, nats per token; trained, offered: tokens; cosine: of the selected set's gradient and that of the "
        "held-out rows; clean: share of undamaged in-domain samples among those trained on."
    )
    console.print(
        "One model, one target, one pool"
        + (
            ", one seed: differences below about 0.015 are noise. "
            if settings.seeds == 1
            else ": see the spread over seeds. "
        )
        + "CPU s of an arm includes plan, target and score where the arm needs them."
    )


def read_results(folder: Path) -> dict[str, Any]:
    """`results.json` of a finished demo."""
    return orjson.loads((folder / "results.json").read_bytes())
