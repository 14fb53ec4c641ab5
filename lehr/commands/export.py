"""`lehr export`: the selection as ranked WebDataset shards."""

from __future__ import annotations

import dataclasses

import tyro

from lehr.options import RunDir
from pipelines.options import Execution


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Write a selection as ranked WebDataset shards, best first, with target and evaluation set beside them.

    One .json member a sample, its key the zero-padded rank; index.json lists shards, hashes and offsets. The same
    selection again writes the same bytes; a changed selection becomes the next generation of the stream.
    """

    run_dir: RunDir
    """Run directory."""
    selection: str = "match"
    """Name of the selection to write."""
    stream: str = ""
    """Name of the stream (default: that of the selection)."""
    shard_samples: int = 4096
    """Samples in a shard."""
    execution: tyro.conf.OmitArgPrefixes[Execution] = Execution(workers=1)

    def run(self) -> int:
        """Export, print where to, return the exit status."""
        from lehr.console import StageProgress, console, new_attempt, pairs, size
        from pipelines.export import export
        from schemas.run import Run

        run = Run.open(self.run_dir)
        attempt = new_attempt()
        name = self.stream or self.selection
        progress = StageProgress(run, "export", name, attempt)
        with progress.live():
            report = export(
                run,
                self.selection,
                self.execution,
                stream=self.stream,
                shard_samples=self.shard_samples,
                attempt=attempt,
                on_start=lambda tokens: progress.start(tokens),
                tick=progress.tick,
            )
        index = report.index
        console.print(
            pairs(
                "",
                [
                    ("stream", report.url),
                    ("generation", report.generation),
                    ("samples", index.rows),
                    ("tokens", index.tokens),
                    ("shards", len(index.shards)),
                    ("bytes", size(sum(shard.bytes for shard in index.shards))),
                    (
                        "beside",
                        f"{sum(s.rows for s in index.target)} target, {sum(s.rows for s in index.evaluation)} evaluation samples",
                    ),
                ],
            )
        )
        console.print(f"Next: lehr train {self.run_dir} --stream {report.stream}")
        return 0
