"""What is compared: arms, each a stream and a policy, that share everything else."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

import tyro

from schemas.errors import InputError
from schemas.fingerprint import fingerprint, plain
from schemas.run import Run
from schemas.shards import StreamIndex
from selection_ops.online.options import PolicyOptions
from trainer.settings import TrainSettings

LEAST_SEEDS = 3
TRAINING_PREFIX = "cmp-"
Interval = Literal["student", "percentile", "bca"]

ARM_OPTIONS = (
    *(field.name for field in dataclasses.fields(PolicyOptions)),
    "candidates", "target_batch", "target_mode", "target_decay", "target_refresh", "targets", "warmup_select", "proj_rank", "mode",
    "precondition", "alignment", "gram", "batch_schedule", "selection_weights", "generation", "epochs", "order",
)  # fmt: skip
"""Options in which arms may differ, beside stream and policy: what is offered and chosen, not how the optimizer steps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedSettings(TrainSettings):
    """What all arms share: where they start, how long they train, at which learning rates."""

    name: str = "compare"
    """Name of the comparison."""
    token_budget: int = 0
    """Tokens that every training of every arm is trained on; the learning rate comes to its end there."""
    final_optimizer: bool = False
    """Keep the optimizer's moments of every final model too."""
    loggers: tuple[str, ...] = ("console",)
    """Where figures are shown while the trainings run: `console`, `tensorboard`, and those that installed packages bring."""
    stream: tyro.conf.Suppress[str] = ""
    policy: tyro.conf.Suppress[str] = "full"
    seed: tyro.conf.Suppress[int] = 0
    steps: tyro.conf.Suppress[int] = 0
    evaluate: tyro.conf.Suppress[Literal["both", "end", "never"]] = "end"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Arms, seeds, and the rule that judges."""

    arms: tuple[str, ...]
    control: str
    seeds: tuple[int, ...]
    interval: Interval
    level: float
    margin: float
    tolerance: float
    shared: SharedSettings

    def __post_init__(self) -> None:
        if len(set(self.seeds)) != len(self.seeds):
            raise InputError(f"seeds must differ: {' '.join(map(str, self.seeds))}")
        if len(self.seeds) < LEAST_SEEDS:
            raise InputError(f"{len(self.seeds)} seeds give no interval; take at least {LEAST_SEEDS}")
        if not 0 < self.level < 1:
            raise InputError(f"the level of an interval must lie between 0 and 1, not {self.level}")
        if self.margin < 0 or self.tolerance < 0:
            raise InputError(f"margin and tolerance are not negative: {self.margin}, {self.tolerance}")
        if not self.control:
            raise InputError("name the arm that the others are compared with, such as --control random:full")
        if not [arm for arm in self.arms if arm != self.control]:
            raise InputError("name at least one arm beside the control, such as --arm match:filter-then-weight")

    @property
    def labels(self) -> tuple[str, ...]:
        """Every arm once, the control first."""
        return tuple(dict.fromkeys((self.control, *self.arms)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm under one seed."""

    label: str
    seed: int
    settings: TrainSettings
    """Settings of its training, with name."""
    index: StreamIndex


def parse_arm(label: str, seed: int, shared: SharedSettings) -> TrainSettings:
    """Settings of `STREAM:POLICY[,OPTION=VALUE...]` under a seed; `{seed}` in the stream's name stands for it.

    Raises `InputError` for another form, and for an option in which arms must not differ.
    """
    stream, colon, rest = label.rpartition(":")
    policy, *changes = rest.split(",")
    if not colon or not stream or not policy:
        raise InputError(f"an arm is STREAM:POLICY, such as match:full, with options behind commas; {label!r} is not")
    values: dict[str, Any] = {field.name: getattr(shared, field.name) for field in dataclasses.fields(TrainSettings)}
    for change in changes:
        name, equals, text = change.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in ARM_OPTIONS:
            raise InputError(f"arm {label!r}: arms may differ in {', '.join(sorted(ARM_OPTIONS))}, not in {change!r}")
        values[name] = _parsed(label, name, text.strip(), values[name])
    values |= {"stream": stream.replace("{seed}", str(seed)), "policy": policy, "seed": seed, "name": ""}
    return TrainSettings(**values)


def _parsed(label: str, name: str, text: str, default: Any) -> Any:
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise InputError(f"arm {label!r}: {name} is true or false, not {text!r}")
        return text == "true"
    try:
        return type(default)(text)
    except ValueError as error:
        raise InputError(f"arm {label!r}: {name} is no {type(default).__name__}: {text!r}") from error


def training_name(settings: TrainSettings, index: StreamIndex, model: str) -> str:
    """Name of an arm's training: what a person looks for, and a hash of all that decides its result."""
    places = [settings.optimizer_state, settings.schedule_from, settings.reference_model]
    places += [settings.start_from, str(settings.from_optimizer), str(settings.rewarm)]
    digest = fingerprint([settings.spec(stream=index.fingerprint, model=model), places])
    place = re.sub(r"[^A-Za-z0-9_-]+", "-", settings.stream.rstrip("/").rsplit("/", 1)[-1])[:32]
    return f"{TRAINING_PREFIX}{place}-{settings.policy}-seed{settings.seed}-{digest[:10]}"


def open_arms(run: Run, settings: CompareSettings, shared: SharedSettings, model: str) -> list[Arm]:
    """Every arm under every seed, seeds outermost, so that a comparison cut short has whole pairs.

    Raises `InputError` where arms are the same, are judged on different held-out sets, or cannot fill the token budget.
    """
    from selection_ops.online.policies import make_policy
    from trainer.prepare import open_stream

    arms: list[Arm] = []
    for seed in settings.seeds:
        for label in settings.labels:
            chosen = parse_arm(label, seed, shared)
            make_policy(chosen.policy, chosen.policy_options())
            index = open_stream(run, chosen).index
            named = dataclasses.replace(chosen, name=training_name(chosen, index, model))
            arms.append(Arm(label=label, seed=seed, settings=named, index=index))
    _check(arms, shared)
    return arms


def _check(arms: list[Arm], shared: SharedSettings) -> None:
    by_name: dict[str, Arm] = {}
    first = arms[0]
    for arm in arms:
        other = by_name.setdefault(arm.settings.name, arm)
        if other is not arm:
            raise InputError(f"arms {other.label!r} and {arm.label!r} are the same training; leave one out")
        if not arm.index.evaluation:
            raise InputError(
                f"the stream of arm {arm.label!r} holds no held-out samples to judge by: describe the target with --eval, "
                "select for it and export again"
            )
        if _judged_on(arm.index) != _judged_on(first.index):
            raise InputError(
                f"arms {first.label!r} and {arm.label!r} would be judged on different held-out sets; export both for one target"
            )
        if not shared.token_budget:
            least = min(a.index.tokens * a.settings.epochs * _kept_share(a.settings) for a in arms)
            raise InputError(
                "arms are compared at equal trained tokens: give --token-budget. About "
                f"{int(0.9 * least):,} is what the shortest of these streams can fill"
            )
        if arm.index.tokens * arm.settings.epochs < shared.token_budget:
            raise InputError(
                f"arm {arm.label!r}: {arm.settings.epochs} passes over {arm.index.tokens:,} tokens cannot fill a budget of "
                f"{shared.token_budget:,}; lower --token-budget, raise --epochs, or export a larger selection"
            )


def _kept_share(settings: TrainSettings) -> float:
    return 1.0 if settings.policy == "full" else min(1.0, settings.n_keep / settings.candidates)


def _judged_on(index: StreamIndex) -> list[Any]:
    return [plain(index.encoding), [shard.sha256 for shard in index.evaluation]]
