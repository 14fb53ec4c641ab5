"""Plan a file and read it back, as every reader test does."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable

import fsspec

from pipelines.readers import Item, file_format, get_reader, read_unit
from schemas.sample import Reject, Row
from schemas.spec import PlanSpec
from schemas.units import WorkUnit


def spec(**changes: object) -> PlanSpec:
    return PlanSpec(**{"corpus": "test", **changes})  # type: ignore[arg-type]


def put(root: str, path: str, data: bytes) -> None:
    fs, base = fsspec.core.url_to_fs(root)
    fs.makedirs(f"{base}/{path}".rpartition("/")[0], exist_ok=True)
    fs.pipe_file(f"{base}/{path}", data)


def scan(root: str, path: str, plan: PlanSpec) -> tuple[list[WorkUnit], list[str]]:
    """Units and warnings."""
    warnings: list[str] = []
    return list(get_reader(file_format(path, plan)).scan(root, path, plan, warn=warnings.append)), warnings


def read(root: str, units: Iterable[WorkUnit], plan: PlanSpec) -> list[Item]:
    """Every item, with the contract checked: exactly row_count items a unit, rows consecutive over the file."""
    items: list[Item] = []
    for unit in units:
        assert unit.row_start == len(items)
        found = list(read_unit(root, unit, plan))
        assert len(found) == unit.row_count
        items += found
    assert [item.row for item in items] == list(range(len(items)))
    assert all(item.stage == "read" for item in items if isinstance(item, Reject))
    return items


def scan_and_read(root: str, path: str, plan: PlanSpec) -> list[Item]:
    return read(root, scan(root, path, plan)[0], plan)


def outcome(item: Item) -> str | None:
    """Text of a row, `!reason` of a reject."""
    return item.text if isinstance(item, Row) else f"!{item.reason}"


def tar_bytes(members: Iterable[tuple[str, bytes | tarfile.TarInfo]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of (name, content); a TarInfo in place of content is written as it is, without data."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()
