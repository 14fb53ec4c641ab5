"""Canonical JSON and fingerprints of specs.

Two specs are the same exactly when their canonical JSON is the same bytes; the fingerprint is a 128-bit BLAKE2b of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import PurePath
from typing import Any

import orjson

from schemas.errors import InputError


def plain(value: Any) -> Any:
    """`value` as JSON types: dataclasses become dicts, tuples become lists; anything else that is not JSON is refused."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"a spec cannot hold {value}: only finite numbers have a fingerprint")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"no canonical JSON for {type(value).__name__}")


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces; equal values give equal bytes."""
    return orjson.dumps(plain(value), option=orjson.OPT_SORT_KEYS)


def pretty_json(value: Any) -> bytes:
    """The same content for people: indented, sorted keys, a newline at the end."""
    return orjson.dumps(plain(value), option=orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2) + b"\n"


def hash128(*parts: bytes) -> str:
    """32 hex digits of BLAKE2b over the parts, each preceded by its length, so that parts cannot run together."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """Fingerprint of a spec (a dataclass or JSON-like value): 32 hex digits."""
    return hash128(canonical_json(value))
