"""Adapter folders: what is loaded, what is attributed, what is refused."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from schemas.errors import InputError
from selection_ops import adapters, locations
from selection_ops.batching import collate
from selection_ops.encoding import Encoded
from selection_ops.engine import GradientEngine
from selection_ops.model import choose_attention, load_model, load_tokenizer, model_fingerprint, tokenizer_fingerprint
from selection_ops.sites import find_sites
from tests.adapters import put_together, save_adapter
from tests.families import FAMILIES, wide_arithmetic
from tests.reference.gradients import projection, sample_loss
from tests.tiny import save_tiny_model, tiny_llama, tiny_tokenizer

RANK, SEED = 3, 11
ITEMS = [
    Encoded(ids=[5, 9, 200, 31, 7, 8, 8, 300], loss_mask=[False, True, True, False, True, True, True, True]),
    Encoded(ids=[8, 3, 11], loss_mask=[False, True, True]),
]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "rank-stabilised, biases": ("qwen2", {"use_rslora": True, "bias": "all"}),
    "copies of head and norm": ("llama", {"modules_to_save": ["lm_head", "norm"]}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "o_proj"]}),
    "dora": ("llama", {"use_dora": True}),
}


def load(location: Path | str, dtype: Any = "float64") -> Any:
    return load_model(str(location), dtype=dtype, attention="sdpa")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_adapter(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_sketches_are_the_projected_gradients_of_what_peft_would_train(kind: str, tmp_path: Path) -> None:
    """Every adapter parameter is attributed, and nothing else; float64, 1e-10 of each parameter's own sketch: contractions of some ten
    terms of 1e-16, amplified by two blocks."""
    family, settings = KINDS[kind]
    folder = save_adapter(tmp_path, family, **settings)
    with wide_arithmetic():
        loaded = load(folder)
        report = find_sites(loaded.model, "adapters", adapters=loaded.adapters)
        with GradientEngine(loaded.model, report.input_groups, report.small, proj_rank=RANK, k=0, seed=SEED) as engine:
            found_BK = engine.features(collate(ITEMS)).sketch_BK.numpy()
        model, trained = put_together(folder, tmp_path / "base")
        rows: list[list[np.ndarray]] = []
        for item in ITEMS:
            gradients = torch.autograd.grad(sample_loss(model, item.ids, item.loss_mask), list(trained.values()))
            of = {name: gradient.numpy() for name, gradient in zip(trained, gradients)}
            row = []
            for group in report.input_groups:
                for site in group.sites:
                    gradient_OI = of.pop(f"{site}.weight")
                    p_out = projection(SEED, 1, site, "out", RANK, gradient_OI.shape[0])
                    p_in = projection(SEED, 1, group.name, "in", RANK, gradient_OI.shape[1])
                    row.append((p_out @ gradient_OI @ p_in.T).ravel())
            row += [of.pop(site.name).ravel() for site in report.small]
            assert not of
            rows.append(row)
    assert set(trained) == set(loaded.adapters)
    assert set(report.unattributed.values()) == {"not of the adapters"}
    assert set(report.unattributed) | set(trained) == {name for name, _ in loaded.model.named_parameters()}
    start = 0
    for index in range(len(rows[0])):
        wanted = np.stack([row[index] for row in rows])
        stop = start + wanted.shape[1]
        error = np.linalg.norm(found_BK[:, start:stop] - wanted, axis=1)
        assert (error <= 1e-10 * np.linalg.norm(wanted, axis=1)).all()
        assert np.linalg.norm(wanted) > 0
        start = stop
    assert start == found_BK.shape[1]


def test_blocks_and_all_remain_possible(folder: Path) -> None:
    loaded = load(folder, "float32")
    blocks = find_sites(loaded.model, "blocks", adapters=loaded.adapters)
    assert "model.layers.0.self_attn.q_proj.base_layer" in blocks.sites
    assert "model.layers.0.self_attn.q_proj.lora_A.default" in blocks.sites
    assert find_sites(loaded.model, "all", adapters=loaded.adapters).coverage == 1.0


def test_arithmetic_is_one_for_base_and_adapter(folder: Path) -> None:
    assert {parameter.dtype for parameter in load(folder, "bfloat16").model.parameters()} == {torch.bfloat16}


def test_a_model_without_adapters_has_none_to_attribute() -> None:
    with pytest.raises(
        InputError, match=r"LlamaForCausalLM has no adapters.*needs a PEFT adapter folder; use 'blocks' or 'all'"
    ):
        find_sites(tiny_llama(), "adapters")


def test_of_a_model_that_peft_has_wrapped_what_it_trains_is_attributed() -> None:
    wrapped = FAMILIES["lora"](torch.float32)
    sites = find_sites(wrapped, "adapters").sites
    assert sites
    assert all("lora_" in site for site in sites)


def test_the_fingerprint_is_one_of_base_and_adapter_not_of_where_they_lie(folder: Path, tmp_path: Path) -> None:
    first = model_fingerprint(str(folder))
    assert load(folder).model_fingerprint == first != model_fingerprint(str(tmp_path / "base"))
    shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
    config = json.loads((folder / "adapter_config.json").read_text())
    moved = {
        **config,
        "base_model_name_or_path": str(tmp_path / "base"),
        "target_modules": config["target_modules"][::-1],
    }
    (tmp_path / "elsewhere/copy/adapter_config.json").write_text(json.dumps(moved))
    assert model_fingerprint(str(tmp_path / "elsewhere" / "copy")) == first
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 9}))
    assert model_fingerprint(str(folder)) != first
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights = load_file(folder / "adapter_model.safetensors")
    name = sorted(weights)[0]
    save_file({**weights, name: weights[name] + 1}, folder / "adapter_model.safetensors")
    changed = model_fingerprint(str(folder))
    assert changed != first
    save_tiny_model(tmp_path / "base", seed=7)
    assert model_fingerprint(str(folder)) not in (first, changed)


def test_the_tokenizer_is_the_adapters_own_or_that_of_the_base(folder: Path, tmp_path: Path) -> None:
    base = str(tmp_path / "base")
    assert tokenizer_fingerprint(str(folder)) == tokenizer_fingerprint(base)
    text = "the quick fox"
    assert load_tokenizer(str(folder))(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    tiny_tokenizer("{{ messages }}").save_pretrained(folder)
    assert tokenizer_fingerprint(str(folder)) != tokenizer_fingerprint(base)
    loaded = load(folder)
    assert loaded.tokenizer.chat_template == "{{ messages }}"
    assert loaded.tokenizer_fingerprint == tokenizer_fingerprint(str(folder))


def test_attention_is_chosen_for_the_base_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    assert choose_attention(str(folder), "cpu", "float32") == "sdpa"
    monkeypatch.setattr(LlamaForCausalLM, "_supports_sdpa", False)
    assert choose_attention(str(folder), "cpu", "float32") == "eager"


def test_the_base_may_be_named_by_its_whole_path(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path, base=str(tmp_path / "base"))
    assert load(folder).adapters


def test_the_base_is_looked_for_beside_the_adapter_and_not_where_the_process_stands(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "inner").mkdir(parents=True)
    save_tiny_model(tmp_path / "here" / "base", "gpt2")
    monkeypatch.chdir(tmp_path / "here" / "inner")
    found = adapters.read_adapter(str(folder))
    assert found is not None
    assert Path(found.base).resolve() == (tmp_path / "base").resolve()


def test_the_base_may_be_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_adapter(tmp_path, base="owner/name")
    asked: list[tuple[str, str | None]] = []

    def fetched(name: str, revision: str | None) -> Path:
        asked.append((name, revision))
        return tmp_path / "base"

    monkeypatch.setattr(adapters, "from_hub", fetched)
    assert load(folder).adapters
    assert set(asked) == {("owner/name", None)}


def test_an_adapter_at_a_url_finds_its_base_beside_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    for name in ("base", "adapter"):
        memory.put(str(tmp_path / name), f"/adapted/{name}", recursive=True)
    locations._fetched.cache_clear()
    loaded = load("memory://adapted/adapter")
    assert loaded.model_fingerprint == model_fingerprint(str(folder))
    assert loaded.adapters == load(folder).adapters


def test_a_base_that_is_nowhere_is_named_with_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_adapter(tmp_path, base="../gone")
    with pytest.raises(
        InputError, match=r"(?s)adapter: its base model \.\./gone is not to be found at .*base_model_name_or_path of"
    ):
        load(folder)

    def offline(name: str, revision: str | None) -> Path:
        raise InputError(f"{name}: no network")

    monkeypatch.setattr(adapters, "from_hub", offline)
    shutil.rmtree(folder)
    folder = save_adapter(tmp_path, base="owner/name")
    with pytest.raises(InputError, match=r"(?s)adapter: its base model owner/name is not .*owner/name: no network"):
        load(folder)


def test_an_adapter_of_an_adapter_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "second")
    config = json.loads((folder / "adapter_config.json").read_text())
    (tmp_path / "second/adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "../adapter"})
    )
    with pytest.raises(InputError, match="is itself an adapter folder"):
        load(tmp_path / "second")


def test_pickled_weights_are_never_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors beside adapter_config\.json$"):
        load(folder)
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model\.bin is pickled, which is never read"):
        load(folder)


def test_without_the_package_the_command_that_installs_it_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "peft":
            raise ImportError("No module named 'peft'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r'adapter is an adapter folder.*pip install "peft>=0\.17"'):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "an adapter of type PROMPT_TUNING"),
        ({"task_type": "SEQ_CLS"}, "for task SEQ_CLS"),
        ({"megatron_config": {"a": 1}}, "sets megatron_config"),
        ({"alora_invocation_tokens": [1]}, "sets alora_invocation_tokens"),
        ({"base_model_name_or_path": None}, "must be names"),
        ({"target_modules": ["nothing"]}, "the adapter cannot be loaded"),
        ({"target_modules": ["q_proj", "v_proj", "down_proj"]}, "the weights lack 4 parameters of the adapter"),
        ({"r": 5}, "the adapter cannot be loaded"),
    ],
)
def test_what_cannot_be_loaded_is_refused_by_name(folder: Path, changes: dict[str, Any], reason: str) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(InputError, match=reason):
        load(folder)


def test_a_configuration_that_is_none_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("[1]")
    with pytest.raises(InputError, match=r"adapter_config\.json cannot be used"):
        load(folder)
