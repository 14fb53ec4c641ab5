"""Everything a training needs before its first step, checked in order of cost: names, stream, spec, then the model."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch

from schemas.declared import read_declared
from schemas.errors import InputError
from schemas.fingerprint import plain
from schemas.manifest import Manifest
from schemas.run import Run, check_name
from schemas.shards import StreamIndex
from schemas.spec import BatchLayout, EncodingSpec
from schemas.storage import exists
from selection_ops.encoding import Encoded, Encoder
from selection_ops.model import LoadedModel, choose_attention, default_dtype, load_model, quiet, tokenizer_fingerprint
from selection_ops.online.filters import UNBOUND
from selection_ops.online.options import PolicyOptions
from selection_ops.online.policies import Policy, make_policy, resolve_options
from selection_ops.optimizer_state import read_optimizer
from trainer.batch_schedule import BatchSchedule
from trainer.candidate import Candidate
from trainer.checkpoints import load_optimizer_tensors
from trainer.earlier import refined_schedule
from trainer.follow import Record, read_record
from trainer.lengthen import declare_training
from trainer.mixing import MixedStream
from trainer.modes import Mode, choose_layout, choose_mode
from trainer.opening import Stream, open_stream, parts_of
from trainer.optimizers import AnyOptimizer, adamw, muon
from trainer.parallel import OneProcess, local_device
from trainer.parent import find_parent, go_on, inherit
from trainer.schedules import Schedule
from trainer.settings import TrainSettings
from trainer.sharding import ShardedModel, WholeModel
from trainer.stream import Offered, read_beside
from trainer.trainee import Trainee, load_trainee

log = logging.getLogger(__name__)


@dataclasses.dataclass(kw_only=True)
class Prepared:
    """A training ready to start or to be resumed."""

    name: str
    spec: dict[str, Any]
    stream: Stream
    trainee: Trainee
    encoder: Encoder
    optimizer: AnyOptimizer
    layout: WholeModel
    target: list[tuple[str, Encoded]]
    """Target samples, each with its domain."""
    evaluation: list[Encoded]
    dtype: str
    mode: Mode
    schedule: Schedule
    sizes: BatchSchedule
    parent: str
    """Checkpoint of another training that this one started from, if it did."""
    batch_layout: BatchLayout
    """How the samples of a batch lie."""
    choices: dict[str, str]
    """What was decided and why, in words."""
    reference: Any
    """The model whose losses a policy compares with, None where there is none."""
    total_steps: int
    """Steps that `steps` and the length of the stream allow; not read where a token budget ends the training."""

    @property
    def model(self) -> Any:
        """The model that is trained."""
        return self.trainee.model


def prepare(run: Run, settings: TrainSettings, processes: OneProcess | None = None) -> Prepared | Manifest:
    """A training ready to go, or the manifest of the training of that name and spec where it has already finished.

    Every process prepares for itself; process 0 declares the spec first, and the others compare theirs with it.
    Raises `InputError` for a stream cut with another tokenizer, a name that stands for another spec, a target that a
    policy needs and the stream lacks, an unusable model or optimizer state.
    """
    resolved = resolve_options(settings.policy, settings.policy_options())
    processes = processes or OneProcess()
    policy = make_policy(settings.policy, settings.policy_options())
    parent = find_parent(run, settings.start_from) if settings.start_from else None
    if parent is not None:
        settings = inherit(run, settings, parent)
    if not settings.model:
        raise InputError("name the model to train with --model, or a training to start from with --from")
    branch = f"-from-{parent.training}-{parent.state.step}" if parent is not None else ""

    def called(stream: str) -> str:
        return check_name("training", settings.name or f"{stream}-{settings.policy}{branch}")

    record = read_record(run, called(settings.stream)) if settings.follow else None
    stream = open_stream(run, settings, record.standing(record.looked) if record else None)
    index = stream.index
    name = called(index.stream)
    if parent is not None and settings.from_cursor:
        go_on(stream, parent)
    if policy.needs_sketches and not index.target:
        raise InputError(
            f"policy {settings.policy} compares candidates with target samples, and the stream at {stream.url} holds none: "
            "export a selection made for a target, or train with a policy that compares nothing, such as --policy full or random"
        )
    beside = read_beside(stream.url, index, "target")
    domains = sorted({item.sample.domain for item in beside})
    if settings.targets != "together" and policy.needs_sketches and len(domains) < 2:
        raise InputError(
            f"targets {settings.targets} compares with several targets, and the samples of the stream at {stream.url} are of one domain "
            f"({domains[0] or 'without a name'}): name domains when the target is scored, or use targets together"
        )
    if settings.oracle_every and not index.target:
        raise InputError(
            f"the oracle measures the loss of target samples, and the stream at {stream.url} holds none: export a selection made for a "
            "target, or leave --oracle-every out"
        )
    if policy.needs_reference_losses and not settings.reference_model:
        raise InputError(
            f"policy {settings.policy} subtracts the losses of a reference model, and none is named: train one on held-out text like "
            "the target and name it with --reference-model, or use another policy"
        )
    revision = settings.revision or None
    found = tokenizer_fingerprint(settings.model, revision=revision)
    if found != index.tokenizer:
        raise InputError(
            f"the stream at {stream.url} was cut with a tokenizer of fingerprint {index.tokenizer}; that of {settings.model} has "
            f"{found}. Lengths and budgets would not hold: train the model the corpus was scored for, or export again for this one"
        )
    sizes = settings.sizes()
    device = local_device(settings.device)
    dtype = settings.dtype or default_dtype(device)
    attention = settings.attention or choose_attention(settings.model, device, dtype, revision=revision)
    trainee = load_trainee(settings, dtype=dtype, attention=attention, device=device)
    model = trainee.model
    encoder = Encoder(trainee.loaded.tokenizer, EncodingSpec(**index.encoding))
    mode: Mode = "two-pass"
    why = ""
    if settings.activation_checkpointing:
        enable: Any = trainee.loaded.model.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    place = run.path(f"{run.training_folder(name)}/spec.json")
    if policy.needs_sketches or policy.needs_norms:
        longest = encoder.spec.max_tokens

        def decide() -> tuple[Mode, str]:
            declared = read_declared(place, "training").get("mode") if exists(place) else None
            if settings.shard != "none" and declared == "one-pass":
                raise InputError(f"training {name!r} began in one pass, which shards cannot go on with: use shard none")
            asked = settings.mode if settings.shard == "none" else "two-pass"
            begun = asked == "auto" and bool(declared)
            if begun:  # decided when the training began, perhaps on a machine with other memory
                asked = declared or asked
            mode, why = choose_mode(
                asked,
                model,
                dtype,
                longest=longest,
                candidates=sizes.largest,
                granularity=settings.granularity,
            )
            return mode, why.replace("asked for", "as the training began") if begun else why

        mode, why = processes.decide(decide)
    moments = read_optimizer(settings.optimizer_state, trainee.loaded.model) if settings.optimizer_state else None
    refined, norms = refined_schedule(run, settings) if settings.schedule_from else (None, "")
    reference = _load_reference(settings, policy, index.tokenizer, dtype, device)
    batch_layout, why_laid = choose_layout(settings.layout, model, attention, mode)
    if reference is not None and batch_layout == "packed":
        batch_layout, why_laid = choose_layout(settings.layout, reference.model, attention, "two-pass")
    spec: dict[str, Any] = plain(
        settings.spec(
            **dataclasses.asdict(resolved),
            reference_model=reference.model_fingerprint if reference is not None else "",
            **_streams(stream, record),
            model=trainee.fingerprint,
            optimizer_state=moments.fingerprint if moments is not None else "",
            dtype=dtype,
            attention=attention,
            mode=mode,
            layout=batch_layout,
            schedule_from=norms,
            start_from=parent.fingerprint if parent is not None else "",
        )
    )
    left = stream.end - stream.position

    def allowed(asked: int) -> int:
        return asked if settings.follow else sizes.steps(left, asked)

    def declared() -> None:
        declare_training(run, name, spec, allowed)

    processes.decide(declared)
    declared()
    manifest_path = run.path(run.manifest_path("train", name))
    if exists(manifest_path):
        return run.manifest("train", name)
    layout = WholeModel(model, processes)
    if settings.shard == "fsdp2":
        layout = ShardedModel(model, processes, sketches=bool(why))
    optimizer = make_optimizer(model, settings)
    if moments is not None:
        load_optimizer_tensors(model, optimizer, moments.tensors, settings.optimizer_state)
    total_steps = allowed(settings.steps)
    if total_steps < settings.steps:
        log.warning(
            "the stream holds %d samples from here on: %d steps of %s candidates, not %d; the schedule ends there. Raise epochs for more",
            left,
            total_steps,
            settings.batch_schedule or settings.candidates,
            settings.steps,
        )
    return Prepared(
        name=name,
        spec=spec,
        stream=stream,
        trainee=trainee,
        encoder=encoder,
        optimizer=optimizer,
        layout=layout,
        batch_layout=batch_layout,
        target=[(item.sample.domain, encode(encoder, item)) for item in beside],
        evaluation=[encode(encoder, item) for item in read_beside(stream.url, index, "evaluation")],
        dtype=dtype,
        mode=mode,
        schedule=settings.learning_rates(refined=refined),
        choices=_choices(
            settings,
            resolved,
            policy,
            index,
            mode if why else "plain",
            why,
            f"{dtype} on {device}, {attention} attention",
        )
        | {"batches": f"{batch_layout} ({why_laid})"},
        reference=reference.model if reference is not None else None,
        sizes=sizes,
        parent=parent.name if parent is not None else "",
        total_steps=total_steps,
    )


def _streams(stream: Stream, record: Record | None) -> dict[str, Any]:
    """What the spec says of the streams: their content, at the generation that the training began with, and shares and epochs of a mix."""
    begun = {
        name: record.begun_with(name) if record else part.index.fingerprint for name, part in parts_of(stream).items()
    }
    mixed = []
    if isinstance(stream, MixedStream):
        for name, part in list(stream.streams.items())[1:]:
            mixed.append({"stream": begun[name], "share": stream.shares[name], "epochs": part.epochs})
    return {"stream": next(iter(begun.values())), "mix": mixed}


def _choices(
    settings: TrainSettings,
    resolved: PolicyOptions,
    policy: Policy,
    index: StreamIndex,
    mode: str,
    why: str,
    arithmetic: str,
) -> dict[str, str]:
    """What was decided and why, for people."""
    offered = f"of {settings.candidates} offered at a step"
    keeps = f"at most {min(settings.n_keep, settings.candidates)} {offered}"
    if settings.policy == "full" or (policy.needs_sketches and resolved.filter in UNBOUND):
        keeps = f"all {'that are aligned ' if resolved.filter == 'threshold' else ''}{offered}"
    compares = ""
    if policy.needs_sketches:
        compares = f", compared in metric {resolved.metric} with {settings.target_batch} target samples"
    return {
        "stream": f"{index.stream} generation {index.generation}, {index.rows:,} samples, {index.tokens:,} tokens",
        "policy": f"{settings.policy}, keeps {keeps}{compares}",
        "mode": f"{mode} ({why or 'the policy compares nothing'})",
        "arithmetic": arithmetic,
    }


def _load_reference(
    settings: TrainSettings, policy: Policy, tokenizer: str, dtype: str, device: str
) -> LoadedModel | None:
    """The reference model where the policy compares with one. Raises `InputError` where it has another tokenizer."""
    where = settings.reference_model
    if not policy.needs_reference_losses:
        return None
    found = tokenizer_fingerprint(where)
    if found != tokenizer:
        raise InputError(
            f"the reference model {where} has a tokenizer of fingerprint {found}, the stream was cut with {tokenizer}: losses per token "
            "could not be compared. Name one with the same tokenizer"
        )
    with quiet():
        return load_model(
            where,
            dtype="float64" if dtype == "float64" else "float32",
            attention=settings.attention or choose_attention(where, device, dtype),
            device=device,
        )


def make_optimizer(model: torch.nn.Module, settings: TrainSettings) -> AnyOptimizer:
    """The optimizer asked for, over every parameter that is trained; vectors (norms, biases) are not decayed."""
    make = muon if settings.optimizer == "muon" else adamw
    return make(
        model,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        beta1=settings.beta1,
        beta2=settings.beta2,
        eps=settings.eps,
    )


def encode(encoder: Encoder, item: Any) -> Encoded:
    """A ranked sample as token ids and loss mask."""
    return encoder.encode(item.sample.text, item.sample.loss_spans)


def candidate(encoder: Encoder, offered: Offered) -> Candidate:
    """An offered sample as a step takes it."""
    ranked = offered.ranked
    return Candidate(
        sample_id=ranked.sample.sample_id,
        encoded=encode(encoder, ranked),
        position=offered.position,
        rank=ranked.rank,
        selection_weight=ranked.selection_weight,
        stream=offered.stream,
        generation=offered.generation,
    )
