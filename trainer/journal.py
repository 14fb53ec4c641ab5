"""The journal: what every step did and why, as Parquet parts cut at checkpoints.

`steps` and `decisions` are the same bytes in an undisturbed and in a resumed run; seconds and hosts stand in `timings`, of every process.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from schemas.parquet import Footer, Part, rows_to_table, write_table
from schemas.run import Run
from schemas.storage import join, list_names, remove
from trainer.candidate import Candidate, StepResult
from trainer.parallel import OneProcess

TABLES = ("steps", "decisions", "timings")
_PART = re.compile(r"part-(\d+)-(\d+)\.parquet")


def part_name(first: int, last: int) -> str:
    """File name of the part that holds steps `first` to `last`."""
    return f"part-{first:06d}-{last:06d}.parquet"


class Journal:
    """Rows of the steps since the last cut; `cut` writes them. Every process records and cuts, process 0 writes what is written."""

    def __init__(
        self, run: Run, training: str, *, spec: str, streams: Mapping[str, str], processes: OneProcess | None = None
    ) -> None:
        self._run, self._processes = run, processes or OneProcess()
        self._folder = run.training_folder(training)
        self._spec = spec
        self.inputs = dict(streams)
        """Fingerprints of the streams that the rows since the last cut come from."""
        self._rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
        self._host = socket.gethostname()

    def record(
        self, step: Mapping[str, Any], decisions: Sequence[Mapping[str, Any]], timings: Mapping[str, Any]
    ) -> None:
        """Take in one step."""
        number = step["step"]
        self._rows["steps"].append(dict(step))
        self._rows["decisions"] += [{"step": number, **decision} for decision in decisions]
        self._rows["timings"].append({"step": number, "host": self._host, "process": self._processes.index, **timings})

    def cut(self) -> tuple[Part, ...]:
        """Write what was taken in since the last cut; returns the parts that are results (not the timings)."""
        timings = [row for rows in self._processes.every(self._rows["timings"]) for row in rows]
        self._rows["timings"] = sorted(timings, key=lambda row: (row["step"], row["process"]))
        parts = self._processes.decide(self._write, kinds=(Part,))
        for rows in self._rows.values():
            rows.clear()
        return parts

    def _write(self) -> tuple[Part, ...]:
        steps = self._rows["steps"]
        if not steps:
            return ()
        name = part_name(steps[0]["step"], steps[-1]["step"])
        parts = {}
        for table, rows in self._rows.items():
            footer = Footer(schema=table, spec=self._spec, inputs=self.inputs)
            parts[table] = write_table(
                self._run.url, f"{self._folder}/{table}/{name}", rows_to_table(table, rows), footer
            )
        return parts["steps"], parts["decisions"]

    def discard_after(self, step: int) -> None:
        """Delete parts that reach beyond `step`: no checkpoint vouches for them and the steps are taken again. Process 0's business."""
        for table in TABLES:
            folder = self._run.path(f"{self._folder}/{table}")
            for name in list_names(folder, ".parquet"):
                found = _PART.fullmatch(name)
                if found and int(found[2]) > step:
                    remove(join(folder, name))


def step_row(result: StepResult, **context: Any) -> dict[str, Any]:
    """Row of `steps`; `context` holds what the loop knows: policy, rates, totals, evaluation."""
    diagnostics = result.decision.diagnostics
    return {
        "step": result.step,
        "metric": result.metric,
        "mode": result.mode,
        "kept": len(result.decision.kept),
        "trained_tokens": result.trained_tokens,
        "loss": result.loss,
        "target_loss": result.target_loss,
        "grad_norm": result.grad_norm,
        "grad_norm_l1": result.grad_norm_l1,
        "clip_factor": result.clip_factor,
        "weight_sum": sum(result.weight_N),
        "effective_sample_size": result.effective_sample_size,
        "alpha": result.decision.alpha,
        "interaction_to_alignment": diagnostics.interaction_to_alignment if diagnostics else None,
        "matching_error": diagnostics.matching_error if diagnostics else None,
        "update_target_cosine": diagnostics.update_target_cosine if diagnostics else None,
        "oracle_drop": result.oracle.drop if result.oracle else None,
        "oracle_random_drop": result.oracle.random_drop if result.oracle else None,
        "oracle_beaten": result.oracle.beaten if result.oracle else None,
        "oracle_correlation": result.oracle.correlation if result.oracle else None,
        "fallback": result.decision.fallback,
        "padding_share": result.padding_share,
        **context,
    }


def decision_rows(result: StepResult, offered: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Rows of `decisions`, in the order of the stream."""
    kept, space, score_N = set(result.decision.kept), result.geometry, result.decision.score_N
    return [
        {
            "position": item.position,
            "stream": item.stream,
            "generation": item.generation,
            "sample_id": item.sample_id,
            "rank": item.rank,
            "tokens": item.tokens,
            "loss_tokens": item.loss_tokens,
            "loss": result.sample_loss_N[index],
            "alignment": float(space.align_N[index]) if space else None,
            "self_interaction": float(space.gram_NN[index, index]) if space else None,
            "score": float(score_N[index]) if score_N is not None else None,
            "kept": index in kept,
            "step_weight": result.weight_N[index],
            "masked_tokens": result.masked_N[index] if result.masked_N else 0,
            "reason": result.decision.reasons[index],
        }
        for index, item in enumerate(offered)
    ]
