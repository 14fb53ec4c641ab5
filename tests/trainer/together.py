"""Trainings in several real processes, forked from this one: without the seconds that each would take to import torch."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from trainer.__main__ import main


class Group:
    """Processes of `python -m trainer ARGUMENTS` as torchrun would start them; what they print goes to files in `folder`."""

    def __init__(
        self,
        count: int,
        arguments: list[str],
        folder: Path,
        *,
        last: list[str] | None = None,
        run: Callable[[list[str]], int] = main,
    ) -> None:
        """`last` are the arguments of the last process, where they are not those of all; `run` is what is done with them."""
        self._run = run
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self.logs = [folder / f"process-{index}.log" for index in range(count)]
        given = [*[arguments] * (count - 1), last or arguments]
        self.pids = [self._fork(index, count, port, given[index]) for index in range(count)]
        self._codes: dict[int, int] = {}

    def _fork(self, index: int, count: int, port: int, arguments: list[str]) -> int:
        self.logs[index].write_text("")
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return pid
        code = 70
        try:
            log = os.open(self.logs[index], os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            os.environ.update(
                RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
            )  # fmt: skip
            logging.getLogger().handlers.clear()  # pytest's
            code = self._run(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def output(self, index: int) -> str:
        """What a process has printed."""
        return self.logs[index].read_text(errors="replace")

    def steps(self) -> int:
        """Steps that process 0 has reported."""
        return self.output(0).count("\nstep ") + self.output(0).startswith("step ")

    def kill(self, index: int) -> None:
        """SIGKILL."""
        os.kill(self.pids[index], signal.SIGKILL)

    def wait(self, seconds: float = 120) -> list[int]:
        """Exit statuses (negative: the signal), in order; fails, and ends them, where they are not there within some time."""
        end = time.monotonic() + seconds
        while len(self._codes) < len(self.pids):
            for index, pid in enumerate(self.pids):
                if index not in self._codes:
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    if ended:
                        self._codes[index] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                left = [index for index in range(len(self.pids)) if index not in self._codes]
                self.end()
                raise AssertionError(f"processes {left} did not end within {seconds} s: {self.output(left[0])[-2000:]}")
            time.sleep(0.01)
        return [self._codes[index] for index in range(len(self.pids))]

    def end(self) -> None:
        """End whatever is left."""
        for index, pid in enumerate(self.pids):
            if index not in self._codes:
                os.kill(pid, signal.SIGKILL)
                self._codes[index] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
