"""What a job's workers tell the driver about each finished piece: small records, gathered by the job into one JSON file.

The file is a message, not a result: the driver compares it with its plan and with what stands on storage before it writes
a manifest.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import orjson

from schemas.errors import LehrError, RunIncomplete
from schemas.run import Run
from schemas.storage import read_bytes, remove, write_whole


def results_url(run: Run, stage: str, name: str) -> str:
    """Where the records of one job go: a new place for each, so that no earlier job's are taken for them."""
    return run.path(f"{run.timings_folder(stage, name)}/results-{uuid.uuid4().hex}.json")


class _Write(beam.DoFn):
    def __init__(self, url: str) -> None:
        self._url = url

    def process(self, element: tuple[None, Iterable[dict[str, Any]]]) -> Iterator[int]:
        records = sorted(element[1], key=lambda record: str(record["key"]))
        try:
            write_whole(self._url, orjson.dumps(records))
        except LehrError as error:
            # What went wrong in the work itself says more than that it cannot be written down.
            first = next((record["error"] for record in records if record.get("error")), str(error))
            raise LehrError(first) from error
        yield len(records)


class GatherResults(beam.PTransform):
    """Write every record (a JSON-ready dict with a unique `key`) into one file at `url`, sorted by key."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url

    def expand(self, records: beam.PCollection) -> beam.PCollection:
        return (
            records
            | "PairWithNone" >> beam.Map(lambda record: (None, record))
            | "GatherOnOne" >> beam.GroupByKey()
            | "WriteResults" >> beam.ParDo(_Write(self._url))
        )


def read_results(url: str) -> dict[str, dict[str, Any]]:
    """Records by key, once. Raises `RunIncomplete` where the job did not get as far as writing them."""
    try:
        records = {record["key"]: record for record in orjson.loads(read_bytes(url))}
    except (FileNotFoundError, ValueError) as error:
        raise RunIncomplete(
            "the pipeline ended before all its work was done; run the same command again to resume"
        ) from error
    remove(url)
    return records
