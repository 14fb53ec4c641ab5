"""Adapters that are trained: gradients, geometry, parity with PEFT's own training, folders that PEFT loads, exact resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

from schemas.errors import InputError, LehrError
from schemas.run import Run
from selection_ops.encoding import Encoded
from selection_ops.model import tokenizer_fingerprint
from selection_ops.online.options import PolicyOptions
from tests.adapters import save_adapter
from tests.reference.gradients import projection, sample_loss
from tests.tiny import tiny_tokenizer
from tests.trainer.streams import make_run
from tests.trainer.test_loop import Stop, journal, results, settings, stopping
from tests.trainer.test_step import Fixed, encoded, offer, trainable
from trainer.loop import train
from trainer.lora import add_lora, name_base, save_merged
from trainer.lora import save_adapter as write_adapter
from trainer.step import OnlineStep
from trainer.stream import RankedStream
from trainer.trainee import trained_parameters

TARGETS = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn", "c_fc"), "neox": ("query_key_value",)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    return make_run(tmp_path_factory.mktemp("lora"))


def adapted(kind: str = "llama", **changes: Any) -> Any:
    """A model in float64 with a LoRA of which neither side is zero."""
    wanted: dict[str, Any] = {"rank": 3, "alpha": 5.0, "dropout": 0.0, "targets": TARGETS[kind], "seed": 1}
    model = add_lora(trainable(kind), **{**wanted, **changes})
    torch.manual_seed(2)
    for name, parameter in trained_parameters(model).items():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    return model


def autograd(model: Any, item: Encoded) -> dict[str, torch.Tensor]:
    """Gradient of the sample's loss with respect to every parameter of the adapter, by transformers' logits alone."""
    named = trained_parameters(model)
    loss = sample_loss(model.get_base_model(), item.ids, item.loss_mask)
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()))))


@pytest.mark.parametrize("mode", ["plain", "one-pass"])
@pytest.mark.parametrize("kind", sorted(TARGETS))
def test_weighted_gradient_of_every_adapter_parameter_is_exact(kind: str, mode: str) -> None:
    """sum_i w_i g_i / sum_i w_i n_i by autograd; 1e-10 of each gradient's norm in float64. Nothing of the base moves."""
    model = adapted(kind)
    candidates, kept, weights = offer(), (4, 0, 3), (0.5, 2.0, 0.25)
    parts = [autograd(model, candidates[i].encoded) for i in kept]
    normaliser = sum(w * candidates[i].loss_tokens for i, w in zip(kept, weights))
    online = OnlineStep(
        model,
        torch.optim.SGD(list(trained_parameters(model).values()), lr=1.0),
        Fixed(kept, weights, needs_sketches=mode == "one-pass"),
        options=PolicyOptions(metric="sgd"),
        clip=0.0,
        batch_tokens=40,
        dtype="float64",
        selection_weights=False,
        mode="one-pass" if mode == "one-pass" else "two-pass",
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    own = {name: p.detach().clone() for name, p in trained_parameters(model).items()}
    assert online.step(candidates, encoded(3, seed=5)).mode == mode
    for name, parameter in trained_parameters(model).items():
        true = sum(w * part[name] for w, part in zip(weights, parts)) / normaliser
        assert float(torch.as_tensor(true).norm()) > 1e-6, name
        found = own[name] - parameter.detach()
        assert float((found - true).norm()) <= 1e-10 * float(torch.as_tensor(true).norm()) + 1e-14, name
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in moved)


@pytest.mark.parametrize("mode", ["two-pass", "one-pass"])
@pytest.mark.parametrize("kind", sorted(TARGETS))
def test_candidates_are_compared_by_the_gradients_of_the_adapter(kind: str, mode: Any) -> None:
    """K and b from dense gradients of A and B alone and from projections written out by their hash."""
    model = adapted(kind)
    parameters = list(trained_parameters(model).values())
    online = OnlineStep(
        model, torch.optim.AdamW(parameters), options=PolicyOptions(n_keep=3, metric="sgd"), proj_rank=4, seed=7,
        dtype="float64", batch_tokens=40, mode=mode,
    )  # fmt: skip
    assert online._engine is not None
    candidates, target = offer(5), encoded(3, seed=1)
    tokens = sum(sum(item.loss_mask) for item in target)
    gradients = [autograd(model, item.encoded) for item in candidates]
    wanted = {name: sum(autograd(model, item)[name] for item in target) / tokens for name in gradients[0]}
    assert {f"{site}.weight" for site in online._engine.sites} == set(wanted)

    def sketch(found: dict[str, Any]) -> np.ndarray:
        rows = []
        for group in online._engine.input_groups:  # type: ignore[union-attr]
            for site in group.sites:
                gradient = found[f"{site}.weight"].numpy()
                p_out = projection(7, online._engine._spec.version, site, "out", 4, gradient.shape[0])  # type: ignore[union-attr]
                p_in = projection(7, online._engine._spec.version, group.name, "in", 4, gradient.shape[1])  # type: ignore[union-attr]
                rows.append((p_out @ gradient @ p_in.T).ravel())
        return np.concatenate(rows)

    z, u = np.stack([sketch(found) for found in gradients]), sketch(wanted)
    space = online.step(candidates, target).geometry
    assert space is not None
    assert np.abs(space.gram_NN.numpy() - z @ z.T).max() <= 1e-10 * np.abs(z @ z.T).max()
    assert np.abs(space.align_N.numpy() - z @ u).max() <= 1e-10 * np.abs(z @ u).max()


@pytest.mark.parametrize("kind", sorted(TARGETS))
def test_exact_interactions_and_alignments_are_those_of_the_whole_gradients_of_the_adapter(kind: str) -> None:
    """K = G G' and b = G v of the gradients of A and B by autograd, without a projection."""
    model = adapted(kind)
    online = OnlineStep(
        model, torch.optim.AdamW(list(trained_parameters(model).values())), dtype="float64", batch_tokens=40, mode="one-pass",
        options=PolicyOptions(n_keep=3, metric="sgd"), gram="exact", alignment="exact",
    )  # fmt: skip
    candidates, target = offer(5), encoded(3, seed=1)
    tokens = sum(sum(item.loss_mask) for item in target)

    def flat(found: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([gradient.flatten() for gradient in found.values()])

    g = torch.stack([flat(autograd(model, item.encoded)) for item in candidates])
    v = torch.stack([flat(autograd(model, item)) for item in target]).sum(0) / tokens
    space = online.step(candidates, target).geometry
    assert space is not None
    assert float((space.gram_NN - g @ g.T).abs().max()) <= 1e-10 * float((g @ g.T).abs().max())
    assert float((space.align_N - g @ v).abs().max()) <= 1e-10 * float((g @ v).abs().max())


def test_the_base_is_named_so_that_it_is_found_again(world: tuple[Run, Path]) -> None:
    """A hub id and a URL as they are, a folder by its absolute path."""
    _, folder = world
    model = adapted()
    for base, revision, wanted in (
        ("owner/name", "v1", ("owner/name", "v1")),
        ("gs://bucket/base", None, ("gs://bucket/base", None)),
        (str(folder), "v1", (str(folder.resolve()), None)),
    ):
        name_base(model, base, revision)
        config = model.peft_config["default"]
        assert (config.base_model_name_or_path, config.revision) == wanted


def test_full_reproduces_training_by_peft(world: tuple[Run, Path]) -> None:
    """Six steps of transformers' loss through a model that PEFT made, from the same A; tolerances as in test_loop."""
    run, folder = world
    train(run, settings(folder, "fresh", lora=4, lora_alpha=8.0, lora_targets=("q_proj", "v_proj"), weight_decay=0.0))
    # At rate 0 nothing moves: the final checkpoint is the start.
    train(run, settings(folder, "start", lora=4, lora_alpha=8.0, lora_targets=("q_proj", "v_proj"), lr=0.0))
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    start = Path(run.path(run.manifest("train", "start").summary["checkpoint"]))
    model = PeftModel.from_pretrained(base, start, is_trainable=True).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(not p.any() for n, p in model.named_parameters() if "lora_B" in n)
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, 6)
    items = list(RankedStream(run.path("streams/match/gen-000001")))
    losses = []
    for first in range(0, 48, 8):
        texts = [item.ranked.sample.text for item in items[first : first + 8]]
        batch = tiny_tokenizer()(texts, return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert [row["loss"] for row in journal(run, "fresh")] == pytest.approx(losses, rel=1e-5)
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = PeftModel.from_pretrained(other, run.path(run.manifest("train", "fresh").summary["checkpoint"]))
    true = dict(model.named_parameters())
    for name, parameter in found.named_parameters():
        if "lora_" in name:
            assert float(((parameter - true[name]).norm() / true[name].norm()).detach()) < 1e-3, name
        else:
            assert torch.equal(parameter, true[name]), name


@pytest.mark.parametrize("policy", ["full", "filter-then-weight"])
def test_a_checkpoint_is_a_folder_that_peft_loads(world: tuple[Run, Path], policy: str) -> None:
    run, folder = world
    name = f"folder-{policy}"
    summary = train(run, settings(folder, name, lora=2, policy=policy, steps=3))
    assert summary["eval_loss"] != summary["initial_eval_loss"]
    place = Path(run.path(summary["checkpoint"]))
    config = json.loads((place / "adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == str(folder.resolve())
    assert config["target_modules"] == sorted(config["target_modules"]) and "lm_head" not in config["target_modules"]
    assert not (place / "model.safetensors").exists() and not (place / "README.md").exists()
    assert tokenizer_fingerprint(str(place)) == tokenizer_fingerprint(str(folder))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), place).eval()
    tokens, total = 0, 0.0
    from trainer.stream import read_beside

    index = RankedStream(run.path("streams/match/gen-000001"))
    for ranked in read_beside(index.url, index.index, "evaluation"):
        ids = tiny_tokenizer()(ranked.sample.text, return_tensors="pt")["input_ids"]
        count = ids.shape[1] - 1
        total += model(input_ids=ids, labels=ids).loss.item() * count
        tokens += count
    assert summary["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.parametrize("policy", ["random", "filter-then-weight"])
def test_an_adapter_goes_on(world: tuple[Run, Path], tmp_path: Path, policy: str) -> None:
    """A folder that PEFT wrote is trained further: it starts from its own loss, keeps its settings and its base, moves nothing else."""
    run, folder = world
    adapter = save_adapter(tmp_path, base=str(folder))
    name = f"goes-on-{policy}"
    summary = train(run, settings(adapter, name, policy=policy, steps=2))
    start = train(run, settings(adapter, f"{name}-still", policy=policy, steps=1, lr=0.0))
    assert start["eval_loss"] == start["initial_eval_loss"] == summary["initial_eval_loss"] != summary["eval_loss"]
    place = Path(run.path(summary["checkpoint"]))
    config = json.loads((place / "adapter_config.json").read_bytes())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["base_model_name_or_path"] == str(folder)
    # And once more, from a checkpoint with its moments: metric `target` acts at once.
    further = train(run, settings(place, f"{name}-further", policy=policy, steps=2, optimizer_state=str(place)))
    assert further["initial_eval_loss"] == summary["eval_loss"]
    if policy == "filter-then-weight":
        assert [row["metric"] for row in journal(run, f"{name}-further")] == ["target", "target"]


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "two-pass"},
        {"mode": "one-pass"},
        {"mode": "two-pass", "optimizer": "muon", "metric": "natural"},
        {"mode": "one-pass", "optimizer": "muon"},
        {
            "mode": "two-pass",
            "layout": "packed",
            "attention": "sdpa",
            "activation_checkpointing": True,
            "ema_decay": 0.5,
        },
        {"mode": "two-pass", "policy": "less-online", "oracle_every": 2},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_resume_gives_the_same_bytes(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Dropout in the adapter too, where the mode allows it."""
    dropout = 0.0 if changes["mode"] == "one-pass" else 0.2
    run, folder = make_run(tmp_path)
    found = []
    for stop in (None, 1, 3, 5):
        chosen = settings(
            folder, "t", **{"policy": "filter-then-weight", "lora": 3, "lora_dropout": dropout, "checkpoint_every": 2, **changes}
        )  # fmt: skip
        if stop:
            with pytest.raises(Stop):
                train(run, chosen, stopping(stop))
        train(run, chosen)
        found.append(results(run, "t"))
        for path in ("trainings/t", "stages/train/t.json"):
            Path(run.path(path)).rename(tmp_path / f"{Path(path).name}-{stop}")
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert [name for name in other if other[name] != found[0][name]] == []


def test_one_pass_and_two_train_the_same_adapter(world: tuple[Run, Path]) -> None:
    run, folder = world
    losses = []
    for mode in ("one-pass", "two-pass", "auto"):
        train(run, settings(folder, mode, policy="filter-then-weight", mode=mode, lora=4))
        assert {row["mode"] for row in journal(run, mode)} == {"two-pass" if mode == "two-pass" else "one-pass"}
        losses.append([row["loss"] for row in journal(run, mode)])
    # Another order of sums: float32 rounding over six steps.
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] == losses[2]


def test_merged_is_the_model_with_its_adapter(tmp_path: Path) -> None:
    model = adapted()
    save_merged(model, tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    ids = torch.tensor([encoded(1)[0].ids])
    # Llama's norms in float32 in the one, in float64 in the other.
    assert float((merged(input_ids=ids).logits - model(input_ids=ids).logits).abs().max()) < 1e-4
    assert all("lora" not in name for name, _ in merged.named_parameters())
    assert trained_parameters(model)  # as it was


def test_a_fresh_adapter_is_a_function_of_the_seed(tmp_path: Path) -> None:
    def written(seed: int) -> bytes:
        model = trainable("llama")
        state = torch.get_rng_state()
        model = add_lora(model, rank=2, alpha=1.0, dropout=0.0, targets=(), seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        write_adapter(model, tmp_path / str(seed))
        return (tmp_path / str(seed) / "adapter_model.safetensors").read_bytes()

    assert written(1) == written(1) != written(2)


def test_what_cannot_be_trained_is_refused(world: tuple[Run, Path], tmp_path: Path) -> None:
    run, folder = world
    adapter = save_adapter(tmp_path, base=str(folder))
    with pytest.raises(InputError, match=r"leave --lora out to go on with it"):
        train(run, settings(adapter, "x", lora=2))
    with pytest.raises(InputError, match=r"no LoRA can be put on LlamaForCausalLM: .*'nowhere'"):
        train(run, settings(folder, "x", lora=2, lora_targets=("nowhere",)))
    with pytest.raises(InputError, match="one pass: it has dropout"):
        train(run, settings(folder, "x", lora=2, lora_dropout=0.1, policy="filter-then-weight", mode="one-pass"))
    only = get_peft_model(trainable(), LoraConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(InputError, match="no linear map to compare candidates by"):
        OnlineStep(only, torch.optim.AdamW([p for p in only.parameters() if p.requires_grad]))


def test_weights_of_another_adapter_do_not_fit(world: tuple[Run, Path], tmp_path: Path) -> None:
    from trainer.checkpoints import load_weights

    run, folder = world
    summary = train(run, settings(folder, "fits", lora=2, steps=1))
    other = add_lora(trainable("llama", torch.float32), rank=3, alpha=1.0, dropout=0.0, targets=(), seed=0)
    with pytest.raises(LehrError, match="weights do not fit the adapter"):
        load_weights(other, run.path(summary["checkpoint"]))
