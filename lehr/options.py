"""Options that several verbs share."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from schemas.spec import CorpusColumns

RunDir = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColumnOptions:
    """Which columns hold what; rows are text, or prompt + completion, or messages."""

    text_column: str = "text"
    """Column of plain text; read when neither prompt and completion nor messages are named."""
    prompt_column: str = ""
    """Column of prompts; loss is then taken on the completion alone."""
    completion_column: str = ""
    """Column of completions."""
    messages_column: str = ""
    """Column of chat messages, a list of {role, content}; loss is taken on what the assistant says."""
    id_column: str = ""
    """Column of your own identifiers."""
    domain_column: str = ""
    """Column that names the domain of a row, for reports and quotas."""
    keep_columns: tuple[str, ...] = ()
    """Further columns that travel with the sample into selection and shards."""

    def columns(self) -> CorpusColumns:
        """The columns as the plan stores them."""
        return CorpusColumns(
            text=self.text_column,
            prompt=self.prompt_column,
            completion=self.completion_column,
            messages=self.messages_column,
            id=self.id_column,
            domain=self.domain_column,
            keep=self.keep_columns,
        )
