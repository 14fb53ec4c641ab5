"""A training from start to manifest: offer, step, journal, evaluate, checkpoint; resume from the newest whole checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import orjson
import torch

from schemas.errors import CorruptFile, InputError
from schemas.fingerprint import fingerprint
from schemas.manifest import Manifest, write_manifest
from schemas.parquet import Part
from schemas.run import Run
from schemas.storage import join, read_bytes, sha256, sweep_temporary
from schemas.timings import HeartbeatWriter
from selection_ops.encoding import Encoded
from selection_ops.flops import maps_size, model_size
from selection_ops.optimizer_state import read_optimizer
from trainer.averages import Averages
from trainer.batches import StepBatches
from trainer.candidate import Candidate, StepResult
from trainer.checkpoints import (
    MANIFEST_FILE,
    TrainerState,
    latest_checkpoint,
    load_optimizer_tensors,
    load_weights,
    optimizer_tensors,
    prune_checkpoints,
    read_state,
    read_target_state,
    write_checkpoint,
)
from trainer.evaluation import evaluate
from trainer.followed import Followed, stream_fingerprints
from trainer.journal import Journal, decision_rows, step_row
from trainer.lengthen import identity
from trainer.loggers import Begun, LoggerType, Progress, get_logger
from trainer.measures import StepFlops, measured_peak, peak_memory, step_flops
from trainer.parallel import OneProcess, join_processes, local_device
from trainer.prepare import Prepared, candidate, prepare
from trainer.settings import TrainSettings
from trainer.step import OnlineStep
from trainer.stream import shuffled_ranks
from trainer.target_memory import Targets, all_samples

log = logging.getLogger(__name__)


def train(
    run: Run,
    settings: TrainSettings,
    progress: Callable[[Progress], None] = lambda event: None,
    *,
    attempt: str = "",
    console: LoggerType | None = None,
) -> dict[str, Any]:
    """Train as `settings` say, or go on with the training of that name; returns the manifest's summary.

    `progress` is told of every step, as the loggers of the settings are; `console` takes the place of the one called console.
    Under torchrun all of its processes train together, and process 0 tells. Raises `InputError` where a training of the same name was
    made with another spec, naming what differs, and for an unknown logger; `LehrError` where another process is gone.
    """
    chosen = [console if console and name == "console" else get_logger(name) for name in settings.loggers]
    processes = join_processes(local_device(settings.device), settings.process_timeout)
    with processes.together():
        ready = prepare(run, settings, processes)
        if isinstance(ready, Manifest):
            summary = ready.summary
        else:
            training = _Training(run, settings, ready, attempt, processes)
            summary = _to_the_end(training, chosen if processes.leads else [], progress)
    processes.close()
    return summary


def _to_the_end(
    training: _Training, chosen: Sequence[LoggerType], progress: Callable[[Progress], None]
) -> dict[str, Any]:
    training.restore()
    with contextlib.ExitStack() as open_ones:
        open_ones.callback(lambda: training.ready.stream.close())
        loggers = []
        for kind in chosen:
            loggers.append(kind(training.begun()))
            open_ones.callback(loggers[-1].close)
        while not training.state.ended:
            event = training.advance()
            if event is not None and training.processes.leads:
                for told in (*(logger.step for logger in loggers), progress):
                    told(event)
    return training.finish()


class _Training:
    """One training in progress: everything between two checkpoints lives here."""

    def __init__(self, run: Run, settings: TrainSettings, ready: Prepared, attempt: str, processes: OneProcess) -> None:
        self.run, self.settings, self.ready, self.processes = run, settings, ready, processes
        self.folder = run.training_folder(ready.name)
        self.checkpoints = run.path(f"{self.folder}/checkpoints")
        self.journal = Journal(
            run,
            ready.name,
            spec=identity(ready.spec),
            streams=stream_fingerprints(ready.stream),
            processes=processes,
        )
        self.following = Followed(run, settings, ready, processes) if settings.follow else None
        self.heart = HeartbeatWriter(run, "train", ready.name, attempt=attempt)
        self.size = model_size(ready.model)
        self.reference_size = model_size(ready.reference) if ready.reference is not None else None
        self.device = next(ready.model.parameters()).device
        self.peak_flops = settings.peak_flops or measured_peak(str(self.device), ready.dtype)
        self.online = OnlineStep(
            ready.model,
            ready.optimizer,
            settings.policy,
            options=settings.policy_options(),
            seed=settings.seed,
            proj_rank=settings.proj_rank,
            warmup_select=settings.warmup_select,
            clip=settings.clip,
            batch_tokens=settings.batch_tokens,
            dtype=ready.dtype,
            selection_weights=settings.selection_weights,
            mode=ready.mode,
            precondition=settings.precondition,  # type: ignore[arg-type]
            gram=settings.gram,  # type: ignore[arg-type]
            alignment=settings.alignment,  # type: ignore[arg-type]
            reference_model=ready.reference,
            layout=ready.layout,
            batch_layout=ready.batch_layout,
            oracle_every=settings.oracle_every,
            oracle_draws=settings.oracle_draws,
            target_decay=settings.target_decay if settings.target_mode == "ema" else 0.0,
            target_refresh=settings.target_refresh,
            targets=settings.targets,  # type: ignore[arg-type]
        )
        self.maps = maps_size(ready.model, self.online.compared_sites)
        self.evaluated = StepBatches(
            batch_tokens=settings.batch_tokens,
            dtype=ready.dtype,
            device=self.device,
            processes=processes,
            even=ready.layout.even,
            layout=ready.batch_layout,
        )
        self.averages = Averages(ready.trainee, ema_decay=settings.ema_decay, tail=settings.average_tail)
        self.state = TrainerState(
            step=0,
            spec=ready.spec,
            cursor=ready.stream.state_dict(),
            trained_tokens=0,
            offered_tokens=0,
            initial_eval_loss=None,
            eval_loss=None,
            fallbacks=0,
            averaged=self.averages.counts,
        )

    def restore(self) -> None:
        """Continue from the newest whole checkpoint, or evaluate the untouched model and start."""
        url = self.processes.decide(self._newest)
        if self.following:
            self.following.restore(read_state(url).step if url else 0)
            self.journal.inputs = stream_fingerprints(self.ready.stream)
        if url is None:
            if self.settings.evaluate == "both":
                loss = self._evaluate()
                self.state = dataclasses.replace(self.state, initial_eval_loss=loss, eval_loss=loss)
            return
        state = read_state(url)
        load_weights(self.ready.model, url)
        self.averages.restore(url, state.averaged)
        if not state.ended:  # all that is left then is the manifest, and the moments may not have been kept
            load_optimizer_tensors(self.ready.model, self.ready.optimizer, read_optimizer(url).tensors, url)
            self.online.load_target_state(read_target_state(url))
        self.ready.stream.load_state_dict(state.cursor)
        self.online.steps_taken = state.step
        self.state = dataclasses.replace(state, spec=self.ready.spec)  # the number of steps may be another
        log.info("training %s goes on after step %d", self.ready.name, state.step)

    def _newest(self) -> str | None:
        """URL of the newest whole checkpoint, if there is one; what was written after it is deleted."""
        sweep_temporary(self.run.path(self.folder))
        url = latest_checkpoint(self.checkpoints)
        self.journal.discard_after(read_state(url).step if url else 0)
        return url

    def begun(self) -> Begun:
        """What loggers are told."""
        return Begun(
            name=self.ready.name,
            folder=self.run.path(self.run.timings_folder("train", self.ready.name)),
            steps_done=self.state.step,
            spec=self.ready.spec,
            choices=self.ready.choices,
        )

    def advance(self) -> Progress | None:
        """One step, its journal rows, and what is due after it; None where nothing was left to train on."""
        self.processes.check_launcher()
        settings, state, ready = self.settings, self.state, self.ready
        wall, processor, number = time.perf_counter(), time.process_time(), state.step + 1
        cursor = ready.stream.state_dict()
        share = self._share()
        sizes = ready.sizes.at(share)
        offered = [candidate(ready.encoder, item) for item in ready.stream.take(sizes.candidates)]
        if not offered:
            self._end("stream")
            return None
        rate = ready.schedule.rate(progress=share, step=number)
        for group in ready.optimizer.param_groups:
            group["lr"] = rate
        # Every process has dropout of its own; process 0 has that of a training in one process.
        drawn = ["dropout", settings.seed, number, *([self.processes.index] if self.processes.index else [])]
        torch.manual_seed(int(fingerprint(drawn)[:15], 16))
        limit = settings.token_budget - state.trained_tokens if settings.token_budget else None
        target = self._target_batch(number)
        result = self.online.step(offered, target, token_limit=limit, n_keep=sizes.n_keep)
        if not result.applied:
            # Nothing that was wanted fits into what is left of the budget: the step before this one was the last.
            ready.stream.load_state_dict(cursor)
            self._end("token budget")
            return None
        self.averages.update(share)
        offered_tokens = sum(item.tokens for item in offered)
        self.state = state = dataclasses.replace(
            state,
            step=number,
            cursor=ready.stream.state_dict(),
            trained_tokens=state.trained_tokens + result.trained_tokens,
            offered_tokens=state.offered_tokens + offered_tokens,
            fallbacks=state.fallbacks + bool(result.decision.fallback),
        )
        ended = self._spent(result.decision.limited)
        switches = self.following.look(number) if self.following and not ended else ()
        if not ended and not switches and ready.stream.exhausted:
            ended = self._ran_out()
        due = bool(settings.eval_every) and number % settings.eval_every == 0
        evaluated = due or (bool(ended) and settings.evaluate != "never")
        evaluating = time.perf_counter()
        eval_loss = self._evaluate() if evaluated else None
        self.state = dataclasses.replace(self.state, ended=ended, eval_loss=eval_loss if evaluated else state.eval_loss)
        if ended:
            self._close_averages()
        ends = time.perf_counter()
        row = step_row(
            result,
            generation=offered[0].generation if not settings.mix else ready.stream.index.generation,
            policy=settings.policy,
            learning_rate=rate,
            offered=len(offered),
            offered_tokens=offered_tokens,
            total_offered_tokens=state.offered_tokens,
            total_trained_tokens=state.trained_tokens,
            eval_loss=eval_loss,
        )
        flops = self._flops(result, offered, target)
        timing = {
            "seconds": ends - wall,
            "cpu_seconds": time.process_time() - processor,
            "selection_seconds": result.selection_seconds,
            "oracle_seconds": result.oracle_seconds,
            "evaluation_seconds": ends - evaluating,
            "flops": flops.total,
            "selection_flops": flops.selection,
            "mfu": flops.total / (evaluating - wall - result.oracle_seconds) / (self.peak_flops * self.processes.count),
            "peak_memory": peak_memory(self.device),
        }
        self.journal.record(row, decision_rows(result, offered), timing)
        if self.processes.leads:
            self.heart.tokens(result.trained_tokens)
        if self.following and switches:
            self.following.take(switches)
            self.state = dataclasses.replace(self.state, cursor=ready.stream.state_dict())
        # A switch is made safe at once: the generation before it is not needed any more.
        if ended or switches or number % settings.checkpoint_every == 0:
            self._checkpoint()
            self.journal.inputs = stream_fingerprints(ready.stream)
        return Progress(share=1.0 if ended else self._share(), row=row, timing=timing)

    def _flops(self, result: StepResult, offered: Sequence[Candidate], target: Targets) -> StepFlops:
        return step_flops(
            self.size,
            mode=result.mode,
            offered=[item.tokens for item in offered],
            measured=[item.tokens for item in offered] if self.online.measures_losses else [],
            reference=self.reference_size,
            kept=[offered[index].tokens for index in result.decision.kept],
            target=[len(item.ids) for item in all_samples(target)] if result.target_loss is not None else [],
            sketched_target=result.sketched_target,
            maps=self.maps,
            exact_alignment=self.settings.alignment == "exact" and bool(target),
            formed=result.formed_candidates,
            exact_gram=[offered[index].tokens for index in result.exact_gram],
        )

    def finish(self) -> dict[str, Any]:
        """Write the stage manifest over journal and final checkpoint; returns its summary."""
        return self.processes.decide(self._finish)

    def _finish(self) -> dict[str, Any]:
        url = latest_checkpoint(self.checkpoints)
        if url is None:
            raise CorruptFile(f"{self.checkpoints} holds no whole checkpoint; run the same command again")
        relative = url[len(self.run.url) + 1 :]
        data = read_bytes(join(url, MANIFEST_FILE))
        files = [*orjson.loads(data)["files"], _entry(MANIFEST_FILE, data)]
        parts = [Part(path=f"{relative}/{f['path']}", rows=0, bytes=f["bytes"], sha256=f["sha256"]) for f in files]
        state = self.state
        summary: dict[str, Any] = {
            "steps": state.step,
            "trained_tokens": state.trained_tokens,
            "offered_tokens": state.offered_tokens,
            "initial_eval_loss": state.initial_eval_loss,
            "eval_loss": state.eval_loss,
            "fallbacks": state.fallbacks,
            "ended": state.ended,
            "checkpoint": relative,
        }
        if state.averaged:
            summary["averages"] = {
                name: {"steps": count, "eval_loss": state.average_eval_loss.get(name), "model": f"{relative}/{name}"}
                for name, count in state.averaged.items()
            }
        if self.ready.parent:
            summary["from"] = self.ready.parent
        if self.following:
            summary["generations"] = self.following.history()
        if self.settings.merge:
            summary["merged"] = f"{relative}/merged"
        manifest = Manifest(
            stage="train",
            name=self.ready.name,
            spec=self.ready.spec,
            inputs=stream_fingerprints(self.ready.stream),
            parts=(*state.journal, *parts),
            summary=summary,
        )
        write_manifest(self.run.path(self.run.manifest_path("train", self.ready.name)), manifest)
        return summary

    def _share(self) -> float:
        settings, state = self.settings, self.state
        if settings.token_budget:
            return state.trained_tokens / settings.token_budget
        return state.step / self.ready.total_steps

    def _spent(self, limited: bool) -> str:
        settings, state = self.settings, self.state
        if settings.token_budget and (limited or state.trained_tokens >= settings.token_budget):
            return "token budget"
        if not settings.token_budget and state.step >= self.ready.total_steps:
            return "steps"
        return ""

    def _ran_out(self) -> str:
        settings, state = self.settings, self.state
        if settings.token_budget:
            log.warning(
                "the stream ended after %d of %d tokens: the learning rate has not come to its end. Offer more, or raise epochs",
                state.trained_tokens,
                settings.token_budget,
            )
        elif state.step < self.ready.total_steps:
            log.warning(
                "the stream ended after %d of %d steps: the learning rate has not come to its end. Offer more, or raise epochs",
                state.step,
                self.ready.total_steps,
            )
        return "stream"

    def _end(self, reason: str) -> None:
        """End after the step before; its checkpoint is written anew with what is now known."""
        if not self.state.step:
            raise InputError(
                f"the token budget of {self.settings.token_budget} is shorter than every sample of the first step; raise it"
            )
        loss = self.state.eval_loss if self.settings.evaluate == "never" else self._evaluate()
        self.state = dataclasses.replace(self.state, ended=reason, eval_loss=loss)
        self._close_averages()
        self._checkpoint()

    def _close_averages(self) -> None:
        self.averages.close()
        if self.settings.evaluate != "never":
            losses = self.averages.evaluate(self._evaluate)
            self.state = dataclasses.replace(self.state, average_eval_loss=losses)

    def _checkpoint(self) -> None:
        self.state = dataclasses.replace(
            self.state, journal=(*self.state.journal, *self.journal.cut()), averaged=self.averages.counts
        )
        ready = self.ready
        if ready.layout.align(ready.optimizer):
            log.warning(
                "step %d: the processes no longer held the same weights (their processors round differently); all go on from those of process 0",
                self.state.step,
            )
        weights, moments = ready.layout.gathered(), None
        if self.settings.final_optimizer or not self.state.ended:
            moments = optimizer_tensors(ready.model, ready.optimizer, keep=self.processes.leads)
        beside = self.averages.savers()
        if self.settings.merge and self.state.ended:
            beside["merged"] = ready.trainee.save_merged
        keep = self.settings.keep_checkpoints + bool(self.state.ended)

        def write() -> None:
            write_checkpoint(
                self.checkpoints, ready.trainee, moments, self.state, beside, weights, self.online.target_state()
            )
            prune_checkpoints(self.checkpoints, keep, self.state.step)

        self.processes.decide(write)

    def _evaluate(self) -> float | None:
        return evaluate(self.ready.layout.route, self.ready.evaluation, self.evaluated, self.processes)

    def _target_batch(self, number: int) -> Targets:
        """The target samples of a step, of every target where there are several."""
        if not self.online.wants_target(number):
            return []
        drawn = 1 if self.settings.target_mode == "fixed" else number
        if self.settings.targets == "together":
            return self._draw([item for _, item in self.ready.target], drawn)
        return {
            name: self._draw([item for domain, item in self.ready.target if domain == name], drawn)
            for name in sorted({domain for domain, _ in self.ready.target})
        }

    def _draw(self, target: list[Encoded], number: int) -> list[Encoded]:
        order = shuffled_ranks(self.settings.seed + 1, len(target), number)
        return [target[index] for index in order[: self.settings.target_batch]]


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"path": name, "bytes": len(data), "sha256": sha256(data)}
