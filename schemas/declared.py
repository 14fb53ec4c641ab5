"""What something will be made under, written once before it is begun: a later start with other options is refused by name."""

from __future__ import annotations

from typing import Any

import orjson

from schemas.errors import CorruptFile, InputError
from schemas.fingerprint import fingerprint, plain, pretty_json
from schemas.storage import read_bytes, write_whole


def declare(url: str, kind: str, name: str, spec: dict[str, Any], *, follows: frozenset[str] = frozenset()) -> None:
    """Fix the spec of `name`, a training or a comparison, at `url`. Raises `InputError` naming every option in which an existing one
    differs; what `follows` from others is named where nothing else differs."""
    spec = plain(spec)
    try:
        write_whole(url, pretty_json({"spec": spec, "fingerprint": fingerprint(spec)}), create_only=True)
        return
    except FileExistsError:
        pass
    known = read_declared(url, kind)
    if fingerprint(known) == fingerprint(spec):
        return
    differing = [key for key in sorted({*known, *spec}) if known.get(key) != spec.get(key)]
    differing = [key for key in differing if key not in follows] or differing
    what = "; ".join(f"{key} was {known.get(key)!r} and is now {spec.get(key)!r}" for key in differing)
    raise InputError(f"{kind} {name!r} exists with another spec: {what}. Use the same, or another --name")


def read_declared(url: str, kind: str) -> dict[str, Any]:
    """The spec that was declared at `url`. Raises `CorruptFile` where it is damaged."""
    try:
        record = orjson.loads(read_bytes(url))
        spec, stored = record["spec"], record["fingerprint"]
        if stored != fingerprint(spec):
            raise ValueError("it does not match its fingerprint")
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFile(f"{url} is damaged ({error}); delete the {kind}'s folder and start again") from error
    return spec
