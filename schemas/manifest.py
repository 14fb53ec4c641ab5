"""Manifests: one JSON file a stage, written last. Only what a manifest lists is a result."""

from __future__ import annotations

import dataclasses
from typing import Any

import orjson

from schemas.errors import CorruptFile, InputError
from schemas.fingerprint import canonical_json, fingerprint, plain, pretty_json
from schemas.parquet import Part
from schemas.storage import read_bytes, sha256, write_whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a stage made, from what, under which resolved spec. Holds no times, hosts or absolute paths."""

    stage: str
    name: str
    spec: dict[str, Any]
    inputs: dict[str, str]
    """Fingerprints of the manifests this one was made from, by what they are."""
    parts: tuple[Part, ...] = ()
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Counts and findings for people and for `lehr verify`."""

    @property
    def fingerprint(self) -> str:
        """Fingerprint of spec, inputs and parts: what a later stage names as its input."""
        parts = [[part.path, part.sha256] for part in self.parts]
        return fingerprint([self.stage, self.name, plain(self.spec), self.inputs, parts])


def write_manifest(url: str, manifest: Manifest, *, create_only: bool = False) -> None:
    """Write the manifest whole, with its fingerprint and a hash of all of it inside. With `create_only`, raises
    `FileExistsError` where one stands."""
    record = {**plain(manifest), "fingerprint": manifest.fingerprint}
    data = pretty_json({**record, "sha256": sha256(canonical_json(record))})
    write_whole(url, data, create_only=create_only)


def read_manifest(url: str, way_out: str) -> Manifest:
    """Read a manifest. Raises `InputError` with `way_out` where the stage has not finished, `CorruptFile` where it is damaged.

    One without a hash was written before they held one; its fingerprint covers what later stages rely on.
    """
    try:
        data = read_bytes(url)
    except FileNotFoundError as error:
        raise InputError(f"{url} does not exist: {way_out}") from error
    try:
        record = orjson.loads(data)
        digest = record.pop("sha256", None)
        whole = digest is None or digest == sha256(canonical_json(record))
        stored = record.pop("fingerprint")
        record["parts"] = tuple(Part(**part) for part in record["parts"])
        manifest = Manifest(**record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(f"{url}: not a manifest ({error}); delete it and run its stage again") from error
    if stored != manifest.fingerprint or not whole:
        raise CorruptFile(
            f"{url}: its content does not match its fingerprint {stored} and hash; it was edited or damaged. Delete it and run its stage again"
        )
    return manifest
