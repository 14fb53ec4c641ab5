"""Options of the pipelines, apart from Beam and torch so that `--help` is instant."""

from __future__ import annotations

import dataclasses
from typing import Literal

from schemas.errors import InputError
from schemas.spec import AppendEos, Attribute, BatchLayout, CorpusColumns, DType, LossKind, PreconditionForm

Keep = Literal["all", "scalars"]

_ENGINES = {
    "local": "local",
    "worker-pool": "worker-pool",
    "dask": "dask",
    "daskrunner": "dask",
    "dataflow": "dataflow",
    "dataflowrunner": "dataflow",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """Where a pipeline runs. Changes no result, so it stands in no spec."""

    runner: str = "local"
    """`local`, `worker-pool`, `dask`, `dataflow`, or the name of any other Beam runner (FlinkRunner, SparkRunner, a class path);
    docs/engines.md says what each needs."""
    workers: int = 0
    """Worker processes, local or of a worker pool; 0 starts one per visible accelerator, or one per processor core as far as memory allows."""
    beam_options: tuple[str, ...] = ()
    """Further options for Beam, each as `--name=value`."""
    accelerator: str = ""
    """Dataflow: accelerator of the machines that run the model, as type:nvidia-l4;count:1;install-nvidia-driver."""
    min_ram: str = ""
    """Dataflow: least memory of the machines that run the model, as 32GB."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise InputError(f"workers must be 0 (choose) or positive, not {self.workers}")
        for option in self.beam_options:
            if not option.startswith("--"):
                raise InputError(f"Beam option {option!r} must look like --name=value")
        for name in ("accelerator", "min_ram"):
            if getattr(self, name) and self.engine != "dataflow":
                raise InputError(
                    f"--{name.replace('_', '-')} is for --runner dataflow; other workers use what their machine has"
                )

    @property
    def engine(self) -> str:
        """One name for each way to spell a runner that lehr knows by itself, else the runner as it was given."""
        return _ENGINES.get(self.runner.rpartition(".")[2].lower(), self.runner)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """What makes a scoring. Options left out take the value of the scoring that already exists, or the default."""

    model: str | None = None
    """Causal language model: a local folder, a .gguf file, an fsspec URL, or a hub id; the folder may be a PEFT adapter's."""
    revision: str | None = None
    """Revision of a hub id."""
    max_tokens: int | None = None
    """Longest sample in tokens; longer documents are cut into windows (default 1024)."""
    min_tokens: int | None = None
    """Shorter samples and tails are rejected as too_short (default 8)."""
    append_eos: AppendEos | None = None
    """Where an end-of-sequence token is appended and trained on (default: behind completions)."""
    chat_template: str | None = None
    """Jinja chat template for messages (default: the tokenizer's own)."""
    attribute: Attribute | None = None
    """Parameters whose gradients are taken: `blocks` (the linear maps of the blocks, experts included), `all` (also embedding, head,
    norms, biases and small parameters; slower) or `adapters` (what a PEFT adapter folder adds to its base model) (default adapters for such a
    folder, else blocks). `lehr model-report` shows what each covers."""
    proj_rank: int | None = None
    """Rank of the projection on each side of a linear map (default 16)."""
    k: int | None = None
    """Sketch dimension; 0 keeps all numbers (default 2048)."""
    seed: int | None = None
    """Seed of the projections (default 0)."""
    loss: LossKind | None = None
    """Loss of a sample: sum over its loss tokens, or their mean (default sum)."""
    dtype: DType | None = None
    """Arithmetic (default: bfloat16 where the hardware multiplies it fast, else float32)."""
    optimizer_state: str | None = None
    """Optimizer state of the checkpoint, for metrics that see gradients as the optimizer's next step would use them: a checkpoint folder
    of Lehr or transformers, an optimizer.pt, or safetensors by `<parameter>:exp_avg_sq`. AdamW and Adafactor."""
    metric: Literal["sgd", "natural", "target", "update", "opus"] | None = None
    """What gradients are compared in: `sgd` (as they are), or multiplied by powers of the optimizer's preconditioner P, candidates and
    target: `natural` P^1/2 both, `target` P the target only, `update` P both, `opus` P the candidates only (default: natural with an
    optimizer state, else sgd)."""
    precondition: PreconditionForm | None = None
    """`rank-one` folds the best separable fit of P into the projections, at no cost; `exact` multiplies every gradient elementwise, in
    half as much time again (default rank-one)."""
    attention: str | None = None
    """Attention implementation (default: the fastest one for the hardware)."""
    batch_tokens: int | None = None
    """Longest x count of a batch, in tokens. 0 searches for the number: doubled until that is hardly faster, or memory ends (default: search
    on an accelerator; on CPU 1024 in bfloat16, else 512)."""
    layout: BatchLayout | None = None
    """How the samples of a batch lie: `padded`, a row each, or `packed`, one behind another in one row, where the model keeps them
    apart, which is tried first (default padded)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """Where the target's samples are and how they are described."""

    data: str
    """Samples of the target: a file, folder or glob of Parquet, JSONL or WebDataset, local or any fsspec URL."""
    eval: str = ""
    """Held-out samples of the same kind, for evaluation only; they must not overlap the target's."""
    columns: CorpusColumns = CorpusColumns()
    """Which columns hold what."""
    contrast: Literal["none", "swap"] = "none"
    """`swap` also scores the target with its completions exchanged between rows, for `lehr select --contrast swap`."""
    energy: float = 0.945
    """Share of the trace at which the elbow between stiff and flat directions is put."""
    curvature: Literal["centred", "empirical", "gauss-newton"] = "centred"
    """Fisher of the target's gradients without or with their mean, or the Gauss-Newton matrix at labels sampled from the model."""
    draws: int = 4
    """Times that the labels of every target sample are sampled, for the curvature gauss-newton."""
    damping: float = 1.0
    """Damping of (C + delta I)^-1, as a multiple of the mean eigenvalue."""

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise InputError(f"draws must be at least 1, not {self.draws}")
        if not self.damping > 0:
            raise InputError(f"damping must be a positive multiple of the mean eigenvalue, not {self.damping}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """What of a scored run is recomputed."""

    rows: int = 32
    """Scored rows to recompute, drawn over all work units; all of them where there are fewer."""
    target: str = ""
    """Target whose samples are recomputed beside the rows; left out, the only one there is, or none."""
    target_rows: int = 16
    """Target samples to recompute, drawn likewise; 0 takes all."""
    selection: str = ""
    """Draw half of the rows from what this selection chose and half from what it left, and repeat its choice among them."""
    seed: int = 0
    """Which rows are drawn; another seed checks others."""
    memory_gb: float = 4.0
    """Memory for exact gradients; with less, they are made in more passes, each of which runs the model over every row."""

    def __post_init__(self) -> None:
        if self.rows < 2:
            raise InputError(f"rows must be at least 2, so that there is an inner product, not {self.rows}")
        if self.target_rows < 0:
            raise InputError(f"target_rows must be 0 (all) or positive, not {self.target_rows}")
        if not self.memory_gb > 0:
            raise InputError(f"memory_gb must be positive, not {self.memory_gb}")
