"""The trainer: ranked streams, the online step, checkpoints, the journal."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.candidate import Candidate, StepResult
    from trainer.loop import train
    from trainer.mixing import MixedStream
    from trainer.settings import TrainSettings
    from trainer.step import OnlineStep
    from trainer.stream import Offered, RankedStream
    from trainer.token_stream import TokenStream, pad

__all__ = [
    "Candidate",
    "MixedStream",
    "Offered",
    "OnlineStep",
    "RankedStream",
    "StepResult",
    "TokenStream",
    "TrainSettings",
    "pad",
    "train",
]

_HOMES = {
    "Candidate": "trainer.candidate",
    "MixedStream": "trainer.mixing",
    "Offered": "trainer.positioned",
    "OnlineStep": "trainer.step",
    "RankedStream": "trainer.stream",
    "StepResult": "trainer.candidate",
    "TokenStream": "trainer.token_stream",
    "TrainSettings": "trainer.settings",
    "pad": "trainer.token_stream",
    "train": "trainer.loop",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for: settings and help texts must not wait for torch.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'trainer' has no attribute {name!r}")
