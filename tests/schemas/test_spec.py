"""Specs: everything that changes results has a place in the fingerprint, and impossible values are refused with the reason."""

from __future__ import annotations

import dataclasses
from typing import Any

import orjson
import pytest

from schemas.errors import InputError
from schemas.fingerprint import canonical_json, fingerprint, plain
from schemas.spec import (
    CorpusColumns,
    EncodingSpec,
    FeatureSpec,
    InputGroup,
    PlanSpec,
    PreconditionerSpec,
    SmallSite,
    feature_spec_from_dict,
    plan_spec_from_dict,
)

FEATURES = FeatureSpec(
    model="m",
    tokenizer="t",
    encoding=EncodingSpec(),
    input_groups=(InputGroup(name="q", sites=("q", "k", "v")), InputGroup(name="o", sites=("o",))),
    small_sites=(SmallSite(name="o.bias", size=2),),
)
PLAN = PlanSpec(corpus="c", columns=CorpusColumns(keep=("url", "date"), domain="d"))
ANY: dict[str, Any] = {
    "append_eos": {"append_eos": "sometimes"},
    "format": {"format": "csv"},
    "loss": {"loss": "max"},
    "dtype": {"dtype": "float16"},
    "attribute": {"attribute": "some"},
    "layout": {"layout": "stacked"},
}
OTHER: dict[str, Any] = {
    "model": "n",
    "tokenizer": "u",
    "encoding": EncodingSpec(max_tokens=99),
    "attribute": "all",
    "input_groups": FEATURES.input_groups[:1],
    "small_sites": (SmallSite(name="norm.weight", size=3),),
    "proj_rank": 8,
    "k": 64,
    "seed": 1,
    "loss": "mean",
    "dtype": "bfloat16",
    "attention": "sdpa",
    "batch_tokens": 99,
    "layout": "packed",
    "precondition_candidate": "P^1/2",
    "precondition_target": "P",
    "preconditioner": PreconditionerSpec(optimizer="adamw", state="2" * 32),
}


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(FeatureSpec) if f.name != "projection_version"])
def test_every_field_of_a_feature_spec_is_in_its_fingerprint(name: str) -> None:
    through = dataclasses.replace(
        FEATURES, precondition_target="P^1/2", preconditioner=PreconditionerSpec(optimizer="adamw", state="1" * 32)
    )
    base = through if name.startswith("precondition") else FEATURES
    changed = dataclasses.replace(base, **{name: OTHER[name]})
    assert changed.fingerprint != base.fingerprint
    assert feature_spec_from_dict(orjson.loads(orjson.dumps(plain(changed)))) == changed


def test_a_preconditioner_stands_where_it_is_used() -> None:
    with pytest.raises(InputError, match="where, and only where"):
        dataclasses.replace(FEATURES, precondition_target="P")
    with pytest.raises(InputError, match="where, and only where"):
        dataclasses.replace(FEATURES, preconditioner=PreconditionerSpec(optimizer="adamw", state="1" * 32))
    with pytest.raises(InputError, match="unknown power"):
        dataclasses.replace(FEATURES, precondition_target="P^2")  # type: ignore[arg-type]


def test_other_projection_version_is_refused() -> None:
    with pytest.raises(InputError, match="projection version 99"):
        dataclasses.replace(FEATURES, projection_version=99)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(EncodingSpec)])
def test_every_field_of_an_encoding_is_in_the_fingerprint(field: str) -> None:
    other: dict[str, Any] = {
        "max_tokens": 77,
        "min_tokens": 9,
        "append_eos": "always",
        "chat_template": "{{ messages }}",
    }
    encoding = dataclasses.replace(FEATURES.encoding, **{field: other[field]})
    assert dataclasses.replace(FEATURES, encoding=encoding).fingerprint != FEATURES.fingerprint


def test_specs_survive_json() -> None:
    features = feature_spec_from_dict(orjson.loads(canonical_json(FEATURES)))
    assert features == FEATURES and features.fingerprint == FEATURES.fingerprint == fingerprint(plain(FEATURES))
    assert plan_spec_from_dict(orjson.loads(canonical_json(PLAN))) == PLAN


def test_sketch_size() -> None:
    assert FEATURES.sketch_size == 2048
    assert dataclasses.replace(FEATURES, k=0, proj_rank=4).sketch_size == 4 * 16 + 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EncodingSpec(max_tokens=1), "max_tokens must be at least 2"),
        (lambda: EncodingSpec(max_tokens=10, min_tokens=11), "min_tokens must lie in 2..10"),
        (lambda: EncodingSpec(min_tokens=1), "min_tokens"),
        (lambda: EncodingSpec(**ANY["append_eos"]), "unknown append_eos 'sometimes': never, completion, always"),
        (lambda: PlanSpec(corpus=""), "needs a name"),
        (lambda: PlanSpec(corpus="c", **ANY["format"]), "unknown format 'csv': auto, parquet, jsonl, webdataset"),
        (lambda: PlanSpec(corpus="c", unit_tokens=0), "unit_tokens must be positive"),
        (lambda: PlanSpec(corpus="c", max_row_bytes=0), "max_row_bytes must be positive"),
        (lambda: PlanSpec(corpus="c", limit=-1), "limit"),
        (lambda: CorpusColumns(prompt="p"), "given together"),
        (lambda: CorpusColumns(completion="c"), "given together"),
        (lambda: CorpusColumns(prompt="p", completion="c", messages="m"), "not both"),
        (lambda: CorpusColumns(text=""), "name a text column"),
        (lambda: dataclasses.replace(FEATURES, proj_rank=0), "proj_rank"),
        (lambda: dataclasses.replace(FEATURES, k=-1), "k must be 0"),
        (lambda: dataclasses.replace(FEATURES, batch_tokens=0), "batch_tokens"),
        (lambda: dataclasses.replace(FEATURES, **ANY["attribute"]), "unknown attribute 'some': blocks, all"),
        (lambda: dataclasses.replace(FEATURES, **ANY["loss"]), "unknown loss 'max': sum, mean"),
        (lambda: dataclasses.replace(FEATURES, **ANY["dtype"]), "unknown dtype 'float16': float32, bfloat16, float64"),
    ],
)
def test_impossible_values_are_refused_with_the_reason(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_columns_of_each_kind() -> None:
    assert CorpusColumns().kind == "text" and CorpusColumns().names() == ("text",)
    prompt = CorpusColumns(prompt="q", completion="a", id="i", domain="q", keep=("a", "z"))
    assert prompt.kind == "prompt" and prompt.names() == ("q", "a", "i", "z")
    assert CorpusColumns(messages="m").kind == "messages" and CorpusColumns(messages="m").names() == ("m",)
