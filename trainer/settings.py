"""Every option of a training, and which of them change its result."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import tyro

from schemas.errors import InputError
from selection_ops.online.options import PolicyOptions
from trainer.batch_schedule import BatchSchedule
from trainer.schedules import NORMS, Refined, Schedule

Order = Literal["shuffled", "ranked"]
Evaluate = Literal["both", "end", "never"]
Shard = Literal["none", "fsdp2"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train on a ranked stream."""

    # What is trained, and on what.

    stream: str = "match"
    """Name of the run's stream to train on, or path or URL of a folder that holds an index.json."""
    generation: int = 0
    """Generation of the stream; 0 takes the newest."""
    mix: tuple[str, ...] = ()
    """Further streams, each as NAME=SHARE or NAME=SHARE:EPOCHS with its share of the samples offered (a replay of general data:
    general=0.3:5); the rest comes from `stream`."""
    follow: bool = False
    """Take the next generation of the run's streams as soon as it is finished, between two steps; needs `steps` or `token_budget`."""
    follow_every: int = 10
    """Steps between two looks for the next generation."""
    model: str = ""
    """Folder, URL or hub id of the causal language model to start from, or of a PEFT LoRA adapter to go on with."""
    revision: str = ""
    """Revision of a hub model."""
    start_from: Annotated[str, tyro.conf.arg(aliases=["--from"])] = ""
    """Training of this run to branch off, `NAME` or `NAME@STEP`: its weights in that checkpoint take the place of `model`."""
    from_optimizer: bool = True
    """Start with the moments of that checkpoint, too."""
    from_cursor: bool = False
    """Go on in the stream where that training stood; it must be the same stream in the same order."""
    name: str = ""
    """Name of the training; by default the name of the stream and the policy."""

    lora: int = 0
    """Rank of a fresh LoRA adapter to train on the model, which stays frozen; 0 trains the model, or the adapter that `model` names."""
    lora_alpha: float = 16.0
    """Scale of a fresh adapter: its product is multiplied by alpha / rank."""
    lora_dropout: float = 0.0
    """Dropout of what goes into a fresh adapter."""
    lora_targets: tuple[str, ...] = ()
    """Endings of the names of the modules that a fresh adapter is put on; by default all linear maps but the head."""

    # Choosing at a step.

    policy: str = "filter-then-weight"
    """What a step does with its candidates: `full` (train on all), `random`; by what the model finds hard: `loss`, `high-perplexity`,
    `grad-norm`, `rho`; against the target: `match`, `tracin`, `grad-match`, `greats`, `opus`, `less-online`, `filter-then-weight`, and its
    ablations `filter-only`, `vanilla-filter`, `vanilla-filter-then-weight`, `unbounded-weights`, `hard-filter`, `hard-filter-omp`."""
    candidates: int = 16
    """Samples offered at a step."""
    n_keep: int = 8
    """Candidates trained on at a step, at most; `full` and the filters `threshold` and `none` are not bound by it."""
    target_batch: int = 4
    """Target samples a step compares candidates with, of each target where there are several; in a seeded order."""
    target_mode: str = "redrawn"
    """Which these are: `redrawn` (others at every step), `fixed` (the same in all), or `ema` (redrawn, their direction averaged with
    those of the steps before)."""
    target_decay: float = 0.9
    """Weight of the past in the average of `ema`, per direction taken."""
    target_refresh: int = 1
    """Steps that a direction of the target is kept for; above 1 the steps between save its gradient, and compare with an older one."""
    targets: str = "together"
    """What the domains of the target's samples are: `together` (one target), or targets of their own, of which a candidate's alignments
    are averaged (`mean`) or the largest counts (`max`)."""
    metric: str = "target"
    """What candidates and target are compared in, by what the optimizer's next step multiplies a gradient by, P: `target` (the target's
    gradient through P), `update` (both sides), `natural` (both through its root), `opus` (the candidates'), `sgd` (neither)."""
    warmup_select: int = 4
    """Gradients the optimizer's state must have seen before another metric than `sgd` acts; until then it is `sgd`."""
    filter: str = "greedy"
    """Which candidates survive before they are weighted: `greedy`, `omp` (greedy, refit by least squares after every addition), `boltzmann`
    (drawn by their greedy scores), `set-cosine`, `top-k` (alignment), `cosine`, `threshold` (all of positive alignment), `random`, `none`."""
    filter_score: str = "decrease"
    """Score of the filters `greedy`, `omp` and `boltzmann`: `decrease` (gain of one optimally weighted addition), `residual`, `normalised`."""
    filter_temperature: float = 0.9
    """Temperature of the filter `boltzmann`, in standard deviations of the scores."""
    granularity: str = "sample"
    """What of a candidate is compared, weighted and trained on: `sample` (the sum over its loss tokens), `token-mean` (their mean, so that
    length does not count; a weight is then one of the mean), `token-mask` (as `sample`; then tokens of the kept that point away from the
    target carry no loss; needs `alignment exact` and two passes)."""
    weights: str = "nnls"
    """Weights of the survivors: `nnls` (bounded least squares), `uniform`, `simplex` (least squares with the sum of the uniform ones),
    `unbounded` (no upper bound), `signed` (neither bound: what points away is unlearned)."""
    ridge: float = 1e-3
    """Ridge of weights and of the filter `omp`, as a share of the mean self-interaction."""
    weight_bound: float = 3.0
    """Upper bound of a weight of `nnls`, in units of the best uniform one."""
    reference_model: str = ""
    """Folder, URL or hub id of the model whose losses policy `rho` subtracts: one trained on held-out text like the target."""
    proj_rank: int = 16
    """Rank of the projection on each side of a site, for the sketches that a step compares."""
    mode: str = "auto"
    """How a step that compares forms its gradient: `two-pass` (forward and backward again over the kept), `one-pass` (from what the
    candidates' backward had, held in memory; less time where the model allows it), or `auto` (one pass where the model allows it and what it
    would hold is a quarter of the memory at most; printed, and kept when the training is resumed)."""
    preconditioner: str = "auto"
    """What P is: `auto` (the optimizer's own), `adamw` (from the second moment), `muon` (from the momentum), `scalar` (one number a
    parameter), `less` (Adam's step for one sample alone), `none` (1)."""
    precondition: str = "auto"
    """How gradients pass AdamW's P: `exact` (elementwise, on whole gradients), `rank-one` (a separable fit, made anew at every step, folded
    into the projections; less time), or `auto` (exact where it is the target's alone, else rank one)."""
    gram: str = "sketched"
    """Interactions of candidates: of their sketches, or exact, from whole gradients formed layer by layer from what one pass holds, of the
    `survivors` of the filter alone (for their weights) or of all candidates (`exact`)."""
    alignment: str = "sketched"
    """How a candidate is aligned with the target: by their sketches, or `exact` (token by token with the target's whole gradient; the time of
    a forward pass over the candidates)."""
    batch_schedule: str = ""
    """Sizes that change over the training, as `share:candidates/n_keep` points such as `0:16/8,0.5:32/16`; each holds from its share of
    the training on, and `candidates` and `n_keep` before the first."""
    oracle_every: int = 0
    """Steps between those at which the choice is tried out: the real drop of the target batch's loss after this step and after steps on
    random choices of as many candidates, from the same state. Changes nothing but the journal; costs a step per try. 0 never does."""
    oracle_draws: int = 8
    """Random choices that the oracle tries out."""
    selection_weights: bool = True
    """Multiply step weights by the stream's selection weights."""

    # Length and order.

    steps: int = 0
    """Optimizer steps; 0 trains to the end of the stream, or of the token budget."""
    token_budget: int = 0
    """Tokens to train on, at most; the last step keeps only what fits. 0 sets none."""
    epochs: int = 1
    """Times the stream is passed through."""
    order: Order = "shuffled"
    """Order of the stream: `shuffled` (a function of the seed) or `ranked` (best first)."""
    seed: int = 0
    """Seed of order, target batches, random choice, projections and dropout."""

    # Learning rate and optimizer.

    lr: float = 1e-5
    """Peak of the learning rate."""
    schedule: str = "linear"
    """Learning rate over the training: `linear` (to zero), `sqrt` (1 - sqrt of progress), `cosine`, `rex`, `exponential` (halves every
    `half_life`), `refined` (from the gradient norms of `schedule_from`), `constant`."""
    final_lr: float = 0.0
    """Learning rate at the end, as a share of the peak; a floor of `exponential`."""
    decay_from: float = 0.0
    """Share of the training after which the rate decays; until then it stays at the peak."""
    half_life: float = 0.25
    """Share of the decay in which `exponential` halves the rate."""
    schedule_from: str = ""
    """Finished training of this run whose gradient norms `refined` reads."""
    schedule_norm: str = "l1"
    """Norms that `refined` reads: `l1` (weights are inverse norms, for AdamW) or `l2` (inverse squares, as derived for SGD)."""
    schedule_smoothing: float = 0.1
    """Window of the median filter over those norms, as a share of their steps."""
    warmup_steps: int = 0
    """Steps over which the learning rate is raised, on top of the schedule."""
    warmup_from: float = 0.0
    """Share of the scheduled rate that the warm-up starts from."""
    rewarm: bool = False
    """Start the warm-up at the learning rate that the training of `start_from` had reached."""
    optimizer: str = "adamw"
    """`adamw`, or `muon`: torch's Muon over the matrices of the blocks, its steps scaled to those of AdamW, and AdamW over the rest."""
    weight_decay: float = 0.0
    """Decoupled weight decay of parameters with at least two dimensions."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.999
    """Decay of AdamW's second moment."""
    eps: float = 1e-8
    """Added to the root of AdamW's second moment."""
    clip: float = 1.0
    """Bound of the gradient's global norm; 0 never clips."""
    optimizer_state: str = ""
    """Optimizer state to start from: a checkpoint folder of Lehr, or an optimizer.safetensors."""

    ema_decay: float = 0.0
    """Decay of an exponential average of the weights over the steps, written and evaluated beside the final ones; 0 keeps none."""
    average_tail: float = 0.0
    """Share of the training, at its end, over whose steps a uniform average of the weights is taken, as that; 0 takes none."""

    # Evaluation and arithmetic.

    evaluate: Evaluate = "both"
    """When the loss on the held-out set is taken: `both` (before the first and after the last step), `end`, `never`."""
    eval_every: int = 0
    """Steps between further evaluations; 0 makes none."""
    dtype: str = ""
    """Arithmetic of forward and backward: float32, bfloat16 (autocast over float32 weights), float64; by default what the hardware is built for."""
    attention: str = ""
    """Attention implementation of transformers; by default the fastest on this hardware."""
    batch_tokens: int = 4096
    """Bound of longest x count of the batches that a step is computed in (of their tokens where packed); bounds memory, not the step."""
    activation_checkpointing: bool = False
    """Make the activations of the blocks again in backward instead of keeping them: less memory, a forward pass more over what is trained
    on, the same bits. Then a step takes two passes."""
    layout: str = "auto"
    """How the samples of a batch lie: `padded`, a row each, `packed`, one behind another in a row without padding, where the model keeps
    them apart, which is tried first, or `auto` (packed where attention skips what lies between samples: flash, flex)."""

    # Places, cadences and devices: mostly execution.

    checkpoint_every: int = 50
    """Steps between checkpoints; the journal is written at each."""
    keep_checkpoints: int = 2
    """Checkpoints kept besides the final one."""
    final_optimizer: bool = True
    """Write the optimizer's moments into the final checkpoint too; without, it is a third of the size, and no training can
    start from its moments."""
    merge: bool = False
    """Write the model with its trained adapter merged in beside the final checkpoint, too."""
    device: str = ""
    """Device to train on; by default an accelerator where there is one."""
    shard: Shard = "none"
    """Where parameters, gradients and moments lie in a training of several processes: `none` (all of them in every process), `fsdp2` (a
    shard of each in every process; for whole models under AdamW that one device does not hold, in two passes)."""
    process_timeout: int = 1800
    """Seconds that one of several processes waits for the others, at most; longer than a checkpoint takes to be written."""
    cache_bytes: int = 256 << 20
    """Memory for shards of the stream; a larger stream is read sample by sample."""
    cache_dir: str = ""
    """Folder on a local disk in which shards of the stream are kept, shared by any number of trainings; empty keeps none."""
    cache_disk_bytes: int = 16 << 30
    """Bound of that folder; the least recently used shards go first, and what does not fit is read past it."""
    prefetch: int = 64
    """Samples read ahead of the step, in a thread; 0 reads them when the step begins."""
    read_attempts: int = 4
    """Tries of a read of the stream that times out or whose connection breaks, with growing pauses."""
    read_limit_s: float = 120.0
    """Seconds that such a try may take, per 8 MiB; clients of object stores try again within it by themselves."""
    loggers: tuple[str, ...] = ()
    """Where figures are shown while the training runs: `console`, `tensorboard`, and those that installed packages bring. The journal
    is written whatever is named here."""
    peak_flops: float = 0.0
    """Floating point operations a second that the device can do, for the utilisation shown; 0 measures a product of matrices."""

    def __post_init__(self) -> None:
        self.policy_options()
        for field, least in _AT_LEAST.items():
            if getattr(self, field) < least:
                raise InputError(f"{field} must be at least {least}, not {getattr(self, field)}")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay must lie in [0, 1), not {self.ema_decay}")
        if not 0 <= self.average_tail <= 1:
            raise InputError(f"average_tail is a share of the training in [0, 1], not {self.average_tail}")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"lora_dropout must lie in [0, 1), not {self.lora_dropout}")
        if self.lora_alpha <= 0:
            raise InputError(f"lora_alpha must be positive, not {self.lora_alpha}")
        for field in ("beta1", "beta2"):
            if not 0 <= getattr(self, field) < 1:
                raise InputError(f"{field} must lie in [0, 1), not {getattr(self, field)}")
        self.learning_rates()
        self.sizes()
        if bool(self.schedule_from) != (self.schedule == "refined"):
            raise InputError("schedule refined and schedule_from belong together: give both or neither")
        if self.from_cursor and not self.start_from:
            raise InputError("from_cursor goes on where another training stood: name that one with start_from")
        if self.rewarm and not (self.start_from and self.warmup_steps and self.lr):
            raise InputError(
                "rewarm rises from the rate of another training: give start_from, warmup_steps and a positive lr"
            )
        if self.rewarm and self.warmup_from:
            raise InputError("give rewarm or warmup_from, not both: each says where the warm-up starts")
        if self.schedule_norm not in NORMS:
            raise InputError(f"unknown schedule_norm {self.schedule_norm!r}: choose one of {', '.join(NORMS)}")
        if not 0 <= self.schedule_smoothing <= 1:
            raise InputError(f"schedule_smoothing must lie in [0, 1], not {self.schedule_smoothing}")
        if self.layout not in ("auto", "padded", "packed"):
            raise InputError(f"unknown layout {self.layout!r}: choose one of auto, padded, packed")
        if self.target_mode not in ("redrawn", "fixed", "ema"):
            raise InputError(f"unknown value {self.target_mode!r} of target_mode: choose one of redrawn, fixed, ema")
        if not 0 < self.target_decay < 1:
            raise InputError(f"target_decay must lie in (0, 1), not {self.target_decay}")
        if self.targets not in ("together", "mean", "max"):
            raise InputError(f"unknown value {self.targets!r} of targets: choose one of together, mean, max")
        if self.follow and not (self.steps or self.token_budget):
            raise InputError(
                "give steps or token_budget with follow: how long a stream that goes on is trained on must be known"
            )
        if self.follow and self.from_cursor:
            raise InputError(
                "give follow or from_cursor, not both: a cursor of another training holds in the generation it was taken in"
            )
        if self.follow and "/" in self.stream:
            raise InputError(
                f"follow needs a stream of the run, by its name: what comes after {self.stream} is not known"
            )
        if self.steps and self.token_budget:
            raise InputError("give steps or token_budget, not both: each says when the training ends")
        if self.mode not in ("two-pass", "one-pass", "auto"):
            raise InputError(f"unknown mode {self.mode!r}: choose one of two-pass, one-pass, auto")
        for field, known in _KNOWN.items():
            if getattr(self, field) not in known:
                raise InputError(f"unknown value {getattr(self, field)!r} of {field}: choose one of {', '.join(known)}")
        if self.granularity == "token-mask" and self.mode == "one-pass":
            raise InputError(
                "granularity token-mask and mode one-pass exclude each other: without a token's loss every earlier position has another "
                "output gradient than the one held. Use mode two-pass or auto"
            )
        if self.granularity == "token-mask" and self.alignment != "exact":
            raise InputError("granularity token-mask needs the scores of tokens: use alignment exact")
        if self.shard not in ("none", "fsdp2"):
            raise InputError(f"unknown value {self.shard!r} of shard: choose one of none, fsdp2")
        if self.shard == "fsdp2" and self.mode == "one-pass":
            raise InputError("shard fsdp2 and mode one-pass exclude each other: use mode two-pass, or shard none")
        if self.shard == "fsdp2" and self.optimizer == "muon":
            raise InputError("Muon steps whole matrices, and shard fsdp2 has none: use optimizer adamw, or shard none")
        if self.shard == "fsdp2" and (self.ema_decay or self.average_tail):
            raise InputError(
                "shard fsdp2 keeps no averages of the weights: leave ema_decay and average_tail out, or use shard none"
            )
        if self.order not in ("shuffled", "ranked"):
            raise InputError(f"unknown order {self.order!r}: choose one of shuffled, ranked")
        if self.evaluate not in ("both", "end", "never"):
            raise InputError(f"unknown value {self.evaluate!r} of evaluate: choose one of both, end, never")
        if self.dtype not in ("", "float32", "bfloat16", "float64"):
            raise InputError(f"unknown dtype {self.dtype!r}: choose one of float32, bfloat16, float64")

    def policy_options(self) -> PolicyOptions:
        """The options that the policy reads. Raises `InputError` for an impossible value."""
        return PolicyOptions(
            n_keep=self.n_keep,
            metric=self.metric,
            preconditioner=self.preconditioner,
            filter=self.filter,
            filter_temperature=self.filter_temperature,
            filter_score=self.filter_score,
            weights=self.weights,
            ridge=self.ridge,
            weight_bound=self.weight_bound,
            granularity=self.granularity,
        )

    def sizes(self) -> BatchSchedule:
        """Candidates offered and kept over the training. Raises `InputError` for a schedule that is none."""
        return BatchSchedule.parse(self.batch_schedule, candidates=self.candidates, n_keep=self.n_keep)

    def learning_rates(self, *, refined: Refined | None = None) -> Schedule:
        """The schedule that the options describe. Raises `InputError` for an impossible value."""
        return Schedule(
            name=self.schedule,
            peak=self.lr,
            final=self.final_lr,
            decay_from=self.decay_from,
            half_life=self.half_life,
            warmup_steps=self.warmup_steps,
            warmup_from=self.warmup_from,
            refined=refined,
        )

    def spec(self, **resolved: Any) -> dict[str, Any]:
        """What changes the result: every option but places, devices and cadences, with fingerprints for what was named.

        `resolved` replaces or adds: fingerprints of stream, model and optimizer state, the dtype and attention in use.
        """
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in EXECUTION}
        return {**values, **resolved}


EXECUTION = frozenset(
    {
        "name",
        "stream",
        "generation",
        "model",
        "revision",
        "optimizer_state",
        "schedule_from",
        "start_from",
        "from_optimizer",
        "rewarm",
        "reference_model",
        "checkpoint_every",
        "keep_checkpoints",
        "final_optimizer",
        "merge",
        "device",
        "shard",
        "activation_checkpointing",
        "process_timeout",
        "cache_bytes",
        "cache_dir",
        "cache_disk_bytes",
        "prefetch",
        "read_attempts",
        "read_limit_s",
        "loggers",
        "peak_flops",
    }
)
"""Options that do not change results: places (their content enters by fingerprint), cadences, devices, caches."""

_KNOWN = {
    "precondition": ("auto", "exact", "rank-one"),
    "preconditioner": ("auto", "adamw", "muon", "scalar", "none", "less"),
    "alignment": ("sketched", "exact"),
    "gram": ("sketched", "survivors", "exact"),
    "optimizer": ("adamw", "muon"),
}

_AT_LEAST = {
    "lora": 0,
    "candidates": 1,
    "target_batch": 1,
    "target_refresh": 1,
    "warmup_select": 1,
    "proj_rank": 1,
    "oracle_every": 0,
    "oracle_draws": 1,
    "steps": 0,
    "token_budget": 0,
    "epochs": 1,
    "generation": 0,
    "follow_every": 1,
    "lr": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
    "eps": 0,
    "clip": 0,
    "eval_every": 0,
    "batch_tokens": 1,
    "checkpoint_every": 1,
    "keep_checkpoints": 1,
    "process_timeout": 1,
    "cache_bytes": 0,
    "cache_disk_bytes": 0,
    "prefetch": 0,
    "read_attempts": 1,
    "peak_flops": 0,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoupSettings:
    """How to average trainings."""

    out: str = ""
    """Folder or URL to write the averaged model to; there must be nothing yet."""
    stream: str = ""
    """Folder or URL of the stream whose held-out set the losses are taken on; by default the stream of the first training."""
    dtype: str = ""
    """Arithmetic of the evaluation: float32, bfloat16, float64; by default what the hardware is built for."""
    device: str = ""
    """Device to evaluate on; by default an accelerator where there is one."""
    batch_tokens: int = 4096
    """Bound of longest x count of the batches of the evaluation."""
