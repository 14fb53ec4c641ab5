"""A complete, consistent, synthetic run directory, written through `schemas`: no model, no Beam, a second or less."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from lehr.compare.judge import arm_rows
from schemas.fingerprint import fingerprint, plain, pretty_json
from schemas.ids import content_id, sample_id, unit_id
from schemas.manifest import Manifest, write_manifest
from schemas.parquet import Footer, Part, rows_to_table, write_table
from schemas.run import Run
from schemas.sample import Sample
from schemas.shards import RankedSample, ShardEntry, StreamIndex, encode_record, encode_shard, index_bytes
from schemas.spec import EncodingSpec, FeatureSpec, InputGroup, PlanSpec, PreconditionerSpec
from schemas.storage import sha256, write_whole
from schemas.tables import GEOMETRY_COLUMNS, OVERLAP_COLUMNS
from schemas.timings import Heartbeat
from schemas.units import PLAN_NAME, WorkUnit, write_plan_table

HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">",
    "\u202eright to left override\u202c \u2066isolate",
    "control \x00\x07\x1b[31m characters \x85 \ufeff",
    "</style></svg>{{ 7 * 7 }}{% raw %}",
    "עברית ثم العربية 中文 ok",
)
DOMAINS = ("math", "code", "web", "news", "noise")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FakeOptions:
    """Size and content of the run."""

    files: int = 2
    units_per_file: int = 2
    rows_per_unit: int = 30
    k: int = 16
    targets: int = 40
    budget: int = 24
    scorings: tuple[str, ...] = ("main",)
    selectors: tuple[str, ...] = ("match", "target-cosine", "random")
    trainings: tuple[str, ...] = ("full", "random", "filter-then-weight")
    steps: int = 8
    shard_samples: int = 10
    hostile: bool = False
    """Whether previews, domains and reject details try to do harm."""
    stages: tuple[str, ...] = ("plan", "score", "target", "curvature", "select", "export", "train", "compare")
    """Stages to write, in the order of the flow."""


class _Builder:
    def __init__(self, url: str, options: FakeOptions) -> None:
        self.options = options
        self.rng = np.random.default_rng(7)
        self.plan_spec = PlanSpec(corpus="fake")
        self.run = Run.create(url, corpus="fake", root="/corpora/fake")
        self.units: list[WorkUnit] = []
        self.features: dict[str, dict[str, list[dict[str, Any]]]] = {}
        self.curvature_rows: dict[str, list[dict[str, Any]]] = {}
        self.texts: dict[str, str] = {}
        self.manifests: dict[str, Manifest] = {}
        self.trained: dict[str, dict[str, Any]] = {}

    def manifest(self, manifest: Manifest) -> Manifest:
        write_manifest(self.run.path(self.run.manifest_path(manifest.stage, manifest.name)), manifest)
        self.manifests[f"{manifest.stage}/{manifest.name}"] = manifest
        return manifest

    # plan

    def plan(self) -> None:
        rows = self.options.rows_per_unit
        for file in range(self.options.files):
            for number in range(self.options.units_per_file):
                path, source = f"file-{file}.jsonl", fingerprint([file, number])
                start = number * rows
                self.units.append(
                    WorkUnit(
                        unit_id=unit_id(path, start * 100, (start + rows) * 100, start, rows, source, "columns"),
                        path=path,
                        format="jsonl",
                        byte_start=start * 100,
                        byte_end=(start + rows) * 100,
                        row_start=start,
                        row_count=rows,
                        source_fingerprint=source,
                        estimated_tokens=rows * 60,
                    )
                )
        part = write_plan_table(self.run, self.plan_spec, self.units)
        self.manifest(
            Manifest(
                stage="plan",
                name=PLAN_NAME,
                spec=plain(self.plan_spec),
                inputs={},
                parts=(part,),
                summary={"units": len(self.units), "rows": rows * len(self.units)},
            )
        )

    # scoring

    def spec(self, scoring: str) -> FeatureSpec:
        return FeatureSpec(
            model=fingerprint(f"model of {scoring}"),
            tokenizer=fingerprint("tokenizer"),
            encoding=EncodingSpec(max_tokens=128),
            input_groups=(InputGroup(name="layer.0", sites=("layer.0", "layer.1")),),
            k=self.options.k,
            precondition_candidate="P^1/2",
            precondition_target="P^1/2",
            preconditioner=PreconditionerSpec(optimizer="adamw", state=fingerprint("moments")),
        )

    def factors(self, scoring: str) -> Part:
        rows: list[dict[str, Any]] = [
            {"name": "layer.0", "side": "out", "correlation": 0.9, "factor": [1.0, 2.0]},
            {"name": "layer.1", "side": "out", "correlation": 0.7, "factor": [0.5, 1.5, 1.0]},
            {"name": "layer.0", "side": "in", "correlation": None, "factor": [1.0, 1.25]},
        ]
        footer = Footer(schema="preconditioner", spec=self.spec(scoring).preconditioner_fingerprint)
        table = rows_to_table("preconditioner", rows)
        return write_table(self.run.url, self.run.preconditioner_path(scoring), table, footer)

    def declare(self, scoring: str) -> None:
        self.manifest(
            Manifest(
                stage="scoring",
                name=scoring,
                spec=plain(self.spec(scoring)),
                inputs={},
                parts=(self.factors(scoring),),
                summary={
                    "parameters": 1_000_000,
                    "attributed_parameters": 780_000,
                    "attributed_share": 0.78,
                    "not_attributed": {"embed": "embedding", "head": "tied to embed"},
                },
            )
        )

    def text(self, domain: str, path: str, row: int) -> str:
        if row % 29 == 28:
            return "The same sentence stands in many files."
        if self.options.hostile and row % 6 < len(HOSTILE):
            return f"{HOSTILE[row % 6]} {path} {row}"
        return f"{domain} sample {path} row {row}: " + " ".join(f"word{(row * 7 + i) % 50}" for i in range(12))

    def sample_rows(self, unit: WorkUnit, scoring: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        rows, rejects = [], []
        for row in range(unit.row_start, unit.row_start + unit.row_count):
            domain = DOMAINS[row % len(DOMAINS)]
            if self.options.hostile and domain == "noise":
                domain = "<i>noise</i>"
            text = self.text(domain, unit.path, row)
            if row % 17 == 5:
                detail = HOSTILE[0] if self.options.hostile else "0 tokens"
                rejects.append(self.reject(unit, row, 0, "encode", "too_short", detail, text))
                continue
            if row % 23 == 7:
                rejects.append(self.reject(unit, row, 0, "read", "no_text", "the text column is null", ""))
                continue
            windows = 3 if row % 13 == 4 else 1
            for window in range(windows):
                if windows > 1 and window == windows - 1:
                    rejects.append(
                        self.reject(unit, row, window, "encode", "too_short", "a tail of 3 tokens", text[:9])
                    )
                    continue
                rows.append(self.sample(unit, row, window, domain, text if windows == 1 else f"{window}: {text}"))
        return rows, rejects

    def reject(self, unit: WorkUnit, row: int, window: int, stage: str, reason: str, detail: str, preview: str) -> dict:
        return {
            "path": unit.path,
            "row": row,
            "window": window,
            "stage": stage,
            "reason": reason,
            "detail": detail,
            "preview": preview,
        }

    def sample(self, unit: WorkUnit, row: int, window: int, domain: str, text: str) -> dict[str, Any]:
        identity = sample_id("fake", unit.path, row, window)
        self.texts[identity] = text
        loss_tokens = 20 + row % 40
        closeness = {"math": 0.5, "code": 0.35, "web": 0.2}.get(domain, 0.0)
        vector = self.rng.normal(size=self.options.k) / np.sqrt(self.options.k)
        vector[0] += closeness
        vector /= np.linalg.norm(vector)
        norm = float(self.rng.lognormal())
        return {
            "sample_id": identity,
            "content_id": content_id(text, [(0, len(text))]),
            "source_id": f"id-{row}",
            "path": unit.path,
            "row": row,
            "window": window,
            "char_start": window * len(text),
            "char_end": (window + 1) * len(text),
            "domain": domain,
            "extra": "{}",
            "preview": text[:200],
            "tokens": loss_tokens + 1,
            "loss_tokens": loss_tokens,
            "loss": float(loss_tokens * (2 + self.rng.random())),
            "grad_norm": norm * 1.02,
            "sketch_norm": norm,
            "sketch": vector.astype(np.float16).tolist(),
        }

    def score(self, scoring: str) -> None:
        spec = self.spec(scoring)
        self.features[scoring] = {}
        parts: dict[str, list[Part]] = {"features": [], "rejects": []}
        samples = tokens = 0
        for unit in self.units:
            rows, rejects = self.sample_rows(unit, scoring)
            self.features[scoring][unit.unit_id] = rows
            samples, tokens = samples + len(rows), tokens + sum(row["tokens"] for row in rows)
            for schema, table in (
                ("features", rows_to_table("features", rows, self.options.k)),
                ("rejects", rows_to_table("rejects", rejects)),
            ):
                path = getattr(self.run, f"{schema}_path")(scoring, unit.unit_id)
                notes = {"windows": len(rows) + len(rejects)} if schema == "features" else {}
                footer = Footer(schema=schema, spec=spec.fingerprint, inputs={"unit": unit.unit_id}, notes=notes)
                parts[schema].append(write_table(self.run.url, path, table, footer))
        self.manifest(
            Manifest(
                stage="score",
                name=scoring,
                spec=plain(spec),
                inputs={
                    "plan": self.manifests[f"plan/{PLAN_NAME}"].fingerprint,
                    "scoring": self.manifests[f"scoring/{scoring}"].fingerprint,
                },
                parts=tuple(parts["features"] + parts["rejects"]),
                summary={"units": len(self.units), "samples": samples, "tokens": tokens},
            )
        )
        self.heartbeat(scoring, tokens)

    def heartbeat(self, scoring: str, tokens: int) -> None:
        now = time.time()
        for pid in (1, 2):
            beat = Heartbeat(
                host="node",
                pid=pid,
                started=now - 100,
                updated=now - 1,
                attempt="a",
                unit=self.units[0].unit_id,
                units_done=len(self.units) // 2,
                tokens_done=tokens // 2,
                busy_s=99.0,
                busy_tokens=tokens // 2,
                last_error="out of memory: the batch was halved" if pid == 2 else "",
            )
            folder = self.run.timings_folder("score", scoring)
            write_whole(self.run.path(f"{folder}/worker-node-{pid}.json"), orjson.dumps(dataclasses.asdict(beat)))

    # target

    def target(self, scoring: str) -> None:
        spec, k = self.spec(scoring), self.options.k
        rows = []
        for part, count in (("reference", self.options.targets), ("evaluation", 10)):
            for row in range(count):
                vector = self.rng.normal(size=k) / np.sqrt(k)
                vector[0] += 1.0
                vector /= np.linalg.norm(vector)
                text = f"{part} question {row} and its answer"
                identity = sample_id(f"target/{part}", f"{part}.jsonl", row, 0)
                self.texts[identity] = text
                rows.append(
                    {
                        "part": part,
                        "sample_id": identity,
                        "content_id": content_id(text, [(0, len(text))]),
                        "source_id": "",
                        "path": f"{part}.jsonl",
                        "row": row,
                        "window": 0,
                        "char_start": 0,
                        "char_end": len(text),
                        "domain": "target",
                        "extra": "{}",
                        "preview": text,
                        "text": text,
                        "loss_spans": f"[[0,{len(text)}]]",
                        "tokens": 30,
                        "loss_tokens": 29,
                        "loss": 60.0,
                        "grad_norm": 1.0,
                        "sketch_norm": 1.0,
                        "sketch": vector.tolist(),
                    }
                )
        self.target_rows = rows
        folder = self.run.target_folder("gsm", scoring)
        samples = write_table(
            self.run.url,
            f"{folder}/samples.parquet",
            rows_to_table("target_samples", rows, k),
            Footer(schema="target_samples", spec=spec.fingerprint),
        )
        spectrum = self.spectrum(rows, folder, spec)
        self.manifest(
            Manifest(
                stage="target",
                name=f"gsm.{scoring}",
                spec={"scoring": scoring, "target": "gsm", "data": {"reference": "abc"}, "energy": 0.945},
                inputs={"scoring": self.manifests[f"scoring/{scoring}"].fingerprint},
                parts=(samples, spectrum),
                summary={
                    "counts": {"reference": self.options.targets, "evaluation": 10},
                    "geometry": {
                        "target_samples": self.options.targets,
                        "sketch_dimension": k,
                        "k_star": 5,
                        "null_dimension": 2,
                        "share_stiff": 0.2,
                        "share_flat": 0.5,
                        "share_null": 0.3,
                        "warnings": ["fewer target samples than 50"],
                    },
                },
            )
        )

    def spectrum(self, rows: list[dict[str, Any]], folder: str, spec: FeatureSpec) -> Part:
        z_MK = np.array([row["sketch"] for row in rows if row["part"] == "reference"])
        mean = z_MK.mean(axis=0)
        records = []
        for fisher, centred in (("centred", z_MK - mean), ("empirical", z_MK)):
            values, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
            values, vectors = values[::-1][:-2], vectors[:, ::-1].T[:-2]
            for index, (value, vector) in enumerate(zip(values, vectors)):
                records.append(
                    {
                        "fisher": fisher,
                        "index": index,
                        "eigenvalue": float(value) * 0.6**index,
                        "part": "stiff" if index < 5 else "flat",
                        "cumulative_energy": float(values[: index + 1].sum() / values.sum()),
                        "mean_share": float((vector @ mean) ** 2 / (mean @ mean)),
                        "vector": vector.tolist(),
                    }
                )
        footer = Footer(schema="spectrum", spec=spec.fingerprint, notes={"centred": {"k_star": 5}})
        table = rows_to_table("spectrum", records, self.options.k)
        return write_table(self.run.url, f"{folder}/spectrum.parquet", table, footer)

    def curvature(self, scoring: str) -> None:
        spec, described = self.spec(scoring), self.manifests[f"target/gsm.{scoring}"]
        mean = np.array([r["sketch"] for r in self.target_rows if r["part"] == "reference"]).mean(axis=0)
        mean /= np.linalg.norm(mean)
        parts, everything = [], []
        for unit in self.units:
            rows = []
            for sample in self.features[scoring][unit.unit_id]:
                vector = np.array(sample["sketch"])
                overlap = 0.9 if sample["row"] % 31 == 29 else 0.0
                rows.append(
                    {
                        "sample_id": sample["sample_id"],
                        "alignment": float(vector @ mean),
                        "influence": float(vector @ mean) * 0.8,
                        "quad": 1.0 + float(vector[1] ** 2),
                        "stiff_cost": float((vector[:5] ** 2).sum()) * 3,
                        "flat_energy": float((vector[5:-2] ** 2).sum()),
                        "null_energy": float((vector[-2:] ** 2).sum()),
                        "stiff_cost_empirical": float((vector[:5] ** 2).sum()) * 4,
                        "overlap": overlap,
                        "overlap_with": "evaluation" if overlap else "",
                        "overlapping": overlap > 0.3,
                    }
                )
            everything += rows
            footer = Footer(
                schema="curvature",
                spec=spec.fingerprint,
                inputs={"unit": unit.unit_id, "target": described.fingerprint},
            )
            path = self.run.curvature_path("gsm", scoring, unit.unit_id)
            parts.append(write_table(self.run.url, path, rows_to_table("curvature", rows), footer))
        self.curvature_rows[scoring] = everything
        self.manifest(
            Manifest(
                stage="curvature",
                name=f"gsm.{scoring}",
                spec={"scoring": scoring, "target": "gsm"},
                inputs={
                    "score": self.manifests[f"score/{scoring}"].fingerprint,
                    "target": described.fingerprint,
                },
                parts=tuple(parts),
                summary={"overlapping": sum(row["overlapping"] for row in everything)},
            )
        )

    # selection

    def select(self, name: str, scoring: str) -> None:
        samples = [row for unit in self.units for row in self.features[scoring][unit.unit_id]]
        rows = []
        for sample, geometry in zip(samples, self.curvature_rows[scoring]):
            score = geometry["alignment"] * (0.0 if name == "random" else 1.0) + float(self.rng.normal()) * 0.15
            row = {key: value for key, value in sample.items() if key != "sketch"}
            row |= {key: geometry[key] for key in (*GEOMETRY_COLUMNS, *OVERLAP_COLUMNS)}
            row |= {"score": score, "scores": [("redundancy", 0.1)], "selected": False, "rank": None}
            row |= {"selection_weight": 0.0, "reason": "overlap" if geometry["overlapping"] else "not_chosen"}
            rows.append(row)
        seen: dict[str, str] = {}
        rank = 0
        for row in sorted(rows, key=lambda row: -row["score"]):
            if row["overlapping"]:
                continue
            if row["content_id"] in seen:
                row["reason"] = f"duplicate_of {seen[row['content_id']]}"
                continue
            seen[row["content_id"]] = row["sample_id"]
            if rank < self.options.budget:
                row |= {"rank": rank, "selected": True, "selection_weight": 1.0, "reason": "selected"}
                rank += 1
        budget = {"samples": self.options.budget, "tokens": 0}
        spec = {
            "scoring": scoring,
            "target": "gsm",
            "settings": {"selector": name},
            "budget": budget,
            "keep_overlapping": False,
        }
        score_manifest = self.manifests[f"score/{scoring}"].fingerprint
        footer = Footer(schema="selection", spec=fingerprint(spec), inputs={"score": score_manifest})
        folder = self.run.selection_folder(name)
        part = write_table(self.run.url, f"{folder}/part-00000.parquet", rows_to_table("selection", rows), footer)
        counts: dict[str, int] = {}
        for row in rows:
            word = row["reason"].split(" ")[0]
            counts[word] = counts.get(word, 0) + 1
        solution = pretty_json(
            {
                "selector": name,
                "settings": {"selector": name},
                "budget": budget,
                "certificate": {"kind": "relaxed bound", "value": 0.95, "bound": 0.97} if name == "match" else {},
                "diagnostics": {
                    "set_cosine": {"match": 0.95, "random": 0.41}.get(name, 0.91),
                    "set_cosine_heldout": {"match": 0.88, "random": 0.37}.get(name, 0.86),
                    "set_cosine_bound": 0.97,
                    "effective_rank": 11.3,
                    "domains": {"math": {"before": 0.2, "after": 0.8}},
                    "duplicates_dropped": counts.get("duplicate_of", 0),
                    "a_measure_of_tomorrow": 0.25,
                    **self.supply(name),
                },
                "counts": counts,
                "warnings": ["the budget lies past what the pool supplies"] if name == "match" else [],
            }
        )
        write_whole(self.run.path(f"{folder}/solution.json"), solution)
        listed = Part(path=f"{folder}/solution.json", rows=0, bytes=len(solution), sha256=sha256(solution))
        self.manifest(
            Manifest(
                stage="select",
                name=name,
                spec=spec,
                inputs={
                    "score": score_manifest,
                    "curvature": self.manifests[f"curvature/gsm.{scoring}"].fingerprint,
                    "target": self.manifests[f"target/gsm.{scoring}"].fingerprint,
                },
                parts=(part, listed),
                summary={"candidates": len(rows), "selected": rank, "counts": counts},
            )
        )
        self.selected = getattr(self, "selected", {})
        self.selected[name] = sorted((row for row in rows if row["selected"]), key=lambda row: row["rank"])

    def supply(self, name: str) -> dict[str, Any]:
        if name != "match":
            return {}
        counts = np.unique(np.geomspace(1, self.options.budget, 30).round().astype(int))
        peak = self.options.budget // 2
        curve = [[int(n), 0.9 - 0.08 * float(np.log(n / peak) ** 2) / 4] for n in counts]
        return {"supply_peak": peak, "supply_peak_cosine": 0.9, "supply_curve": curve}

    # stream

    def ranked(self, row: dict[str, Any], rank: int) -> RankedSample:
        text = self.texts[row["sample_id"]]
        place = {
            key: row[key] for key in ("sample_id", "content_id", "path", "row", "window", "char_start", "char_end")
        }
        return RankedSample(
            sample=Sample(
                **place,
                text=text,
                loss_spans=((0, len(text)),),
                source_id=row["source_id"],
                domain=row["domain"],
                extra=row["extra"],
            ),
            rank=rank,
            selection_weight=row.get("selection_weight", 1.0),
            tokens=row["tokens"],
            loss_tokens=row["loss_tokens"],
        )

    def shards(self, folder: str, rows: list[dict[str, Any]]) -> tuple[ShardEntry, ...]:
        entries = []
        for number, start in enumerate(range(0, len(rows), self.options.shard_samples)):
            chunk = rows[start : start + self.options.shard_samples]
            members = [(start + i, encode_record(self.ranked(row, start + i))) for i, row in enumerate(chunk)]
            domains: dict[str, int] = {}
            for row in chunk:
                domains[row["domain"]] = domains.get(row["domain"], 0) + 1
            body, entry = encode_shard(f"shard-{number:06d}.tar", members, domains, sum(r["tokens"] for r in chunk))
            write_whole(self.run.path(f"{folder}/{entry.name}"), body)
            entries.append(entry)
        return tuple(entries)

    def export(self, selection: str, scoring: str) -> None:
        folder = self.run.stream_folder(selection, 1)
        by_part = {p: [row for row in self.target_rows if row["part"] == p] for p in ("reference", "evaluation")}
        index = StreamIndex(
            stream=selection,
            generation=1,
            selection=selection,
            encoding=plain(self.spec(scoring).encoding),
            tokenizer=self.spec(scoring).tokenizer,
            shards=self.shards(folder, self.selected[selection]),
            target=self.shards(f"{folder}/target", by_part["reference"]),
            evaluation=self.shards(f"{folder}/eval", by_part["evaluation"]),
        )
        data = index_bytes(index)
        write_whole(self.run.path(f"{folder}/index.json"), data)
        parts = [Part(path=f"{folder}/index.json", rows=index.rows, bytes=len(data), sha256=sha256(data))]
        for below, entries in (("", index.shards), ("target/", index.target), ("eval/", index.evaluation)):
            parts += [
                Part(path=f"{folder}/{below}{entry.name}", rows=entry.rows, bytes=entry.bytes, sha256=entry.sha256)
                for entry in entries
            ]
        self.index = index
        self.manifest(
            Manifest(
                stage="export",
                name=f"{selection}.gen-000001",
                spec={"stream": selection, "selection": selection, "shard_samples": 10, "generation": 1},
                inputs={
                    "select": self.manifests[f"select/{selection}"].fingerprint,
                    "plan": self.manifests[f"plan/{PLAN_NAME}"].fingerprint,
                },
                parts=tuple(parts),
                summary={"rows": index.rows, "tokens": index.tokens, "shards": len(index.shards)},
            )
        )

    # training

    def train(self, policy: str) -> None:
        spec = {"policy": policy, "learning_rate": 1e-4, "steps": self.options.steps}
        footer = {name: Footer(schema=name, spec=fingerprint(spec)) for name in ("steps", "decisions", "timings")}
        rows = self.selected["match"]
        per_step = max(1, len(rows) // self.options.steps)
        steps, decisions, timings = [], [], []
        trained = offered = 0
        gain = {"full": 0.4, "random": 0.25}.get(policy, 0.6) / self.options.steps
        for step in range(1, self.options.steps + 1):
            batch = rows[(step - 1) * per_step : step * per_step]
            kept = [i % 2 == 0 or policy == "full" for i in range(len(batch))]
            weights = np.where(
                kept, 1.0 + 0.3 * np.cos(np.arange(len(batch)) + step) * policy.startswith("filter"), 0.0
            )
            weights = weights / weights[weights > 0].mean()
            tokens = [row["tokens"] for row in batch]
            offered += sum(tokens)
            trained += sum(t for t, keep in zip(tokens, kept) if keep)
            steps.append(
                {
                    "step": step,
                    "generation": 1,
                    "policy": policy,
                    "metric": "target" if policy.startswith("filter") else "",
                    "mode": "two-pass" if policy.startswith("filter") else "plain",
                    "offered": len(batch),
                    "kept": sum(kept),
                    "offered_tokens": sum(tokens),
                    "trained_tokens": sum(t for t, keep in zip(tokens, kept) if keep),
                    "total_offered_tokens": offered,
                    "total_trained_tokens": trained,
                    "loss": 2.5 - gain * step + 0.02 * float(self.rng.normal()),
                    "target_loss": 2.2 - gain * step if policy != "random" else None,
                    "eval_loss": 2.3 - gain * step if step % 4 == 0 else None,
                    "learning_rate": 1e-4 * (1 - step / (self.options.steps + 1)),
                    "grad_norm": 1.0,
                    "grad_norm_l1": 20.0,
                    "clip_factor": 1.0,
                    "weight_sum": float(weights.sum()),
                    "effective_sample_size": float(weights.sum() ** 2 / (weights**2).sum()),
                    "alpha": 0.4,
                    "interaction_to_alignment": 0.3,
                    "matching_error": 0.2,
                    "update_target_cosine": 0.6,
                    "fallback": "",
                    "padding_share": 0.1,
                }
            )
            timings.append(
                {
                    "step": step,
                    "seconds": 1.5,
                    "cpu_seconds": 2.5,
                    "selection_seconds": 0.3,
                    "oracle_seconds": 0.0,
                    "evaluation_seconds": 0.1,
                    "flops": 3e9,
                    "selection_flops": 1e9,
                    "mfu": 0.25,
                    "peak_memory": 2_000_000_000,
                    "host": "node",
                    "process": 0,
                }
            )
            for i, row in enumerate(batch):
                decisions.append(
                    {
                        "step": step,
                        "position": (step - 1) * per_step + i,
                        "stream": self.index.stream,
                        "generation": 1,
                        "sample_id": row["sample_id"],
                        "rank": row["rank"],
                        "tokens": row["tokens"],
                        "loss_tokens": row["loss_tokens"],
                        "loss": row["loss"],
                        "alignment": 0.1,
                        "self_interaction": 1.0,
                        "score": 0.1,
                        "kept": kept[i],
                        "step_weight": float(weights[i]),
                        "masked_tokens": 0,
                        "reason": "kept" if kept[i] else "filtered",
                    }
                )
        folder = self.run.training_folder(policy)
        parts = []
        for name, records in (("steps", steps), ("decisions", decisions)):
            path = f"{folder}/{name}/part-{len(steps):08d}.parquet"
            parts.append(write_table(self.run.url, path, rows_to_table(name, records), footer[name]))
        write_table(
            self.run.url,
            f"{folder}/timings/part-{len(steps):08d}.parquet",
            rows_to_table("timings", timings),
            footer["timings"],
        )
        parts += self.checkpoint(f"{folder}/checkpoints/step-{len(steps):08d}", len(steps))
        self.manifest(
            Manifest(
                stage="train",
                name=policy,
                spec=spec,
                inputs={"stream": self.index.fingerprint},
                parts=tuple(parts),
                summary={
                    "steps": len(steps),
                    "trained_tokens": trained,
                    "offered_tokens": offered,
                    "initial_eval_loss": 2.3,
                    "eval_loss": 2.3 - gain * len(steps),
                },
            )
        )
        self.trained[policy] = {
            "eval_loss": 2.3 - gain * len(steps),
            "trained_tokens": trained,
            "offered_tokens": offered,
            "steps": len(steps),
        }

    # comparison

    def compare(self) -> None:
        control, *others = sorted(self.trained, key=lambda policy: policy != "random")
        arms = [f"match:{policy}" for policy in (control, *others)]
        spec: dict[str, Any] = {
            "arms": arms, "control": arms[0], "seeds": [0, 1, 2], "token_budget": 1000, "interval": "student", "level": 0.95,
            "margin": 0.0, "tolerance": 0.05, "guard": fingerprint("guard"),
            "trainings": [[f"match:{policy}", seed, policy] for seed in range(3) for policy in (control, *others)],
        }  # fmt: skip
        rows = [
            {
                "arm": arm, "seed": seed, "training": policy, "guard_loss": 3.0 + 0.01 * seed * (policy != control),
                "flops": 2e13, "selection_flops": 1e12, **self.trained[policy],
            }
            for arm, seed, policy in spec["trainings"]
        ]  # fmt: skip
        judged = arm_rows(rows, spec, dict.fromkeys(arms, 5e12))
        footers = {name: Footer(schema=name, spec=fingerprint(spec)) for name in ("arms", "arm_trainings")}
        folder = self.run.comparison_folder("anneal")
        parts = tuple(
            write_table(self.run.url, f"{folder}/{file}", rows_to_table(name, made), footers[name])
            for file, name, made in (("arms.parquet", "arms", judged), ("trainings.parquet", "arm_trainings", rows))
        )
        seconds = {arm: {"training": 12.0, "selection": 2.0, "offline": {"score": 60.0}} for arm in arms}
        write_whole(self.run.path(f"{self.run.timings_folder('compare', 'anneal')}/seconds.json"), pretty_json(seconds))
        self.manifest(
            Manifest(
                stage="compare",
                name="anneal",
                spec=spec,
                inputs={f"train/{policy}": self.manifests[f"train/{policy}"].fingerprint for policy in self.trained},
                parts=parts,
                summary={
                    "start": {"eval_loss": 2.3, "guard_loss": 3.1},
                    "verdicts": {row["arm"]: row["verdict"] for row in judged if not row["control"]},
                },
            )
        )

    def checkpoint(self, folder: str, step: int) -> list[Part]:
        files = {"model.safetensors": b"weights of a fake model", "state.json": pretty_json({"step": step})}
        listed = [{"path": name, "bytes": len(data), "sha256": sha256(data)} for name, data in files.items()]
        manifest = pretty_json({"step": step, "files": listed, "fingerprint": fingerprint([step, listed])})
        parts = []
        for name, data in {**files, "manifest.json": manifest}.items():
            write_whole(self.run.path(f"{folder}/{name}"), data)
            parts.append(Part(path=f"{folder}/{name}", rows=0, bytes=len(data), sha256=sha256(data)))
        return parts


def build_fake_run(folder: Any, options: FakeOptions | None = None, **changes: Any) -> Run:
    """Write the run at `folder` (a path or any fsspec URL) and open it; `changes` are fields of `FakeOptions`."""
    options = dataclasses.replace(options or FakeOptions(), **changes)
    builder = _Builder(str(folder), options)
    wanted = options.stages
    if "plan" in wanted:
        builder.plan()
    for scoring in options.scorings:
        if "score" in wanted:
            builder.declare(scoring)
            builder.score(scoring)
        if "target" in wanted:
            builder.target(scoring)
        if "curvature" in wanted:
            builder.curvature(scoring)
    first = options.scorings[0]
    if "select" in wanted:
        for name in options.selectors:
            builder.select(name, first)
    if "export" in wanted:
        builder.export(options.selectors[0], first)
    if "train" in wanted:
        for policy in options.trainings:
            builder.train(policy)
        if "compare" in wanted and "random" in options.trainings and len(options.trainings) > 1:
            builder.compare()
    return Run.open(str(folder))


def replace_part(run: Run, stage: str, name: str, path: str, table: pa.Table, footer: Footer) -> None:
    """Rewrite a listed part and list its new hash, as a program with a bug would have written it from the start.

    Manifests further down the flow keep the fingerprint of the old one.
    """
    part = write_table(run.url, path, table, footer)
    manifest = run.manifest(stage, name)
    parts = tuple(part if listed.path == path else listed for listed in manifest.parts)
    write_manifest(run.path(run.manifest_path(stage, name)), dataclasses.replace(manifest, parts=parts))
