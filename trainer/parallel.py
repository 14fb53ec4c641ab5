"""The processes of one training: who they are, how work is shared out, and how what each has formed is brought together.

A training in one process goes the same way: `OneProcess` shares everything out to itself, and sums are what it was given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from schemas.errors import InputError, LehrError

T = TypeVar("T")

BUCKET_BYTES = 32 << 20
"""Gradients summed by one exchange, at most (a larger one stands alone)."""

_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out", re.IGNORECASE)
_TYPE, _FIELDS, _ERROR = "type", "fields", "error"


class OneProcess:
    """A training in one process, and what all of them have in common."""

    index: int = 0
    """Which of the processes this is, from 0."""
    count: int = 1
    """How many there are."""

    def __init__(self) -> None:
        # What torchrun has started should end with it: else a training that is started again meets the one before at its files.
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def check_launcher(self) -> None:
        """Raise `LehrError` where torchrun started this process and has been killed since."""
        if self._launcher is not None and os.getppid() != self._launcher:
            raise LehrError(
                f"process {self.index} of {self.count} ends: torchrun, which started it, is gone. "
                "Run the same command again: it goes on from the newest checkpoint"
            )

    @property
    def leads(self) -> bool:
        """Whether this is process 0, which decides, and writes what all have done."""
        return self.index == 0

    def shares(self, costs: Sequence[int]) -> list[list[int]]:
        """Places of `costs` by process, sums of costs balanced: the dearest first, each to whoever has least.

        A pure function of its argument: every process knows the shares of all.
        """
        shares: list[list[int]] = [[] for _ in range(self.count)]
        sums = [0] * self.count
        for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
            least = min(range(self.count), key=lambda process: (sums[process], process))
            shares[least].append(place)
            sums[least] += costs[place]
        return [sorted(share) for share in shares]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of every process's `tensor`; of zeros and one value, that value exactly."""
        return tensor

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by the sum over processes."""

    def decide(self, make: Callable[[], T], kinds: tuple[type, ...] = ()) -> T:
        """What `make` returns on process 0, on every process; an error there is an error everywhere.

        Made of tensors, numbers, text, lists, tuples, dictionaries, and of the dataclasses `kinds`.
        """
        return make()

    def every(self, value: T) -> list[T]:
        """The values of all processes, in their order."""
        return [value]

    def align(self, tensors: Sequence[Tensor]) -> bool:
        """Give every process the tensors of process 0, in place, where any differ in a bit; returns whether any did."""
        return False

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Inside, an exchange that fails because another process is gone is a `LehrError` that says so."""
        yield

    def close(self) -> None:
        """Leave the others, at the end of a training."""


class Processes(OneProcess):
    """The processes of torch's default process group."""

    def __init__(self, *, timeout_s: float, owns: bool) -> None:
        super().__init__()
        self.index, self.count = dist.get_rank(), dist.get_world_size()
        self._timeout_s, self._owns = timeout_s, owns

    def sum(self, tensor: Tensor) -> Tensor:
        """See `OneProcess.sum`."""
        tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """See `OneProcess.sum_gradients`; what has a gradient in some process only counts as zero in the others."""
        parameters = list(parameters)
        here = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
        used = [parameter for parameter, known in zip(parameters, self.sum(here).tolist()) if known]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([parameter.grad for parameter in used if parameter.grad is not None]):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, piece in zip(bucket, flat.split([gradient.numel() for gradient in bucket])):
                gradient.copy_(piece.view_as(gradient))

    def decide(self, make: Callable[[], T], kinds: tuple[type, ...] = ()) -> T:
        """See `OneProcess.decide`."""
        if self.leads:
            try:
                value = make()
            except LehrError as error:
                self._send({_ERROR: str(error)}, 0)
                raise
            self._send(_packed(value, kinds), 0)
            return value
        found = self._send(None, 0)
        if isinstance(found, dict) and found.keys() == {_ERROR}:
            raise LehrError(f"process 0: {found[_ERROR]}")
        return _unpacked(found, {kind.__name__: kind for kind in kinds})

    def every(self, value: T) -> list[T]:
        """See `OneProcess.every`."""
        return [self._send(value if process == self.index else None, process) for process in range(self.count)]

    def _send(self, value: Any, source: int) -> Any:
        """Broadcast by torch's restricted reader: no object but tensors and plain containers comes out of it."""
        data = b""
        if source == self.index:
            buffer = io.BytesIO()
            torch.save(value, buffer)
            data = buffer.getvalue()
        size = torch.tensor([len(data)])
        dist.broadcast(size, source)
        body = (
            torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(int(size), dtype=torch.uint8)
        )
        dist.broadcast(body, source)
        if source == self.index:
            return value
        return torch.load(io.BytesIO(body.numpy().tobytes()), weights_only=True, map_location="cpu")

    def align(self, tensors: Sequence[Tensor]) -> bool:
        """See `OneProcess.align`."""
        digests = self.every([_digest(tensor) for tensor in tensors])
        differing = [tensor for place, tensor in enumerate(tensors) if len({digest[place] for digest in digests}) > 1]
        for tensor in differing:
            held = tensor.detach().contiguous()
            dist.broadcast(held, 0)
            tensor.detach().copy_(held)
        return bool(differing)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """See `OneProcess.together`."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not _LOST.search(str(error)):
                raise
            raise LehrError(
                f"process {self.index} of {self.count} lost the others: one of them ended, whose own message says why, or did not answer "
                f"within {self._timeout_s:.0f} s. Run the same command again: it goes on from the newest checkpoint "
                f"({str(error).splitlines()[0]})"
            ) from error

    def close(self) -> None:
        """See `OneProcess.close`."""
        if self._owns:
            dist.destroy_process_group()


def join_processes(device: str, timeout_s: float) -> OneProcess:
    """The processes that torchrun, or whoever set its environment, has started; `OneProcess` where it started one.

    A process group that exists is used. Raises `InputError` for an environment that is not whole, `LehrError` where the others do not come.
    """
    if dist.is_available() and dist.is_initialized():
        return Processes(timeout_s=timeout_s, owns=False) if dist.get_world_size() > 1 else OneProcess()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return OneProcess()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and {', '.join(missing)} is not set: start with torchrun, or set what it sets"
        )
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    try:
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as error:
        raise LehrError(
            f"the {os.environ['WORLD_SIZE']} processes of the training did not come together at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {str(error).splitlines()[0]}"
        ) from error
    return Processes(timeout_s=timeout_s, owns=True)


def local_device(device: str) -> str:
    """The device of this process: of several accelerators of a host the one that torchrun's LOCAL_RANK counts to."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def _digest(tensor: Tensor) -> int:
    """A sum over the bits that does not depend on the order of summing: equal tensors have equal ones on any machine."""
    whole_number = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    words, found = tensor.detach().reshape(-1).view(whole_number), 0
    for part in words.split(1 << 20):
        found = (31 * found + int(part.sum(dtype=torch.int64))) % (2**61 - 1)
    return found


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in order, in groups of one dtype and device and of bounded bytes."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        bytes_here = tensor.numel() * tensor.element_size()
        same = bool(bucket) and (bucket[0].dtype, bucket[0].device) == (tensor.dtype, tensor.device)
        if bucket and (not same or size + bytes_here > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += bytes_here
    if bucket:
        yield bucket


def _packed(value: Any, kinds: tuple[type, ...]) -> Any:
    if isinstance(value, kinds):
        fields = {field.name: _packed(getattr(value, field.name), kinds) for field in dataclasses.fields(value)}  # type: ignore[arg-type]
        return {_TYPE: type(value).__name__, _FIELDS: fields}
    if isinstance(value, list | tuple):
        return type(value)(_packed(held, kinds) for held in value)
    return value


def _unpacked(value: Any, kinds: dict[str, type]) -> Any:
    if isinstance(value, dict) and value.keys() == {_TYPE, _FIELDS}:
        return kinds[value[_TYPE]](**{name: _unpacked(held, kinds) for name, held in value[_FIELDS].items()})
    if isinstance(value, list | tuple):
        return type(value)(_unpacked(held, kinds) for held in value)
    return value
