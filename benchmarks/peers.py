"""Lehr's scoring beside the peers that install from PyPI: the same samples, sites and rank, in one run.

    python benchmarks/peers.py --parts 35m --out peers-35m.json
    python benchmarks/peers.py --parts 135m --peers bergson --out peers-135m.json
    python benchmarks/peers.py --parts job --out peers-job.json
    python benchmarks/peers.py --quick                                  # everything, few samples: does it run?

Parts:

    35m     projected per-sample gradients of a random Llama of 34.6M parameters, head and embedding apart
    135m    the same of a random Llama of 135M parameters whose head is its embedding; the peers at their best alone
    job     from a JSONL file of text to features on disk: `lehr plan` + `lehr score` against `bergson build`, each with its own
            defaults but the rank, start-up included, on one and the same model folder

Peers, each in an environment of its own that is made in the cache folder on first use (1.2-1.8 GB each); where that fails, its row says why:

    bergson   its collection loop, its loss, its padding; nothing is written to disk (Lehr's engine folds to k = 2048, bergson keeps all)
    dattri    LoGra's hooks and compressors; the loss is the user's, so ours
    traker    TRAK's per-sample gradients by vmap and its BasicProjector, which is what runs without CUDA (extrapolated from a slice)
    dense     DiReCT's sketch, a dense Gaussian matrix drawn again for every sample, written from its formula (extrapolated from a slice)

Every peer runs in a process of its own, and so does Lehr; rounds are interleaved, one process working at a time. Times are CPU seconds of
the process (other work on the machine does not count), after one round that warms up; start-up counts in `job` alone. A ratio is the median
over rounds of Lehr's seconds over the peer's within a round: below 1, Lehr is faster. `default` is the peer as its command or class comes,
with Lehr's batches where it has none of its own; `best` is the attention (sdpa, eager) and the batch bound, per arithmetic, that were fastest
for the peer in a trial before the rounds. Lehr runs with its own defaults throughout, those of the arithmetic.

Before anything is timed, the script looks whether both sides compute the same: names and number of the sites, numbers per sample, and that
the norms of the projected gradients agree as far as two independent projections do. From bergson it also takes the unprojected gradients
of one sample and projects them with Lehr's matrices: they must give Lehr's sketch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, scoring
from benchmarks.common import say
from selection_ops.batching import length_batches
from selection_ops.model import default_attention, default_batch_tokens

ROOT = Path(__file__).resolve().parents[1]
WORKERS = Path(__file__).resolve().parent / "peers"
VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0"}
PACKAGES = {"bergson": "bergson==2.5.1", "dattri": "dattri==0.3.0", "traker": "traker==0.3.2", "dense": ""}
UNWANTED = ("torchvision", "torchaudio")
"""Pulled in by a peer, built for another torch, and then transformers cannot be imported."""

MODELS = scoring.CONFIGS
"""Of the 34.6M, 28.3M are in 56 maps of the blocks, 6.3M in embedding and head."""
WORKER = {"bergson": "bergson", "dattri": "dattri", "traker": "trak", "dense": "dense", "lehr": "lehr"}
SLOW = ("traker", "dense")
MARK = "\x1e"
"""Begins an answer of a worker."""
DTYPES = scoring.DTYPES
BOUNDS = {"35m": (256, 512, 1024, 2048), "135m": (256, 512, 1024)}
"""Bounds of longest x count that are tried for a peer; at 135M, 2,048 tokens' logits of a large vocabulary take 5 GB."""

Batches = list[list[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the benchmark."""

    parts: tuple[Literal["35m", "135m", "job"], ...] = ("35m", "135m", "job")
    """What to measure."""
    peers: str = "bergson,dattri,traker,dense"
    """Peers to measure, separated by commas."""
    quick: bool = False
    """Few samples, one round, few trials: to see whether everything runs, not to be quoted."""
    rounds: int = 4
    """Interleaved rounds that are counted; one more before them warms up."""
    job_rounds: int = 2
    """Whole jobs of each side, in turn; the first of each also fills the file cache."""
    samples: int = 40
    """Samples of 64-256 tokens in `35m`; `135m` takes a third of them, the extrapolated peers four."""
    job_samples: int = 96
    """Documents of 64-256 tokens in `job`."""
    proj_rank: int = 16
    """Rank of the projection on each side of a site."""
    threads: int = 1
    """Threads of one process."""
    job_model: Path = ROOT / ".cache" / "demo" / "smollm2-135m-instruct"
    """Model folder with a tokenizer for `job`; `lehr demo` fetches and converts this one."""
    cache: Path = ROOT / ".cache" / "peers"
    """Where environments and random models are kept."""
    out: Path | None = None
    """JSON file for the result; without it, it is printed."""

    @property
    def names(self) -> list[str]:
        """The peers asked for."""
        names = [name.strip() for name in self.peers.split(",") if name.strip()]
        unknown = [name for name in names if name not in PACKAGES]
        if unknown:
            raise SystemExit(f"unknown peer {unknown[0]!r}; known: {', '.join(PACKAGES)}")
        return names


# -- environments ------------------------------------------------------------------------------------------------------


def environment_of(peer: str, cache: Path) -> Path:
    """The python of a peer's environment, made where it is not there yet. Raises RuntimeError with the reason where it cannot be."""
    if not PACKAGES[peer]:
        return Path(sys.executable)
    folder = cache / peer
    python = folder / "bin" / "python"
    ready = folder / "ready"
    wanted = " ".join([PACKAGES[peer], *(f"{name}=={number}" for name, number in VERSIONS.items())])
    if ready.exists() and ready.read_text() == wanted:
        return python
    say(f"{peer}: making its environment in {os.path.relpath(folder)}")
    cache.mkdir(parents=True, exist_ok=True)
    constraints = cache / "constraints.txt"
    constraints.write_text("".join(f"{name}=={number}\n" for name, number in VERSIONS.items()))
    pip = [str(python), "-m", "pip"]
    install = [*pip, "install", "--quiet", "--disable-pip-version-check", "--constraint", str(constraints)]
    # torch stands before the peer comes, and the constraint holds it there.
    steps = [
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [*install, *VERSIONS],
        [*install, PACKAGES[peer]],
        [*pip, "uninstall", "--quiet", "--yes", *UNWANTED],
        [str(python), "-c", "import torch, transformers; from transformers import LlamaForCausalLM"],
    ]
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
            raise RuntimeError(f"cannot be installed: {errors[-1][:300] if errors else 'pip failed without a word'}")
    ready.write_text(wanted)
    return python


# -- workers -----------------------------------------------------------------------------------------------------------


class Worker:
    """A peer's process with one model in one arithmetic."""

    def __init__(self, peer: str, settings: Settings, **load: Any) -> None:
        self.peer = peer
        logs = settings.cache / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        python = Path(sys.executable) if peer == "lehr" else environment_of(peer, settings.cache)
        threads = {name: str(settings.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self.log = logs / f"{peer}.log"
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [str(python), str(WORKERS / f"worker_{WORKER[peer]}.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | threads | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
        self.about = self.ask("load", rank=settings.proj_rank, threads=settings.threads, **load)

    def ask(self, what: str, **fields: Any) -> dict[str, Any]:
        """Answer to a request. Raises RuntimeError with the peer's own error."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps({"do": what, **fields}) + "\n")
            self.process.stdin.flush()
            # What libraries print while they are imported stands on lines of its own.
            line = next((line for line in self.process.stdout if line.startswith(MARK)), "")
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"{self.peer} ended without an answer; see {os.path.relpath(self.log)}")
        answer = json.loads(line.removeprefix(MARK))
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def round(self, batches: Batches) -> dict[str, Any]:
        """What all batches took."""
        return self.ask("round", batches=batches)

    def close(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
                assert self.process.stdin
                self.process.stdin.close()
                self.process.wait(20)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def closing() -> Iterator[list[Worker]]:
    """A list whose workers end with the block."""
    workers: list[Worker] = []
    try:
        yield workers
    finally:
        for worker in workers:
            worker.close()


# -- projected gradients -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """One row of the table: a peer in one arithmetic, attention and batching."""

    name: str
    peer: str
    dtype: str
    attention: str
    batch_tokens: int
    tuned: bool = True


def make_model(name: str, cache: Path) -> Path:
    """Folder of a random model."""
    folder = cache / "models" / name
    config = json.dumps(MODELS[name], sort_keys=True)
    if (folder / "made").exists() and (folder / "made").read_text() == config:
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**MODELS[name], max_position_embeddings=8192))
    model.save_pretrained(str(folder))
    (folder / "made").write_text(config)
    return folder


def make_samples(count: int, vocabulary: int) -> list[list[int]]:
    """Random samples of 64-256 tokens."""
    rng = random.Random(0)
    return [[rng.randrange(3, vocabulary) for _ in range(rng.randint(64, 256))] for _ in range(count)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A model and its samples."""

    settings: Settings
    model: Path
    samples: list[list[int]]
    file: Path
    bounds: tuple[int, ...]
    """Batch bounds that are tried for a peer."""

    def batches(self, batch_tokens: int, count: int | None = None) -> Batches:
        """Length-sorted batches of the first samples; bergson's allocation forms the same ones."""
        return length_batches([len(sample) for sample in self.samples[:count]], batch_tokens)

    def worker(self, peer: str, dtype: str, attention: str, *, tuned: bool = True) -> Worker:
        """A process that holds the model."""
        return Worker(
            peer, self.settings, model=str(self.model), samples=str(self.file), dtype=DTYPES[dtype],
            attention=attention, tuned=tuned,
        )  # fmt: skip


def trials(work: Workload, peer: str, dtype: str) -> tuple[Way, dict[str, float]]:
    """The fastest attention and batch bound of a peer in one arithmetic, and every trial's seconds."""
    quick = work.settings.quick
    count = 8 if quick else 16
    taken: dict[tuple[str, int], list[float]] = {}
    with closing() as workers:
        by_attention = {}
        for attention in ("sdpa", "eager"):
            by_attention[attention] = work.worker(peer, dtype, attention)
            workers.append(by_attention[attention])
            by_attention[attention].round(work.batches(1024, count))
        for _ in range(1 if quick or len(work.samples) < 16 else 2):
            for bound in work.bounds:
                for attention, worker in by_attention.items():
                    seconds = worker.round(work.batches(bound, count))["cpu_s"]
                    taken.setdefault((attention, bound), []).append(seconds)
    fastest = min(taken, key=lambda key: min(taken[key]))
    seen = {f"{attention}_{bound}": round(min(values), 3) for (attention, bound), values in taken.items()}
    say(f"{peer} {dtype}: fastest with {fastest[0]}, {fastest[1]} tokens; {seen}")
    return Way(name=f"{peer}_best_{dtype}", peer=peer, dtype=dtype, attention=fastest[0], batch_tokens=fastest[1]), seen


def same_work(work: Workload, peer: str, folder: Path) -> dict[str, Any]:
    """Whether a peer computes what Lehr computes; also printed."""
    shortest = sorted(range(len(work.samples)), key=lambda index: len(work.samples[index]))[:4]
    dense = str(folder / "dense.safetensors") if peer == "bergson" else None
    with closing() as workers:
        workers.append(work.worker(peer, "f32", "sdpa"))
        about = workers[0].about
        theirs = workers[0].ask("check", batches=[shortest], dense=dense)
        workers.append(work.worker("lehr", "f32", "sdpa"))
        ours = workers[1].ask("check", batches=[shortest], dense=dense)
        own = workers[1].about
    ratios = [theirs["norms"][key] / ours["norms"][key] for key in ours["norms"]]
    found = {
        "sites": len(about["sites"]),
        "same_sites": {name.removeprefix("model.") for name in about["sites"]}
        == {name.removeprefix("model.") for name in own["sites"]},
        "numbers_per_sample": about["numbers"],
        "version": about["version"],
        "norm_to_lehr": [round(value, 4) for value in ratios],
    }
    if dense:
        found["unprojected_gradients_projected_by_lehr"] = ours["dense_error"]
    # The norm after projections of rank 16 on both sides has a relative standard deviation of 1/2 (2 * 2/16)^(1/2) = 0.25 at a
    # site whose gradient is of rank one, and less over 56 sites: about 0.05 on each side, 0.07 for the quotient. A missing
    # loss term, a wrong scale or a site left out moves all of them, by more.
    found["agrees"] = (
        found["same_sites"]
        and all(abs(value - 1) < 0.3 for value in ratios)
        and abs(statistics.mean(ratios) - 1) < 0.15
    )
    if dense:
        found["agrees"] = found["agrees"] and ours["dense_error"] < 1e-4
    say(f"{peer}: the same work as Lehr's? {found}")
    return found


def gradients(part: str, settings: Settings, failed: dict[str, str]) -> dict[str, Any]:
    """One model's rounds: every way of every peer in turn."""
    count = settings.samples if part == "35m" else max(settings.samples // 3, 4)
    count = min(count, 8) if settings.quick else count
    model = make_model(part, settings.cache)
    with tempfile.TemporaryDirectory() as temporary, closing() as workers:
        folder = Path(temporary)
        file = folder / "samples.json"
        work = Workload(
            settings=settings,
            model=model,
            samples=make_samples(count, MODELS[part]["vocab_size"]),
            file=file,
            bounds=(1024,) if settings.quick else BOUNDS[part],
        )
        file.write_text(json.dumps(work.samples))
        tokens = sum(len(sample) for sample in work.samples)
        say(f"{part}: {count} samples, {tokens} tokens")
        ways = [
            Way(name=f"lehr_{short}", peer="lehr", dtype=short, attention=default_attention("cpu", long), batch_tokens=default_batch_tokens("cpu", long))
            for short, long in DTYPES.items()
        ]  # fmt: skip
        checks: dict[str, Any] = {}
        tried: dict[str, Any] = {}
        for peer in settings.names:
            if peer in failed:
                continue
            try:
                checks[peer] = same_work(work, peer, folder)
                bound = 2048 if peer == "bergson" else default_batch_tokens("cpu", "float32")
                default = Way(
                    name=f"{peer}_default", peer=peer, dtype="f32", attention="sdpa", batch_tokens=bound, tuned=False
                )
                if (
                    part == "35m"
                ):  # a whole batch of 2,048 tokens' logits of a large vocabulary takes 5 GB: left to `job`
                    ways.append(default)
                if peer == "traker":
                    ways.append(
                        Way(name="traker_best_f32", peer=peer, dtype="f32", attention="eager", batch_tokens=4096)
                    )
                elif peer != "dense":
                    for dtype in DTYPES:
                        best, tried[f"{peer}_{dtype}"] = trials(work, peer, dtype)
                        ways.append(best)
            except RuntimeError as error:
                failed[peer] = str(error)
                say(f"{peer}: left out: {error}")
        ways = [way for way in ways if way.peer not in failed]
        rounds = interleaved(work, ways, workers)
    names = [way.name for way in ways]
    extrapolated = [way.name for way in ways if "extrapolated" in rounds[0][way.name]]
    ratios: dict[str, float] = {}
    for way in ways[2:]:
        ours = "lehr_bf16" if way.dtype == "bf16" else "lehr_f32"
        ratios[f"to_{way.name}_{part}"] = common.ratio(rounds, ours, way.name, "per_token_s")
    return {
        "ratios": ratios,
        "part": {
            "samples": count,
            "tokens": tokens,
            "ways": {way.name: dataclasses.asdict(way) for way in ways},
            "batches": {way.name: len(work.batches(way.batch_tokens)) for way in ways},
            "seconds_per_token": {name: statistics.median(round_[name]["per_token_s"] for round_ in rounds) for name in names},
            "peak_mb": {name: max(round_[name]["peak_mb"] for round_ in rounds) for name in names},
            "extrapolated": extrapolated,
            "trials": tried,
            "same_work": checks,
            "rounds": rounds,
        },
    }  # fmt: skip


def interleaved(work: Workload, ways: list[Way], workers: list[Worker]) -> common.Rounds:
    """Every round runs every way once, in turn; extrapolated ones on four samples, and not after the second counted round."""

    def asking(way: Way) -> Callable[[], common.Record]:
        worker = work.worker(way.peer, way.dtype, way.attention, tuned=way.tuned)
        workers.append(worker)
        count = 4 if way.peer in SLOW else len(work.samples)
        tokens = sum(len(sample) for sample in work.samples[:count])
        answers: list[common.Record] = []

        def run() -> common.Record:
            if way.peer not in SLOW or len(answers) < 3:  # so long beside the others that its noise does not count
                answers.append(worker.round(work.batches(way.batch_tokens, count)) | {"tokens": tokens})
                answers[-1]["per_token_s"] = answers[-1]["cpu_s"] / tokens
            return answers[-1]

        return run

    return common.interleaved(
        {way.name: asking(way) for way in ways}, 1 if work.settings.quick else work.settings.rounds
    )


# -- the whole job -----------------------------------------------------------------------------------------------------


def write_corpus(path: Path, model: Path, count: int) -> int:
    """A JSONL file of documents of 64-256 tokens, cut from the manual; their tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model), trust_remote_code=False)
    ids = common.manual_ids(tokenizer)
    rng = random.Random(0)
    tokens = 0
    with open(path, "w") as handle:
        for _ in range(count):
            length = rng.randint(64, 256)
            start = rng.randrange(len(ids) - length)
            document = tokenizer.decode(ids[start : start + length])
            tokens += len(tokenizer(document, add_special_tokens=False)["input_ids"])
            handle.write(json.dumps({"text": document}) + "\n")
    return tokens


def job(commands: list[list[str]], env: dict[str, str], log: Path) -> dict[str, float]:
    """CPU seconds (of all processes) and wall seconds of commands one after the other."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    for command in commands:
        with open(log, "a") as handle:
            done = subprocess.run(command, stdout=handle, stderr=handle, env=os.environ | env)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[:2])} failed: {log.read_text().strip().splitlines()[-1][:300]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_s": cpu, "wall_s": time.perf_counter() - started}


def whole_job(settings: Settings, failed: dict[str, str]) -> dict[str, Any]:
    """Text on disk to features on disk, both sides with their defaults but the rank, from nothing every time."""
    if "bergson" not in settings.names or "bergson" in failed:
        return {"ratios": {}, "part": {}}
    if not (settings.job_model / "config.json").is_file():
        raise SystemExit(f"no model in {settings.job_model}: run `lehr demo` once, or name a folder with --job-model")
    bergson = environment_of("bergson", settings.cache).parent / "bergson"
    lehr = Path(sys.executable).parent / "lehr"
    count = 16 if settings.quick else settings.job_samples
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        corpus = folder / "corpus.jsonl"
        tokens = write_corpus(corpus, settings.job_model, count)
        say(f"job: {count} documents, {tokens} tokens, {settings.job_model.name}")
        model = ["--model", str(settings.job_model)]
        rank = str(settings.proj_rank)
        for number in range(1 if settings.quick else settings.job_rounds):
            env = {name: str(settings.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
            env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / f"datasets-{number}")}
            run, index = folder / f"run-{number}", folder / f"index-{number}"
            ours = [
                [str(lehr), "plan", str(run), str(corpus)],
                [str(lehr), "score", str(run), *model, "--proj-rank", rank, "--workers", "1"],
            ]
            theirs = [[str(bergson), "build", str(index), *model, "--dataset", str(corpus), "--projection_dim", rank]]
            taken = {"lehr": job(ours, env, folder / "lehr.log"), "bergson": job(theirs, env, folder / "bergson.log")}
            say(f"round {number}: " + ", ".join(f"{name} {used['cpu_s']:.1f} CPU s, {used['wall_s']:.1f} s" for name, used in taken.items()))  # fmt: skip
            rounds.append(taken)
        features = written(run, index)
        say(f"on disk: {features}")
        shutil.rmtree(index)
    return {
        "ratios": {
            "whole_job_to_bergson_default": common.ratio(rounds, "lehr", "bergson"),
            "whole_job_wall_to_bergson_default": common.ratio(rounds, "lehr", "bergson", "wall_s"),
        },
        "part": {"documents": count, "tokens": tokens, "model": settings.job_model.name, "written": features, "rounds": rounds},
    }  # fmt: skip


def written(run: Path, index: Path) -> dict[str, Any]:
    """What both jobs left."""
    import pyarrow.parquet as pq

    rows = sum(pq.read_metadata(file).num_rows for file in run.glob("**/features/**/*.parquet"))
    info = json.loads((index / "info.json").read_text())

    def size(folder: Path) -> int:
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

    return {
        "lehr": {"rows": rows, "bytes": size(run)},
        "bergson": {
            "rows": info["num_grads"],
            "bytes": size(index),
            "sites": len(info["grad_sizes"]),
            "numbers_per_sample": sum(info["grad_sizes"].values()),
        },
    }


# -- the result --------------------------------------------------------------------------------------------------------

REQUIRED = {
    "to_bergson_best_f32_35m": 0.99,
    "to_bergson_best_f32_135m": 0.92,
    "to_bergson_best_bf16_35m": 0.90,
    "whole_job_to_bergson_default": 0.60,
}


def verdicts(ratios: dict[str, float], parts: dict[str, Any]) -> list[str]:
    """Who is faster, in words."""
    lines = []
    for name, value in ratios.items():
        bound = REQUIRED.get(name)
        aim = "" if bound is None else f"; aim {bound}: {'reached' if value <= bound else 'missed'}"
        who = "Lehr is faster" if value < 1 else "the peer is faster"
        lines.append(f"{name} {value}: {who}{aim}{why(name, value, parts)}")
    return lines


def why(name: str, value: float, parts: dict[str, Any]) -> str:
    """Where a faster peer may have its time from: how the two ways differ."""
    part = name.rpartition("_")[2]
    if value < 1 or part not in parts or "ways" not in parts[part]:
        return ""
    ways = parts[part]["ways"]
    way = ways[name.removeprefix("to_").removesuffix(f"_{part}")]
    own = ways["lehr_bf16" if way["dtype"] == "bf16" else "lehr_f32"]
    differ = [f"{key} {way[key]} against {own[key]}" for key in ("attention", "batch_tokens") if way[key] != own[key]]
    differ.append("no attention mask is passed (right-padded causal batches need none)")
    return f"; it differs by: {', '.join(differ)}"


def measure(settings: Settings) -> dict[str, Any]:
    """All parts."""
    failed: dict[str, str] = {}
    for peer in settings.names:
        try:
            environment_of(peer, settings.cache)
        except RuntimeError as error:
            failed[peer] = str(error)
            say(f"{peer}: {error}")
    ratios: dict[str, float] = {}
    parts: dict[str, Any] = {}
    for part in settings.parts:
        found = whole_job(settings, failed) if part == "job" else gradients(part, settings, failed)
        ratios |= found["ratios"]
        parts[part] = found["part"]
    machine = common.environment(settings)
    machine["peers"] = {"pinned": VERSIONS, "packages": {peer: PACKAGES[peer] or "own code" for peer in settings.names}}
    lines = verdicts(ratios, parts)
    print("\n".join(lines), flush=True)
    return {
        "ratios": ratios,
        "verdicts": lines,
        "not_measured": failed,
        "rounds": {name: part.pop("rounds", []) for name, part in parts.items()},
        "parts": parts,
        "environment": machine,
    }


def run(settings: Settings) -> dict[str, Any]:
    """All parts, so that the peers' processes end with this one."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return measure(settings)


if __name__ == "__main__":
    common.main(Settings, run, __doc__)
