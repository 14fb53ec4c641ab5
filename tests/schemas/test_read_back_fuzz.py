"""What Lehr wrote, changed by somebody else: records of streams, indexes, manifests, tables. Nothing but a `LehrError` is raised, and
what is accepted is what it should be."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.errors import LehrError
from schemas.fingerprint import canonical_json
from schemas.manifest import Manifest, read_manifest, write_manifest
from schemas.parquet import Footer, Part, decode_table, encode_table
from schemas.shards import decode_record, encode_record, index_bytes, read_index
from schemas.storage import sha256
from schemas.tables import table_schema
from tests.schemas.test_shards import ranked, write

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.just("NaN"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
SLOW_FIXTURE = [HealthCheck.function_scoped_fixture]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, inner in items for place in places(inner, (*path, key))]


def changed(value: Any, data: st.DataObject) -> Any:
    """A copy with another value in one place, or without it."""
    value = copy.deepcopy(value)
    *outer, last = data.draw(st.sampled_from(places(value)))
    holder = value
    for key in outer:
        holder = holder[key]
    if data.draw(st.booleans()):
        holder[last] = data.draw(JSON)
    else:
        del holder[last]
    return value


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_changed_record_is_refused_or_a_sample(data: st.DataObject) -> None:
    record = changed(orjson.loads(encode_record(ranked(1))), data)
    try:
        found = decode_record(canonical_json(record), "member 3")
    except LehrError as error:
        assert "member 3" in str(error)
        return
    sample = found.sample
    assert 0 <= found.selection_weight < math.inf and min(found.rank, found.tokens, found.loss_tokens) >= 0
    assert all(isinstance(text, str) for text in (sample.text, sample.domain, sample.path, sample.sample_id))
    assert all(start >= 0 and end >= 0 for start, end in sample.loss_spans)


@pytest.mark.parametrize("weight", ["NaN", "1", True, -1.0, None, [1]])
def test_a_weight_is_a_finite_number_of_at_least_0(weight: Any) -> None:
    record = {**orjson.loads(encode_record(ranked(1))), "selection_weight": weight}
    with pytest.raises(LehrError, match="member 3"):
        decode_record(orjson.dumps(record), "member 3")


@settings(max_examples=150, deadline=None, suppress_health_check=SLOW_FIXTURE)
@given(st.data())
def test_a_changed_index_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    index, _ = write(tmp_path)
    before = orjson.loads(index_bytes(index))
    record = changed(before, data)
    (tmp_path / "index.json").write_bytes(canonical_json(record))
    try:
        found = read_index(str(tmp_path))
    except LehrError as error:
        assert "index.json" in str(error)
    else:
        assert found == index  # a field that has this default, left out


@pytest.mark.parametrize("offset", [2.0**64, 1e300, -1, "x", None])
def test_an_offset_beyond_all_files_is_refused(tmp_path: Path, offset: Any) -> None:
    index, _ = write(tmp_path)
    record = orjson.loads(index_bytes(index))
    record["shards"][0]["offsets"][0][0] = offset
    (tmp_path / "index.json").write_bytes(orjson.dumps(record))
    with pytest.raises(LehrError, match=r"index\.json"):
        read_index(str(tmp_path))


@settings(max_examples=150, deadline=None, suppress_health_check=SLOW_FIXTURE)
@given(st.data(), st.booleans())
def test_a_changed_manifest_is_refused(tmp_path: Path, data: st.DataObject, rehashed: bool) -> None:
    """Also by somebody who knows how the hash of it all is made."""
    part = Part(path="features/a/part-1.parquet", rows=1, bytes=2, sha256="0" * 64)
    manifest = Manifest(stage="score", name="a", spec={"k": [1]}, inputs={"plan": "f"}, parts=(part,), summary={"n": 1})
    url = tmp_path / "m.json"
    url.unlink(missing_ok=True)
    write_manifest(str(url), manifest)
    record = orjson.loads(url.read_bytes())
    digest = record.pop("sha256")
    record = changed(record, data)
    url.write_bytes(canonical_json({**record, "sha256": sha256(canonical_json(record)) if rehashed else digest}))
    try:
        found = read_manifest(str(url), "run it again")
    except LehrError as error:
        assert "m.json" in str(error)
    else:
        assert (
            found.fingerprint == manifest.fingerprint
        )  # findings for people may be others, and sizes, which the hash covers


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["features", "spectrum", "curvature"]), st.data())
def test_a_changed_table_is_refused(name: str, data: st.DataObject) -> None:
    """Flipped bytes, a cut, bytes behind the end."""
    schema = table_schema(name, 8)
    columns = [
        pa.array([None] * 3, field.type).fill_null(0) if pa.types.is_integer(field.type) else None for field in schema
    ]
    made = [
        column if column is not None else pa.array([_value(field.type)] * 3, field.type)
        for column, field in zip(columns, schema)
    ]
    sound = encode_table(pa.table(made, schema=schema), Footer(schema=name, spec="s"))
    body = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(body)))
    body = body[:cut] if data.draw(st.booleans()) else body + data.draw(st.binary(max_size=9))
    try:
        decode_table(bytes(body), "part-1", schema=name, spec="s")
    except LehrError as error:
        assert "part-1" in str(error)
    else:
        assert bytes(body) == sound


def _value(kind: pa.DataType) -> Any:
    if pa.types.is_fixed_size_list(kind):
        return [0.5] * kind.list_size
    return True if pa.types.is_boolean(kind) else "x" if pa.types.is_string(kind) else 0.5
