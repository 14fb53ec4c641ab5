"""The preconditioner of a scoring: declared with it, its fit written once as a table, read by every worker."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from pipelines.options import ScoringOptions
from schemas.errors import InputError
from schemas.parquet import Footer, Part, read_table, write_table
from schemas.run import Run
from schemas.spec import FeatureSpec, Power, PreconditionerSpec, PreconditionForm
from schemas.tables import table_schema
from selection_ops.online.metrics import METRICS, get_metric
from selection_ops.optimizer_state import read_optimizer
from selection_ops.preconditioning import Preconditioner, exact_preconditioner, fit_preconditioner
from selection_ops.sites import SiteReport

Side = Literal["candidate", "target"]
POWERS: dict[Power, float] = {"none": 0.0, "P^1/2": 0.5, "P": 1.0}
_NAMES = {power: name for name, power in POWERS.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Declared:
    """What the options say: fields of the feature spec, the fitted table where there is one, and what people are told."""

    fields: dict[str, Any]
    table: pa.Table | None = None
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)


def metric_of(spec: FeatureSpec) -> str:
    """Name of the metric that a scoring was declared with."""
    powers = POWERS[spec.precondition_candidate], POWERS[spec.precondition_target]
    return next(name for name, metric in METRICS.items() if (metric.candidate_power, metric.target_power) == powers)


def declare_preconditioner(model: Any, options: ScoringOptions, sites: SiteReport) -> Declared:
    """The preconditioner that the options ask for, fitted where its form is rank-one.

    Raises `InputError` where metric and optimizer state do not go together, and what reading the state raises.
    """
    metric = get_metric(options.metric or ("natural" if options.optimizer_state else "sgd"))
    form: PreconditionForm = options.precondition or "rank-one"
    if not metric.needs_preconditioner:
        if options.optimizer_state or options.precondition:
            given = "--optimizer-state" if options.optimizer_state else "--precondition"
            raise InputError(f"metric {metric.name} compares gradients as they are and has no use for {given}")
        return Declared(fields={})
    if not options.optimizer_state:
        raise InputError(
            f"metric {metric.name} needs the second moments of an optimizer: name them with --optimizer-state "
            "(a checkpoint folder, optimizer.pt or optimizer.safetensors)"
        )
    state = read_optimizer(options.optimizer_state, model)
    fields = {
        "precondition_candidate": _NAMES[metric.candidate_power],
        "precondition_target": _NAMES[metric.target_power],
        "preconditioner": PreconditionerSpec(optimizer=state.optimizer, state=state.fingerprint, form=form),
    }
    power = metric.candidate_power or metric.target_power
    summary: dict[str, Any] = {"metric": metric.name, "optimizer": state.optimizer, "steps": state.steps, "form": form}
    if form == "exact":
        exact_preconditioner(model, state, sites.input_groups[:1])  # says now what workers would say later
        return Declared(fields=fields, summary=summary)
    fitted = fit_preconditioner(model, state, sites.input_groups, sites.small, power=power)
    lowest = min(fitted.correlation, key=lambda name: fitted.correlation[name])
    summary["correlation"] = {
        "mean": float(np.mean(list(fitted.correlation.values()))),
        "lowest": fitted.correlation[lowest],
        "lowest_site": lowest,
    }
    held = fitted.preconditioner
    rows = [
        *((name, "out", fitted.correlation[name], factor) for name, factor in held.outputs.items()),
        *((name, "in", None, factor) for name, factor in held.inputs.items()),
        *((name, "small", None, factor) for name, factor in held.small.items()),
    ]
    columns = {
        "name": [row[0] for row in rows],
        "side": [row[1] for row in rows],
        "correlation": [row[2] for row in rows],
        "factor": [row[3].float().numpy() for row in rows],
    }
    return Declared(fields=fields, table=pa.table(columns, schema=table_schema("preconditioner")), summary=summary)


def write_preconditioner(run: Run, scoring: str, spec: FeatureSpec, table: pa.Table) -> Part:
    """Write the fitted factors of a scoring."""
    footer = Footer(schema="preconditioner", spec=spec.preconditioner_fingerprint)
    return write_table(run.url, run.preconditioner_path(scoring), table, footer)


def load_preconditioner(
    model: Any, spec: FeatureSpec, side: Side, *, factors: str, optimizer_state: str | None
) -> Preconditioner | None:
    """What the gradients of candidates or of the target are multiplied by; None where they are taken as they are.

    `factors` is the URL of the fitted table. Raises `InputError` where the exact form's optimizer state is not at hand or another.
    """
    power = POWERS[spec.precondition_candidate if side == "candidate" else spec.precondition_target]
    if spec.preconditioner is None or not power:
        return None
    if spec.preconditioner.form == "rank-one":
        return _from_table(read_table(factors, schema="preconditioner", spec=spec.preconditioner_fingerprint))
    if not optimizer_state:
        raise InputError(
            "this scoring multiplies every gradient by the exact second moments of an optimizer, and where its state lies is not "
            "known here: name it with --optimizer-state"
        )
    state = read_optimizer(optimizer_state, model)
    if state.fingerprint != spec.preconditioner.state:
        raise InputError(
            f"{optimizer_state} has fingerprint {state.fingerprint}, but the scoring was declared with {spec.preconditioner.state}"
        )
    return exact_preconditioner(model, state, spec.input_groups, spec.small_sites, power=power)


def _from_table(table: pa.Table) -> Preconditioner:
    held: dict[str, dict[str, torch.Tensor]] = {"out": {}, "in": {}, "small": {}}
    for row, name, side in zip(table["factor"], table["name"].to_pylist(), table["side"].to_pylist()):
        held[side][name] = torch.from_numpy(np.array(row.values, dtype=np.float32))
    return Preconditioner(outputs=held["out"], inputs=held["in"], small=held["small"])
