"""The `lehr` command: finds the verb, imports its file, prints errors as people want them."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOMS = ("schemas", "selection_ops", "pipelines", "trainer")

VERBS = {
    "plan": "cut a corpus into work units and say what scoring it would cost",
    "target": "describe the target set: sketches, spectrum, what can be trusted",
    "score": "compute features and curvature columns of the whole corpus",
    "select": "choose the samples worth training on",
    "export": "write the selection as ranked WebDataset shards",
    "train": "train on a ranked stream, choosing again at every step",
    "branch": "train from one checkpoint on each of several streams",
    "compare": "train arms on equally many tokens and say which is worth it",
    "average": "average the final weights of several trainings into one model",
    "audit": "ask questions about a run in SQL",
    "report": "write a run as one HTML page",
    "status": "show what is done, missing and rejected",
    "verify": "check every checksum, count and lineage of a run",
    "check": "recompute random rows exactly: are sketches intact, and good enough",
    "model-report": "list a model's parameters, and which of them scoring would attribute",
    "schema": "print the columns of a table with their units",
    "demo": "run the whole path on a real model and a real corpus",
}

EXIT_ERROR = 2
EXIT_INCOMPLETE = 75
"""EX_TEMPFAIL: run the same command again to resume."""


def usage() -> str:
    """The text of `lehr --help`."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {summary}" for verb, summary in VERBS.items()]
    return "\n".join(
        [
            "usage: lehr VERB RUN [options]",
            "",
            "Selects the data that a language model is annealed or fine-tuned on. A run directory RUN (any path or",
            "fsspec URL) holds everything a corpus went through, in this order:",
            "",
            *lines,
            "",
            "`lehr VERB --help` explains a verb and all its options.",
        ]
    )


def shadowed_rooms() -> list[str]:
    """One sentence for each room that Python would import from elsewhere than from beside this package."""
    home = Path(__file__).resolve().parent.parent
    problems = []
    for room in ROOMS:
        spec = importlib.util.find_spec(room)
        if spec is None or spec.origin is None:
            problems.append(f"package {room!r} is not beside {home / 'lehr'}; install lehr again")
            continue
        found = Path(spec.origin).resolve()
        if found.parent.parent != home:
            problems.append(
                f"{found} shadows lehr's own {home / room}; run from another folder or take it off PYTHONPATH"
            )
    return problems


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status: 0 done, 2 an error that the message explains, 75 run again to resume."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("lehr"))
        return 0
    verb = arguments[0]
    if verb not in VERBS:
        print(f"lehr: unknown verb {verb!r}; choose one of {', '.join(VERBS)}", file=sys.stderr)
        return EXIT_ERROR
    problems = shadowed_rooms()
    if problems:
        print("\n".join(f"lehr: {problem}" for problem in problems), file=sys.stderr)
        return EXIT_ERROR
    logging.basicConfig(
        level=os.environ.get("LEHR_LOG", "WARNING").upper(), format="%(levelname)s %(name)s: %(message)s"
    )

    import tyro

    from schemas.errors import LehrError, RunIncomplete
    from schemas.storage import quiet_clients

    quiet_clients()
    module = importlib.import_module(f"lehr.commands.{verb.replace('-', '_')}")
    try:
        command = tyro.cli(module.Command, args=arguments[1:], prog=f"lehr {verb}")
        return command.run()
    except RunIncomplete as error:
        print(f"lehr {verb}: {error}", file=sys.stderr)
        return EXIT_INCOMPLETE
    except LehrError as error:
        print(f"lehr {verb}: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print(f"lehr {verb}: stopped; run the same command again to resume", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away (a pager that was closed): nothing is wrong with the run.
        sys.stdout = None  # type: ignore[assignment]
        return 0


if __name__ == "__main__":
    sys.exit(main())
