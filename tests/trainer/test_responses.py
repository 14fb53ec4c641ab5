"""Fine-tuning on responses: from a corpus of prompts, chats or plain text to a step whose loss is transformers' with labels of -100."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

from pipelines.export import export
from pipelines.options import ScoringOptions, TargetOptions
from pipelines.plan import make_plan
from pipelines.score import score
from pipelines.select import run_select
from pipelines.target import describe
from schemas.run import Run
from schemas.spec import CorpusColumns, EncodingSpec, PlanSpec
from selection_ops.encoding import Encoder
from selection_ops.selectors import Budget, SelectorSettings
from tests.pipelines.worlds import IN_PROCESS
from tests.tiny import save_tiny_model, tiny_tokenizer
from tests.trainer.streams import WORDS
from tests.trainer.test_loop import journal, settings, weights
from trainer.candidate import Candidate
from trainer.loop import train
from trainer.step import OnlineStep
from trainer.stream import RankedStream

TEMPLATE = (
    "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)
Pieces = list[tuple[str, bool]]
"""A sample as pieces of text and whether loss is taken on them, cut where tokens end."""


def words(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(2, 7)))


def completion(rng: random.Random) -> tuple[dict[str, Any], Pieces]:
    prompt, answer = f"{words(rng)}:", f"\n{words(rng)}"
    return {"prompt": prompt, "completion": answer}, [(prompt, False), (answer, True)]


def chat(rng: random.Random) -> tuple[dict[str, Any], Pieces]:
    messages: list[dict[str, str]] = [{"role": "system", "content": words(rng)}] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 2)):
        messages += [{"role": "user", "content": words(rng)}, {"role": "assistant", "content": words(rng)}]
    pieces: Pieces = []
    for message in messages:
        spoken = message["role"] == "assistant"
        pieces += [(f"<bos>{message['role']}\n", False), (f"{message['content']}<eos>", spoken)]
    return {"messages": messages}, pieces


def text(rng: random.Random) -> tuple[dict[str, Any], Pieces]:
    whole = words(rng)
    return {"text": whole}, [(whole, True)]


KINDS: dict[str, tuple[Callable[[random.Random], tuple[dict[str, Any], Pieces]], CorpusColumns]] = {
    "completions": (completion, CorpusColumns(prompt="prompt", completion="completion")),
    "chats": (chat, CorpusColumns(messages="messages")),
    "text": (text, CorpusColumns()),
}


def tokens(pieces: Pieces) -> tuple[list[int], list[int]]:
    """(ids, labels): what a collator for completions makes, -100 where no loss is taken."""
    tokenizer = tiny_tokenizer()
    ids: list[int] = []
    labels: list[int] = []
    for piece, spoken in pieces:
        own = tokenizer(piece)["input_ids"]
        ids += own
        labels += own if spoken else [-100] * len(own)
    assert ids == tokenizer("".join(piece for piece, _ in pieces))["input_ids"]  # pieces end where tokens do
    return ids, labels


def exported(folder: Path, kind: str) -> tuple[Run, Path, dict[str, Pieces]]:
    """24 of 34 samples of a corpus through plan, score, select and export; the pieces of each by its text."""
    make, columns = KINDS[kind]
    rng = random.Random(3)
    rows = [make(rng) for _ in range(54)]
    for name, part in (("corpus/a", rows[:34]), ("target", rows[34:48]), ("eval", rows[48:])):
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row, _ in part))
    model = save_tiny_model(folder / "model", chat_template=TEMPLATE)
    make_plan(str(folder / "run"), str(folder / "corpus"), PlanSpec(corpus="tiny", columns=columns))
    run = Run.open(str(folder / "run"))
    options = ScoringOptions(
        model=str(model), max_tokens=100, min_tokens=2, k=32, proj_rank=4, dtype="float32", append_eos="never"
    )
    data = TargetOptions(data=str(folder / "target.jsonl"), eval=str(folder / "eval.jsonl"), columns=columns)
    describe(run, "target", "base", data, options, IN_PROCESS)
    score(run, "base", options, IN_PROCESS)
    run_select(run, "match", "base", "target", Budget(samples=24), SelectorSettings(selector="random"))
    export(run, "match", IN_PROCESS)
    return run, model, {"".join(piece for piece, _ in pieces): pieces for _, pieces in rows}


@pytest.fixture(scope="module", params=sorted(KINDS))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return exported(tmp_path_factory.mktemp(request.param), request.param)


def padded(batch: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(ids) for ids, _ in batch)
    return {
        "input_ids": torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in batch]),
        "labels": torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in batch]),
    }


def test_training_is_that_of_transformers_with_labels_of_minus_100(world: Any) -> None:
    """Three steps: losses, and final weights. float32, tolerances as in test_loop's parity test."""
    run, folder, pieces = world
    train(run, settings(folder, "parity", selection_weights=False))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, 3)
    items = [tokens(pieces[item.ranked.sample.text]) for item in RankedStream(run.path("streams/match/gen-000001"))]
    assert len(items) == 24
    losses, counts = [], []
    for start in (0, 8, 16):
        batch = padded(items[start : start + 8])
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        counts.append(int((batch["labels"][:, 1:] != -100).sum()))
    assert [row["loss"] for row in journal(run, "parity")] == pytest.approx(losses, rel=1e-5)
    decided = journal(run, "parity", "decisions")
    assert [sum(d["loss_tokens"] for d in decided if d["step"] == step) for step in (1, 2, 3)] == counts
    for name, found in weights(run, "parity", 3).items():
        true = model.state_dict()[name]
        assert float((found - true).norm() / true.norm()) < 1e-4, name


@pytest.mark.parametrize("mode", ["plain", "two-pass", "one-pass"])
def test_the_gradient_is_that_of_the_responses_alone(world: Any, mode: Any) -> None:
    """By plain SGD at rate 1 in float64, against autograd of transformers' loss over the kept: 1e-6 of the norm, since
    transformers' norms are in float32."""
    run, folder, pieces = world
    stream = RankedStream(run.path("streams/match/gen-000001"))
    encoder = Encoder(tiny_tokenizer(TEMPLATE), EncodingSpec(**stream.index.encoding))
    offered = [
        Candidate(
            sample_id=item.ranked.sample.sample_id,
            encoded=encoder.encode(item.ranked.sample.text, item.ranked.sample.loss_spans),
        )
        for item in stream.take(6)
    ]
    texts = [item.ranked.sample.text for item in RankedStream(stream.url).take(6)]
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float64)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batch = padded([tokens(pieces[text]) for text in texts])
    loss = model(**batch).loss
    gradients = dict(zip(before, torch.autograd.grad(loss, list(model.parameters()))))
    from selection_ops.online.options import PolicyOptions

    policy = "full" if mode == "plain" else "filter-then-weight"
    online = OnlineStep(
        model, torch.optim.SGD(model.parameters(), lr=1.0), policy, clip=0.0, dtype="float64",
        options=PolicyOptions(n_keep=6, metric="sgd", weights="uniform"), selection_weights=False,
        mode="two-pass" if mode == "plain" else mode,
    )  # fmt: skip
    # Compared with themselves every candidate may still be unaligned: what was kept decides the reference.
    result = online.step(offered, [item.encoded for item in offered])
    kept = sorted(result.decision.kept)
    moved = {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}
    if len(kept) < 6:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(before[name])
        loss = model(**padded([tokens(pieces[texts[index]]) for index in kept])).loss
        gradients = dict(zip(before, torch.autograd.grad(loss, list(model.parameters()))))
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    for name, true in gradients.items():
        assert float((moved[name] - true).norm()) <= 1e-6 * float(true.norm()) + 1e-12, name


def test_the_held_out_loss_is_that_of_the_responses(world: Any) -> None:
    run, folder, pieces = world
    summary = train(run, settings(folder, "held-out", steps=1, lr=0.0))
    from trainer.stream import read_beside

    stream = RankedStream(run.path("streams/match/gen-000001"))
    items = [tokens(pieces[ranked.sample.text]) for ranked in read_beside(stream.url, stream.index, "evaluation")]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert summary["eval_loss"] == pytest.approx(model(**padded(items)).loss.item(), rel=1e-5)
