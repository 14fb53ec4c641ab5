"""`lehr train`: train on a ranked stream, choosing again at every step."""

from __future__ import annotations

import dataclasses
from typing import Any

import tyro

from lehr.options import RunDir
from trainer.settings import TrainSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Train on a ranked stream, choosing again at every step against the optimizer's live state.

    After a stop the same command resumes from the newest checkpoint, with the same decisions and the same losses.
    """

    run_dir: RunDir
    """Run directory, with a stream that `lehr export` wrote."""
    settings: tyro.conf.OmitArgPrefixes[TrainSettings] = TrainSettings(loggers=("console",))

    def run(self) -> int:
        """Train, print what came of it, return the exit status."""
        from lehr.console import console, new_attempt, pairs
        from schemas.run import Run
        from trainer.loggers.console import Bar
        from trainer.loop import train

        run = Run.open(self.run_dir)
        summary = train(run, self.settings, attempt=new_attempt(), console=Bar)
        console.print(
            pairs(
                "",
                [
                    ("steps", summary["steps"]),
                    ("ended by", summary["ended"]),
                    ("trained tokens", summary["trained_tokens"]),
                    ("offered tokens", summary["offered_tokens"]),
                    *([("from", summary["from"])] if "from" in summary else []),
                    ("held-out loss", _change(summary["initial_eval_loss"], summary["eval_loss"])),
                    ("fallbacks", summary["fallbacks"]),
                    ("model", run.path(summary["checkpoint"])),
                    *_beside(run.url, summary),
                ],
            )
        )
        console.print(f"Next: lehr report {self.run_dir}")
        return 0


def _beside(url: str, summary: dict[str, Any]) -> list[tuple[str, Any]]:
    """Further models of a training: averages of its weights with their held-out losses, its adapter merged in."""
    lines = []
    for name, found in summary.get("averages", {}).items():
        loss = "" if found["eval_loss"] is None else f"{found['eval_loss']:.4f} nats per token, "
        lines.append((f"average {name}", f"{loss}{found['steps']} steps: {url}/{found['model']}"))
    if "merged" in summary:
        lines.append(("merged", f"{url}/{summary['merged']}"))
    return lines


def _change(before: float | None, after: float | None) -> str:
    if after is None:
        return "none: it was not asked for, or the stream holds no evaluation samples"
    return f"{after:.4f} nats per token" + ("" if before is None else f" ({before:.4f} before training)")
