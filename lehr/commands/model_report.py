"""`lehr model-report`: what of a model scoring would attribute, and what that leaves out."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import tyro

_TEXTS = (
    "Water boils at a lower temperature on a mountain, because the air above it weighs less and presses on it less.",
    "def mean(values):\n    if not values:\n        raise ValueError('no values')\n    return sum(values) / len(values)\n",
    "A train leaves at nine and covers 180 kilometres in two hours. Its speed is 180 / 2 = 90 kilometres per hour.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """List every parameter of a model with the site that attributes it, or the reason that none does.

    A scoring attributes the linear maps of the blocks (`lehr score --attribute blocks`, the default), everything that can be
    (`--attribute all`), or what an adapter folder adds (`--attribute adapters`, the default for one). What each covers is counted twice: in parameters, and in squared gradient norm on a few texts, which is
    what inner products of gradients are made of. Layers that differ in their number alone share a line.
    """

    model: tyro.conf.Positional[str]
    """Causal language model: a local folder, a .gguf file, an fsspec URL, or a hub id; the folder may be a PEFT adapter's."""
    revision: str | None = None
    """Revision of a hub id."""
    texts: str = ""
    """File with a text a line to take gradients of; by default three short ones that come with Lehr."""
    max_tokens: int = 256
    """Tokens of a text that are looked at."""
    every: bool = False
    """A line for each parameter, without joining layers."""
    out: str = ""
    """JSON file for all of it: every parameter, every input group."""

    def run(self) -> int:
        """Print the tables; always 0."""
        from rich.progress import Progress
        from rich.table import Table

        from lehr.console import console, errors
        from schemas.fingerprint import plain, pretty_json
        from schemas.spec import EncodingSpec
        from schemas.storage import normalise, write_whole
        from selection_ops.encoding import Encoded, Encoder
        from selection_ops.model import choose_attention, load_model, quiet
        from selection_ops.model_report import report_model

        with quiet():
            loaded = load_model(
                self.model,
                revision=self.revision,
                dtype="float32",
                attention=choose_attention(self.model, "cpu", "float32", revision=self.revision),
            )
        encoder = Encoder(loaded.tokenizer, EncodingSpec(max_tokens=self.max_tokens, min_tokens=2))
        whole = [encoder.encode(text, [(0, len(text))]) for text in self._texts()]
        encoded = [Encoded(ids=e.ids[: self.max_tokens], loss_mask=e.loss_mask[: self.max_tokens]) for e in whole]
        with Progress(console=errors, transient=True) as progress:
            task = progress.add_task("gradients", total=len(encoded))
            report = report_model(loaded.model, encoded, tick=lambda: progress.advance(task), adapters=loaded.adapters)
        lines: dict[tuple[str, ...], list[Any]] = {}
        for parameter in report.parameters:
            name = parameter.name if self.every else re.sub(r"(?<=\.)\d+(?=\.)", "*", parameter.name)
            lines.setdefault((name, parameter.site_type, parameter.reason), []).append(parameter)
        table = Table(title=f"{report.architecture}: parameters and their sites", title_justify="left")
        table.add_column("parameter", overflow="fold")
        table.add_column("site", overflow="fold")
        for heading in ("count", "numbers", "gradient"):
            table.add_column(heading, justify="right", no_wrap=True)
        for (name, kind, reason), held in lines.items():
            share = sum(parameter.gradient_share for parameter in held)
            numbers = sum(parameter.numbers for parameter in held)
            marks = f"{' (blocks)' if held[0].blocks else ''}{' (adapter)' if held[0].adapter else ''}"
            site = f"{kind}{marks}" if kind else f"none: {reason}"
            table.add_row(name, site, str(len(held)), f"{numbers:,}", f"{share:.2%}")
        console.print(table)
        shared = [group for group in report.input_groups if len(group) > 1]
        console.print(
            f"{len(report.input_groups)} input groups; {len(shared)} of them serve several sites with one projection"
            + (f", as {', '.join(shared[0][:4])}" if shared else "")
        )
        for attribute in report.kinds:
            numbers, share = report.covered(attribute)
            console.print(
                f"--attribute {attribute}: {numbers:.1%} of the parameters, {share:.1%} of the squared gradient norm"
            )
        console.print(
            f"Gradient: share of the squared gradient norm, mean over {report.samples} texts, {report.tokens} tokens."
        )
        if self.out:
            record = {**plain(report), "covered": {kind: report.covered(kind) for kind in report.kinds}}
            write_whole(normalise(self.out), pretty_json(record))
        return 0

    def _texts(self) -> list[str]:
        from schemas.errors import InputError
        from schemas.storage import normalise, read_bytes

        texts = list(_TEXTS)
        if self.texts:
            try:
                lines = read_bytes(normalise(self.texts)).decode().splitlines()
            except FileNotFoundError as error:
                raise InputError(f"{self.texts} does not exist") from error
            except UnicodeDecodeError as error:
                raise InputError(f"{self.texts} is not UTF-8 ({error})") from error
            texts = [line for line in lines if line.strip()]
            if not texts:
                raise InputError(f"{self.texts} holds no text; write one a line")
        return texts
