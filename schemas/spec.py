"""Specs: everything that changes results, and nothing else.

A spec is fingerprinted and stands in footers and manifests. What does not change results (runner, workers, devices,
paths, retries) is execution and never enters one.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from schemas.errors import InputError
from schemas.fingerprint import fingerprint, plain

LAYOUT_VERSION = 1
PROJECTION_VERSION = 1

CorpusFormat = Literal["auto", "parquet", "jsonl", "webdataset"]
AppendEos = Literal["never", "completion", "always"]
LossKind = Literal["sum", "mean"]
Attribute = Literal["blocks", "all", "adapters"]
Power = Literal["none", "P^1/2", "P"]
PreconditionForm = Literal["rank-one", "exact"]
DType = Literal["float32", "bfloat16", "float64"]
BatchLayout = Literal["padded", "packed"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusColumns:
    """Which columns of a corpus row hold what. Exactly one of text, prompt with completion, or messages is read."""

    text: str = "text"
    """Column of plain text; read when neither prompt/completion nor messages is set."""
    prompt: str = ""
    """Column of prompts; needs `completion`. Loss is taken on the completion alone."""
    completion: str = ""
    """Column of completions; needs `prompt`."""
    messages: str = ""
    """Column of chat messages (a list of {role, content}); loss is taken on what the assistant says."""
    id: str = ""
    """Column of your own identifiers; travels as `source_id`."""
    domain: str = ""
    """Column that names the domain of a row; used by reports and quotas."""
    keep: tuple[str, ...] = ()
    """Further columns that travel with the sample into features, selection and shards."""

    def __post_init__(self) -> None:
        _require(
            bool(self.prompt) == bool(self.completion), "prompt and completion columns are given together or not at all"
        )
        _require(not (self.prompt and self.messages), "choose prompt + completion or messages, not both")
        _require(
            bool(self.text or self.prompt or self.messages), "name a text column, prompt + completion, or messages"
        )

    @property
    def kind(self) -> Literal["text", "prompt", "messages"]:
        """Which of the three forms rows have."""
        return "messages" if self.messages else "prompt" if self.prompt else "text"

    def names(self) -> tuple[str, ...]:
        """Every column that is read, without repeats, in a fixed order."""
        body = {"text": (self.text,), "prompt": (self.prompt, self.completion), "messages": (self.messages,)}[self.kind]
        wanted = (*body, self.id, self.domain, *self.keep)
        return tuple(dict.fromkeys(name for name in wanted if name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanSpec:
    """How a corpus is cut into work units."""

    corpus: str
    """Name of the corpus; part of every sample id."""
    format: CorpusFormat = "auto"
    """File format; `auto` goes by the file name."""
    columns: CorpusColumns = CorpusColumns()
    """Which columns hold what."""
    unit_tokens: int = 65_536
    """Upper bound of estimated tokens in a work unit (a single row may exceed it)."""
    max_row_bytes: int = 64 << 20
    """A row of more bytes than this is rejected as `row_too_large`."""
    limit: int = 0
    """Plan only about this many first rows, for a try; 0 plans all."""

    def __post_init__(self) -> None:
        _require(bool(self.corpus), "a corpus needs a name")
        _require(
            self.format in get_args(CorpusFormat),
            f"unknown format {self.format!r}: {', '.join(get_args(CorpusFormat))}",
        )
        _require(self.unit_tokens > 0, f"unit_tokens must be positive, not {self.unit_tokens}")
        _require(self.max_row_bytes > 0, f"max_row_bytes must be positive, not {self.max_row_bytes}")
        _require(self.limit >= 0, f"limit must be 0 (all rows) or positive, not {self.limit}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodingSpec:
    """From row to samples to token ids and loss mask; the same in scoring and training."""

    max_tokens: int = 1024
    """Longest sample in tokens; longer documents are cut into windows."""
    min_tokens: int = 8
    """Shorter samples, and shorter tails of windowed documents, are rejected as `too_short`."""
    append_eos: AppendEos = "completion"
    """Where the end-of-sequence token is written behind the text and trained on: behind completions, always, never."""
    chat_template: str = ""
    """Jinja chat template for messages; empty uses the tokenizer's own."""

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 2, f"max_tokens must be at least 2, not {self.max_tokens}")
        _require(
            2 <= self.min_tokens <= self.max_tokens,
            f"min_tokens must lie in 2..{self.max_tokens}, not {self.min_tokens}",
        )
        _require(
            self.append_eos in get_args(AppendEos),
            f"unknown append_eos {self.append_eos!r}: {', '.join(get_args(AppendEos))}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputGroup:
    """Sites that read the same input and therefore share its projection."""

    name: str
    """The first of the sites, in model order."""
    sites: tuple[str, ...]
    """Names of the sites (module paths), in model order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallSite:
    """A parameter whose gradient enters the sketch as it is, without a projection."""

    name: str
    """Name of the parameter."""
    size: int
    """Numbers in it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreconditionerSpec:
    """Where the preconditioner P of a scoring comes from."""

    optimizer: str
    """Optimizer whose second moments it is made of: adamw or adafactor."""
    state: str
    """Fingerprint of the optimizer's state."""
    form: PreconditionForm = "rank-one"
    """Its rank-one fit, folded into the projections, or P elementwise."""

    def __post_init__(self) -> None:
        _require(self.form in get_args(PreconditionForm), f"unknown form {self.form!r} of a preconditioner")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """What a feature is a function of, besides the sample: one spec is one scoring."""

    model: str
    """Fingerprint of the weights and the configuration."""
    tokenizer: str
    """Fingerprint of the tokenizer files."""
    encoding: EncodingSpec
    """Encoding of samples."""
    attribute: Attribute = "blocks"
    """What is attributed: the linear maps of the blocks, everything that can be, or the adapters of a PEFT adapter folder."""
    input_groups: tuple[InputGroup, ...]
    """Matrices attributed, by input group, in model order."""
    small_sites: tuple[SmallSite, ...] = ()
    """Further parameters attributed, whose gradients are folded as they are, in model order."""
    proj_rank: int = 16
    """Rank of the projection on each side of a site."""
    k: int = 2048
    """Sketch dimension after the fold; 0 keeps every site's sketch side by side."""
    seed: int = 0
    """Seed of all signs."""
    projection_version: int = PROJECTION_VERSION
    """Version of the sign generator."""
    loss: LossKind = "sum"
    """Loss of a sample: sum over its loss tokens, or their mean."""
    dtype: DType = "float32"
    """Arithmetic of forward and backward; contractions over tokens are float32 at least."""
    attention: str = "eager"
    """Attention implementation of transformers."""
    batch_tokens: int = 4096
    """Bound of longest x count of a batch (packed: of its length), in tokens."""
    layout: BatchLayout = "padded"
    """How the samples of a batch lie: a row each, padded to the longest, or one behind another in one row."""
    precondition_candidate: Power = "none"
    """Power of the preconditioner that candidates' gradients are multiplied by."""
    precondition_target: Power = "none"
    """Power of the preconditioner that the target's gradients are multiplied by."""
    preconditioner: PreconditionerSpec | None = None
    """The preconditioner; none where neither side has one."""

    def __post_init__(self) -> None:
        _require(1 <= self.proj_rank <= 512, f"proj_rank must lie in 1..512, not {self.proj_rank}")
        _require(self.k >= 0, f"k must be 0 (no fold) or positive, not {self.k}")
        _require(self.batch_tokens > 0, f"batch_tokens must be positive, not {self.batch_tokens}")
        known = get_args(Attribute)
        _require(self.attribute in known, f"unknown attribute {self.attribute!r}: {', '.join(known)}")
        _require(self.loss in get_args(LossKind), f"unknown loss {self.loss!r}: {', '.join(get_args(LossKind))}")
        _require(self.dtype in get_args(DType), f"unknown dtype {self.dtype!r}: {', '.join(get_args(DType))}")
        layouts = get_args(BatchLayout)
        _require(self.layout in layouts, f"unknown layout {self.layout!r}: {', '.join(layouts)}")
        sides = {self.precondition_candidate, self.precondition_target}
        _require(sides <= set(get_args(Power)), f"unknown power of a preconditioner among {sorted(sides)}")
        _require(
            (sides != {"none"}) == (self.preconditioner is not None),
            "a preconditioner is given where, and only where, candidates or target are multiplied by it",
        )
        _require(
            self.projection_version == PROJECTION_VERSION,
            f"sketches of projection version {self.projection_version} cannot be made or mixed by this Lehr (version {PROJECTION_VERSION})",
        )

    @property
    def sketch_size(self) -> int:
        """Numbers per stored sketch."""
        matrices = sum(len(group.sites) for group in self.input_groups)
        return self.k or matrices * self.proj_rank**2 + sum(site.size for site in self.small_sites)

    @property
    def preconditioner_fingerprint(self) -> str:
        """Fingerprint of what the factors of a fitted preconditioner are a function of."""
        powers = [self.precondition_candidate, self.precondition_target]
        return fingerprint([plain(self.preconditioner), powers, plain(self.input_groups), plain(self.small_sites)])

    @property
    def fingerprint(self) -> str:
        """Fingerprint of this scoring."""
        return fingerprint(self)


def feature_spec_from_dict(record: dict[str, Any]) -> FeatureSpec:
    """Rebuild a `FeatureSpec` from the JSON of a manifest."""
    values = dict(record)
    values["encoding"] = EncodingSpec(**record["encoding"])
    values["input_groups"] = tuple(
        InputGroup(name=group["name"], sites=tuple(group["sites"])) for group in record["input_groups"]
    )
    values["small_sites"] = tuple(SmallSite(**site) for site in record["small_sites"])
    if record["preconditioner"] is not None:
        values["preconditioner"] = PreconditionerSpec(**record["preconditioner"])
    return FeatureSpec(**values)


def plan_spec_from_dict(record: dict[str, Any]) -> PlanSpec:
    """Rebuild a `PlanSpec` from the JSON of a manifest."""
    columns = dict(record["columns"])
    columns["keep"] = tuple(columns["keep"])
    return PlanSpec(**{**record, "columns": CorpusColumns(**columns)})
