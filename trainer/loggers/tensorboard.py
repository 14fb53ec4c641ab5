"""TensorBoard event files: every number of the journal's rows as a scalar, by step."""

from __future__ import annotations

from schemas.errors import InputError
from schemas.storage import join
from trainer.loggers.base import Begun, Progress, logger

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    raise InputError("logger tensorboard needs the package tensorboard: pip install 'lehr[tensorboard]'") from error

FOLDER = "tensorboard"


@logger("tensorboard")
class TensorBoard:
    """Scalars `steps/<column>` and `timings/<column>`. They hold seconds, so they stand under `timings/train/<name>/tensorboard`.

    Event files are appended to, whole or not. What an earlier process wrote of steps after its last checkpoint is hidden
    when the training goes on: those steps are taken again.
    """

    def __init__(self, begun: Begun) -> None:
        self._writer = SummaryWriter(join(begun.folder, FOLDER), purge_step=begun.steps_done + 1)

    def step(self, event: Progress) -> None:
        """Write the numbers of a step."""
        for table, row in (("steps", event.row), ("timings", event.timing)):
            for name, value in row.items():
                if isinstance(value, int | float) and name not in ("step", "process"):
                    self._writer.add_scalar(f"{table}/{name}", value, event.step)

    def close(self) -> None:
        """Flush what is left."""
        self._writer.close()
