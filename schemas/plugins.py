"""What other people's packages add to Lehr: modules that they name as entry points, imported once."""

from __future__ import annotations

import functools
from importlib.metadata import entry_points

from schemas.errors import InputError


@functools.cache
def load_installed(group: str, what: str) -> None:
    """Import what installed packages name in an entry point group; what is imported registers itself.

    Raises `InputError` naming the package of one that cannot be imported; `what` is what the group holds, in words.
    """
    for found in sorted(entry_points(group=group), key=lambda point: (point.name, point.value)):
        try:
            found.load()
        except Exception as error:  # whatever a package of someone else's raises
            package = found.dist.name if found.dist else "an installed package"
            raise InputError(
                f"{what} {found.name!r} ({found.value}) of {package} cannot be loaded: {type(error).__name__}: {error}"
            ) from error
