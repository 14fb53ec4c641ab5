"""What every engine shares: the job it runs, the thread it runs in, and how its errors are told."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any, Protocol

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from schemas.errors import InputError, LehrError

TICK_S = 0.25
_STEP = re.compile(r" \[while running '[^']*'\]")
_RAISED = re.compile(r"^schemas\.errors\.\w+: ", re.MULTILINE)


class Job(Protocol):
    """A pipeline that can be sent to another process: settings, and how to build the pipeline from them."""

    def build(self, pipeline: beam.Pipeline) -> None:
        """Add the transforms."""


def pipeline_options(*options: str) -> PipelineOptions:
    """Beam's options from `--name=value` pieces; workers import lehr as it is installed, so no session is pickled.

    Raises `InputError` for an option that Beam does not know: Beam itself drops it with a remark in the log.
    """
    parsed = PipelineOptions(["--no_save_main_session", *options])
    unknown = parsed.get_all_options(retain_unknown_options=True).keys() - parsed.get_all_options().keys()
    if unknown:
        raise InputError(f"Beam knows no option --{', --'.join(sorted(unknown))} of --beam-options")
    return parsed


def in_thread(work: Callable[[], Any], tick: Callable[[], None]) -> None:
    """Run `work` in a thread, so that this one can show progress and take Ctrl-C."""
    failure: list[BaseException] = []

    def body() -> None:
        try:
            work()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=body, name="lehr-pipeline", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(TICK_S)
        tick()
    if failure:
        raise explained(failure[0]) or failure[0]


def explained(error: BaseException) -> LehrError | None:
    """The `LehrError` that a worker raised, if that is what ended the job, without Beam's remark on the step.

    From another process it arrives as the last words of a traceback's text.
    """
    if isinstance(error, LehrError):
        return type(error)(_STEP.sub("", str(error)))
    last = [match.end() for match in _RAISED.finditer(str(error))]
    return LehrError(_STEP.split(str(error)[last[-1] :])[0].strip()) if last else None
