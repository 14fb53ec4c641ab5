"""Streams in other people's loaders and trainers, and the examples of docs/streams.md, as they stand there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
import webdataset
from transformers import AutoModelForCausalLM

from lehr import MixedStream, RankedStream, TokenStream, pad
from schemas.errors import InputError
from schemas.run import Run
from selection_ops.batching import collate
from selection_ops.encoding import Encoder
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainer.streams import ENCODING, make_run, ranked, sample, write_stream
from tests.trainer.test_loop import journal, settings, weights
from trainer.loop import train

ROOT = Path(__file__).resolve().parents[2]
ROWS = 40


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    return make_run(tmp_path_factory.mktemp("loaders"), samples=ROWS)


@pytest.fixture(scope="module")
def url(world: tuple[Run, Path]) -> str:
    return world[0].path("streams/match/gen-000001")


def example(number: int) -> dict[str, Any]:
    text = (ROOT / "docs" / "streams.md").read_text()
    code = text.split("```python\n")[number].split("```")[0]
    place: dict[str, Any] = {}
    exec(compile(code, "docs/streams.md", "exec"), place)
    return place


def make(kind: str, url: str, **options: Any) -> Any:
    if kind == "mixed":
        streams = {"a": (RankedStream(url), 0.6), "b": (RankedStream(url, seed=4, epochs=2), 0.4)}
        return MixedStream(streams, **options)
    stream = RankedStream(url, epochs=2, **options)
    return TokenStream(stream, tiny_tokenizer()) if kind == "tokens" else stream


def positions(items: Any) -> list[int]:
    return [item["position"] if isinstance(item, dict) else item.position for batch in items for item in batch]


def as_they_are(items: Any) -> Any:
    return items


@pytest.mark.parametrize("kind", ["ranked", "mixed", "tokens"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("prefetch", [0, 7])
def test_a_stateful_loader_goes_on_exactly(url: str, kind: str, workers: int, prefetch: int) -> None:
    """At any batch, the first and the last too; without workers and with two."""
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")

    def loader() -> Any:
        stream = make(kind, url, prefetch=prefetch)
        return torchdata.StatefulDataLoader(stream, batch_size=6, num_workers=workers, collate_fn=as_they_are)

    whole, states, done = [], [], loader()
    states.append(done.state_dict())
    for batch in done:
        whole.append(batch)
        states.append(done.state_dict())
    assert sorted(positions(whole)) == list(range(len(make(kind, url))))
    for number in {0, 1, 5, len(whole) - 1}:
        again = loader()
        again.load_state_dict(states[number])
        assert list(again) == whole[number:]
    if workers:
        fewer = torchdata.StatefulDataLoader(make(kind, url), batch_size=6, num_workers=0, collate_fn=as_they_are)
        worker = states[1]["_snapshot"]["_worker_snapshots"]["worker_0"]["dataset_state"]
        fewer.dataset.load_state_dict(worker)
        with pytest.raises(InputError, match="taken in 2 workers"):
            next(iter(fewer.dataset))


def test_an_iteration_of_tokens_begins_anew_and_a_pass_is_an_epoch_of_the_stream(url: str) -> None:
    tokens = TokenStream(RankedStream(url), tiny_tokenizer())
    passes = []
    for epoch in (0, 1):
        tokens.set_epoch(epoch)
        passes.append([item["rank"] for item in tokens])
        for item in tokens:
            assert item["rank"] == passes[-1][0]
            break
    assert passes[0] + passes[1] == [item.ranked.rank for item in RankedStream(url, epochs=2)]
    assert len(tokens) == ROWS


def test_tokens_are_those_of_a_step(url: str) -> None:
    """Ids, attention and labels against `collate`, which every step of Lehr's own uses; a sample with a prompt among them."""
    stream = RankedStream(url)
    items = list(TokenStream(stream, tiny_tokenizer()))[:5]
    encoder = Encoder(tiny_tokenizer(), ENCODING)
    encoded = [encoder.encode(o.ranked.sample.text, o.ranked.sample.loss_spans) for o in RankedStream(url).take(5)]
    batch, mine = collate(encoded), pad(items)
    real = batch.attention_BT
    assert torch.equal(mine["attention_mask"].bool(), real)
    assert torch.equal(mine["input_ids"][real], batch.ids_BT[real])
    assert torch.equal(mine["labels"] != -100, batch.loss_BT)
    assert torch.equal(mine["labels"][batch.loss_BT], batch.ids_BT[batch.loss_BT])
    assert items[0]["tokens"] == len(items[0]["input_ids"])
    with pytest.raises(InputError, match="at least one sample"):
        pad([])


def test_labels_leave_out_what_carries_no_loss(tmp_path: Path) -> None:
    text = "the quick brown fox jumps over the lazy dog"
    write_stream(str(tmp_path), ranked([sample("words", 0, text, start=20)]))
    (item,) = TokenStream(RankedStream(str(tmp_path)), tiny_tokenizer())
    labels = [label for label in item["labels"] if label != -100]
    assert 0 < len(labels) < item["tokens"]
    assert item["labels"][-len(labels) :] == item["input_ids"][-len(labels) :]


def test_webdataset_reads_the_shards_of_a_stream(url: str) -> None:
    """The package itself, over the files as they stand, ranks in order."""
    shards = sorted(str(path) for path in Path(url).glob("shard-*.tar"))
    records = [orjson.loads(item["json"]) for item in webdataset.WebDataset(shards, shardshuffle=False)]
    assert [record["rank"] for record in records] == list(range(ROWS))
    assert [record["text"] for record in records] == [o.ranked.sample.text for o in RankedStream(url, order="ranked")]


def test_the_plain_loop_of_the_documentation(url: str) -> None:
    losses = example(1)["fine_tune"](tiny_llama(), tiny_tokenizer(), url)
    assert len(losses) == 5
    assert losses[-1] < losses[0]


def test_the_stateful_loader_of_the_documentation(url: str) -> None:
    pytest.importorskip("torchdata.stateful_dataloader")
    batches = example(2)["batches"]
    whole = list(batches(tiny_tokenizer(), url))
    again = list(batches(tiny_tokenizer(), url, state=whole[1][1]))
    plain = list(batches(tiny_tokenizer(), url, workers=0))
    assert len(whole) == len(plain) == 5
    for mine, other in ((whole[2:], again), (whole, plain)):
        assert [batch["input_ids"].tolist() for batch, _ in mine] == [batch["input_ids"].tolist() for batch, _ in other]


def test_the_trainer_of_the_documentation_also_after_a_stop(world: tuple[Run, Path], url: str, tmp_path: Path) -> None:
    """transformers' Trainer over two passes; a run resumed in the second pass ends with the same weights, bit for bit."""
    fine_tune = example(3)["fine_tune"]
    more = {"use_cpu": True, "disable_tqdm": True, "save_steps": 1, "logging_steps": 1}
    whole = fine_tune(tiny_llama(), tiny_tokenizer(), url, str(tmp_path / "whole"), **more)
    assert whole.state.global_step == 10
    place = tmp_path / "whole" / "checkpoint-7"
    resumed = fine_tune(tiny_llama(), tiny_tokenizer(), url, str(tmp_path / "cut"), resume=str(place), **more)
    mine, other = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    logged = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (whole, resumed)]
    assert logged[0] == logged[1]
    # The same ten steps as Lehr's own loop over two epochs: order, losses and weights.
    run, folder = world
    train(run, settings(folder, "own", epochs=2, lr=1e-3))
    assert [row["loss"] for row in journal(run, "own")] == pytest.approx([float(loss) for loss in logged[0]], abs=1e-3)
    for name, found in weights(run, "own", 10).items():
        assert float((found - mine[name]).norm() / mine[name].norm()) < 1e-3, name


def test_the_trainer_with_workers_sees_every_sample_once(url: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    seen: list[list[int]] = []

    class Watching(Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.extend(ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"]))
            return super().training_step(model, inputs, *args, **kwargs)

    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=8, num_train_epochs=1, dataloader_num_workers=2, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    data = TokenStream(RankedStream(url, worker_block=8), tiny_tokenizer())
    Watching(
        model=AutoModelForCausalLM.from_config(tiny_llama().config),
        args=arguments,
        train_dataset=data,
        data_collator=pad,
    ).train()
    assert sorted(seen) == sorted(item["input_ids"] for item in TokenStream(RankedStream(url), tiny_tokenizer()))
