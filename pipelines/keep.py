"""What of a scoring's features is stored: everything, or all but the sketches (`--keep scalars`).

The numbers are the same either way, so this is no part of the feature spec. It is declared once for each scoring, with the targets
whose curvature columns are made in the scoring pass; every features part names the declaration it was written under, so that
parts of both kinds cannot be mixed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from pipelines.options import Keep
from schemas.errors import InputError
from schemas.manifest import Manifest, write_manifest
from schemas.run import Run
from schemas.storage import list_names


def settle_keep(run: Run, scoring: str, asked: Keep | None) -> Manifest | None:
    """The declaration that scoring `scoring` is stored under, made now if `asked` is new; None where sketches are stored.

    Raises `InputError` where `asked` differs from what holds, where no target is described yet, or where one was described since.
    """
    held = run.keep(scoring)
    targets = run.targets(scoring)
    if held is None and asked == "scalars":
        held = _declare(run, scoring, targets)
    elif held is not None and asked == "all":
        raise InputError(
            f"scoring {scoring!r} was declared with --keep scalars, so its features are stored without sketches; a scoring never "
            "changes. Give one with sketches another name with --scoring"
        )
    if held is not None:
        described = {manifest.spec["target"]: manifest.fingerprint for manifest in targets}
        for name in sorted({*described, *held.spec["targets"]}):
            if described.get(name) != held.spec["targets"].get(name):
                raise InputError(no_columns(name, scoring, held))
    return held


def _declare(run: Run, scoring: str, targets: Sequence[Manifest]) -> Manifest:
    if not targets:
        raise InputError(
            "--keep scalars makes curvature columns in the scoring pass, and keeps nothing to make them from later: describe "
            "every target first (`lehr target`)"
        )
    if list_names(run.path(f"features/{scoring}"), ".parquet"):
        raise InputError(
            f"features of scoring {scoring!r} are stored with their sketches already; a scoring never changes. Leave --keep out, "
            "or give the new one another name with --scoring"
        )
    manifest = Manifest(
        stage="keep",
        name=scoring,
        spec={
            "scoring": scoring,
            "keep": "scalars",
            "targets": {target.spec["target"]: target.fingerprint for target in targets},
        },
        inputs={"scoring": run.manifest("scoring", scoring).fingerprint},
    )
    # Another process may be first; whether it meant the same targets is compared by the caller.
    with contextlib.suppress(FileExistsError):
        write_manifest(run.path(run.manifest_path("keep", scoring)), manifest, create_only=True)
    return run.manifest("keep", scoring)


def no_columns(target: str, scoring: str, held: Manifest) -> str:
    """Why `target` cannot be a target of a scoring that is stored without sketches, and the way out."""
    return (
        f"scoring {scoring!r} is stored without sketches (--keep scalars) and has columns of the targets "
        f"{', '.join(sorted(held.spec['targets']))} as they were when it was scored; those of {target!r}, as it is now, need "
        "the model again. Describe every target under another --scoring and score that"
    )


def refuse_sketchless(scoring: str, what: str) -> InputError:
    """The error of something that reads sketches of a scoring without any."""
    return InputError(
        f"{what} reads sketches, and scoring {scoring!r} was stored without them (--keep scalars); use a ranking such as "
        "'target-cosine', or 'direct-signed', or score again with sketches under another --scoring"
    )
