"""Declaring a scoring: the feature spec is fixed, under a name, the first time anything is computed with it."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import orjson
import pyarrow as pa

from pipelines.options import ScoringOptions
from schemas.errors import InputError
from schemas.fingerprint import plain, pretty_json
from schemas.manifest import Manifest, write_manifest
from schemas.run import Run, check_name
from schemas.spec import EncodingSpec, FeatureSpec
from schemas.storage import exists, read_bytes, write_whole

if TYPE_CHECKING:
    from selection_ops.batch_budget import BudgetSearch


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelLocation:
    """Where the weights of a scoring lie on this machine; execution, not spec."""

    model: str
    revision: str | None = None
    optimizer_state: str | None = None
    """Where the optimizer state of an exact preconditioner lies."""

    def __post_init__(self) -> None:
        # A worker, and the command that resumes, may have another working directory.
        for name in ("model", "optimizer_state"):
            place = getattr(self, name)
            if place and os.path.exists(place):
                object.__setattr__(self, name, os.path.abspath(place))


def scoring_spec(run: Run, name: str, options: ScoringOptions) -> tuple[FeatureSpec, ModelLocation]:
    """The feature spec of scoring `name`, declared now if it is new, and where its model lies.

    Raises `InputError` where an option differs from the scoring that exists.
    """
    check_name("scoring", name)
    if exists(run.path(run.manifest_path("scoring", name))):
        spec = run.scoring(name)
        _refuse_changes(name, spec, options)
        return spec, _location(run, name, spec, options)
    if not options.model:
        raise InputError(f"scoring {name!r} does not exist yet in {run.url}: name the model with --model")
    spec, factors, report, search = _resolve(options.model, options)
    location = ModelLocation(model=options.model, revision=options.revision, optimizer_state=options.optimizer_state)
    _remember(run, name, location)
    from pipelines.preconditioning import write_preconditioner

    parts = () if factors is None else (write_preconditioner(run, name, spec, factors),)
    manifest = Manifest(stage="scoring", name=name, spec=plain(spec), inputs={}, parts=parts, summary=report)
    try:
        # Processes that declare it at the same time may have found different budgets: the first one's stands.
        write_manifest(run.path(run.manifest_path("scoring", name)), manifest, create_only=True)
    except FileExistsError:
        _refuse_changes(name, run.scoring(name), options)
    else:
        if search is not None:
            # Speeds are the machine's, so they stand where nothing is compared.
            write_whole(run.path(f"{run.timings_folder('scoring', name)}/batch_tokens.json"), pretty_json(search))
    return run.scoring(name), location


def _resolve(
    model: str, options: ScoringOptions
) -> tuple[FeatureSpec, pa.Table | None, dict[str, Any], BudgetSearch | None]:
    import torch

    from pipelines.preconditioning import declare_preconditioner
    from selection_ops.engine import GradientEngine
    from selection_ops.model import choose_attention, default_batch_tokens, default_dtype, load_model
    from selection_ops.packing import require_packing
    from selection_ops.sites import find_sites

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = options.dtype or default_dtype(device)
    attention = options.attention or choose_attention(model, device, dtype, revision=options.revision)
    batch_tokens = options.batch_tokens or default_batch_tokens(device, dtype)
    loaded = load_model(model, revision=options.revision, dtype=dtype, attention=attention, device="cpu")
    attribute = options.attribute or ("adapters" if loaded.adapters else "blocks")
    report = find_sites(loaded.model, attribute, adapters=loaded.adapters)
    given = {name: value for name, value in dataclasses.asdict(options).items() if value is not None}
    encoding = {f.name: given[f.name] for f in dataclasses.fields(EncodingSpec) if f.name in given}
    declared = declare_preconditioner(loaded.model, options, report)
    numbers = {name: given[name] for name in ("proj_rank", "k", "seed", "loss", "layout") if name in given}
    spec = FeatureSpec(
        model=loaded.model_fingerprint,
        tokenizer=loaded.tokenizer_fingerprint,
        encoding=EncodingSpec(**encoding),
        attribute=attribute,
        input_groups=report.input_groups,
        small_sites=report.small,
        dtype=dtype,
        attention=attention,
        batch_tokens=batch_tokens,
        **numbers,
        **declared.fields,
    )
    if spec.layout == "packed":
        require_packing(GradientEngine.from_spec(loaded.model, _plain(spec)))
    summary: dict[str, Any] = {
        "weight_bytes": sum(p.numel() * p.element_size() for p in loaded.model.parameters()),
        "parameters": report.parameters,
        "attributed_parameters": report.attributed_parameters,
        "attributed_share": report.attributed_parameters / report.parameters,
        "not_attributed": dict(report.unattributed),
        **({"preconditioner": declared.summary} if declared.summary else {}),
    }
    if options.batch_tokens != 0 and (options.batch_tokens is not None or device == "cpu"):
        return spec, declared.table, summary, None
    search = _search(loaded.model, spec, device)
    tried = [found.batch_tokens for found in search.tries]
    summary["batch_tokens"] = {"found": search.batch_tokens, "tried": tried, "stopped": search.stopped}
    return dataclasses.replace(spec, batch_tokens=search.batch_tokens), declared.table, summary, search


def _plain(spec: FeatureSpec) -> FeatureSpec:
    """The spec without its preconditioner, which is not there yet and changes neither what can be packed nor how fast it is."""
    return dataclasses.replace(spec, precondition_candidate="none", precondition_target="none", preconditioner=None)


def _search(model: Any, spec: FeatureSpec, device: str) -> BudgetSearch:
    """The token budget found on `device`, under the arithmetic that a worker has there."""
    import torch

    from selection_ops.batch_budget import find_batch_tokens
    from selection_ops.batching import is_out_of_memory
    from selection_ops.engine import GradientEngine

    threads = torch.get_num_threads()
    engine: GradientEngine | None = None
    try:
        if device == "cpu":
            torch.set_num_threads(1)
        engine = GradientEngine.from_spec(model.to(device), _plain(spec))
        return find_batch_tokens(engine, max_tokens=spec.encoding.max_tokens, layout=spec.layout)
    except Exception as error:
        if is_out_of_memory(error):
            raise InputError(f"the model does not fit into the memory of {device} ({error})") from error
        raise
    finally:
        engine = None
        torch.set_num_threads(threads)
        model.to("cpu")  # the workers need what it took
        if device != "cpu":
            torch.cuda.empty_cache()


def _refuse_changes(name: str, spec: FeatureSpec, options: ScoringOptions) -> None:
    from pipelines.preconditioning import metric_of

    held = spec.preconditioner
    fixed = {
        **plain(spec),
        **plain(spec.encoding),
        "metric": metric_of(spec),
        "precondition": held.form if held else "none",
    }
    for option, value in dataclasses.asdict(options).items():
        if (
            value is None
            or option in ("model", "revision", "optimizer_state")
            or (option == "batch_tokens" and value == 0)
        ):
            continue  # 0 asks for a search, whose result stands
        if fixed[option] != value:
            raise InputError(
                f"scoring {name!r} was declared with {option} = {fixed[option]!r}, not {value!r}; "
                "a scoring never changes. Give the new one another name with --scoring"
            )


def _location_url(run: Run, name: str) -> str:
    return run.path(f"{run.timings_folder('scoring', name)}/model.json")


def _remember(run: Run, name: str, location: ModelLocation) -> None:
    write_whole(_location_url(run, name), orjson.dumps(plain(location)))


def _location(run: Run, name: str, spec: FeatureSpec, options: ScoringOptions) -> ModelLocation:
    try:
        known = ModelLocation(**orjson.loads(read_bytes(_location_url(run, name))))
    except (FileNotFoundError, ValueError, TypeError) as error:
        if not options.model:
            raise InputError(
                f"where the model of scoring {name!r} lies is not known here: name it with --model"
            ) from error
        known = ModelLocation(model=options.model)
    if options.optimizer_state:
        if spec.preconditioner is None:
            raise InputError(f"scoring {name!r} was declared without --optimizer-state; a scoring never changes")
        known = dataclasses.replace(known, optimizer_state=options.optimizer_state)
    if options.model:
        from selection_ops.model import model_fingerprint

        found = model_fingerprint(options.model, revision=options.revision)
        if found != spec.model:
            raise InputError(
                f"scoring {name!r} was declared with a model of fingerprint {spec.model}; {options.model} has {found}. "
                "Features of two models cannot be mixed: use another --scoring"
            )
        known = dataclasses.replace(known, model=options.model, revision=options.revision)
    if options.model or options.optimizer_state:
        _remember(run, name, known)
    return known
