"""A soup: the mean of the final weights of several trainings, over data orders or seeds, as one model folder (Wortsman et al., arXiv
2203.05482; Llama 3 and DCLM average annealing runs this way)."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from schemas.errors import InputError
from schemas.fingerprint import pretty_json
from schemas.manifest import Manifest
from schemas.run import Run
from schemas.shards import read_index
from schemas.spec import EncodingSpec
from schemas.storage import join, list_folders, list_names, sha256, write_whole
from selection_ops.adapters import is_adapter
from selection_ops.encoding import Encoder
from selection_ops.losses import HeadRoute
from selection_ops.model import choose_attention, default_dtype, load_model, quiet, save_tokenizer
from trainer.batches import StepBatches
from trainer.checkpoints import load_weights, verify_checkpoint
from trainer.evaluation import evaluate
from trainer.parallel import local_device
from trainer.prepare import encode
from trainer.settings import SoupSettings
from trainer.stream import read_beside

SOUP_FILE = "average.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Soup:
    """What came of it; losses are held-out, nats per token, None where there is no held-out set."""

    url: str
    loss: float | None
    members: dict[str, float | None]
    """Loss of every training that went in."""


def average_trainings(run: Run, trainings: Sequence[str], settings: SoupSettings) -> Soup:
    """Write the mean of the final weights of finished `trainings`, which count alike; sums are taken in float64.

    Raises `InputError` for fewer than two trainings, adapters (the mean of two products is not the product of the means), a place that
    is taken, and `LehrError` for models that differ in their parameters.
    """
    if len(set(trainings)) != len(trainings) or len(trainings) < 2:
        raise InputError(f"an average takes at least two different trainings, not {', '.join(trainings) or 'none'}")
    if not settings.out:
        raise InputError("say with --out where to write the averaged model")
    if list_names(settings.out) or list_folders(settings.out):
        raise InputError(f"{settings.out} holds something already; choose another place for the averaged model")
    manifests = [run.manifest("train", name) for name in trainings]
    places = {m.name: run.path(m.summary["checkpoint"]) for m in manifests}
    for name, url in places.items():
        if is_adapter(url):
            raise InputError(
                f"training {name!r} trained an adapter, and the mean of adapters is not the adapter of the mean: train with --merge, and "
                "average whole models"
            )
        verify_checkpoint(url)
    device = local_device(settings.device)
    dtype = settings.dtype or default_dtype(device)
    first = places[manifests[0].name]
    with quiet():
        loaded = load_model(
            first,
            dtype="float64" if dtype == "float64" else "float32",
            attention=choose_attention(first, device, dtype),
            device=device,
        )
    model: Any = loaded.model
    samples = _held_out(run, manifests[0], settings.stream, loaded.tokenizer)
    batches = StepBatches(batch_tokens=settings.batch_tokens, dtype=dtype, device=next(model.parameters()).device)
    route = HeadRoute(model)
    sums = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in model.named_parameters()}
    losses: dict[str, float | None] = {}
    for name, url in places.items():
        load_weights(model, url)
        losses[name] = evaluate(route, samples, batches)
        for key, parameter in model.named_parameters():
            sums[key] += parameter.detach()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(sums[key] / len(places))
    found = Soup(url=settings.out, loss=evaluate(route, samples, batches), members=losses)
    _write(found, model, loaded, manifests)
    return found


def _held_out(run: Run, training: Manifest, stream: str, tokenizer: Any) -> list[Any]:
    """The held-out samples of a stream, encoded as it says."""
    url = stream
    if not url:
        wanted = training.inputs["stream"]
        for manifest in run.manifests("export"):
            there = run.path(run.stream_folder(str(manifest.spec["stream"]), int(manifest.spec["generation"])))
            if read_index(there).fingerprint == wanted:
                url = there
    if not url:
        raise InputError(
            f"the stream that {training.name!r} was trained on is none of this run's; name its folder with --stream"
        )
    index = read_index(url)
    encoder = Encoder(tokenizer, EncodingSpec(**index.encoding))
    return [encode(encoder, item) for item in read_beside(url, index, "evaluation")]


def _write(found: Soup, model: Any, loaded: Any, manifests: Sequence[Manifest]) -> None:
    """The model folder, and last what it was made from, with a hash of every file."""
    files = []
    with tempfile.TemporaryDirectory() as scratch, quiet():
        model.save_pretrained(scratch)
        save_tokenizer(loaded, Path(scratch))
        for file in sorted(path for path in Path(scratch).rglob("*") if path.is_file()):
            name, data = file.relative_to(scratch).as_posix(), file.read_bytes()
            write_whole(join(found.url, name), data)
            files.append({"path": name, "bytes": len(data), "sha256": sha256(data)})
    record = {
        "trainings": {manifest.name: manifest.fingerprint for manifest in manifests},
        "eval_loss": found.loss,
        "member_eval_loss": found.members,
        "files": files,
    }
    write_whole(join(found.url, SOUP_FILE), pretty_json(record))
