"""Lehr selects the data that a language model is annealed or fine-tuned on.

What other people's code uses is here: `from lehr import RankedStream, OnlineStep`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer import Candidate, MixedStream, OnlineStep, RankedStream, TokenStream, pad

__all__ = ["Candidate", "MixedStream", "OnlineStep", "RankedStream", "TokenStream", "pad"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: the command must not wait for torch.
    if name in __all__:
        import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'lehr' has no attribute {name!r}")
