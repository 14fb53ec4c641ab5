"""`lehr` commands as real processes without seconds of imports: forked from one that has imported everything and run nothing.

`python -m tests.faults.zygote` reads requests from its standard input and forks a process for each: a session of its own,
output into a file, `lehr.cli.main`. Such a process can be killed, limited and damaged like any other. Its workers, which
Beam would start by a shell command, are forked from a second such process, so that all of them are processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib
import json
import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.gcs import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]
WORKER = "lehr-fault-worker"
SUPERVISOR = "lehr-fault-supervisor"
_PRELOAD = (
    "lehr.cli", "lehr.console", "lehr.status", "lehr.verify", "lehr.commands.plan", "lehr.commands.target", "lehr.commands.score",
    "lehr.commands.select", "lehr.commands.export", "lehr.commands.status", "lehr.commands.verify", "pipelines.score",
    "pipelines.target", "pipelines.select", "pipelines.export", "pipelines.plan", "pipelines.runners", "selection_ops.engine",
    "apache_beam.runners.portability.fn_api_runner", "apache_beam.runners.portability.local_job_service",
    "apache_beam.runners.worker.sdk_worker_main", "gcsfs", "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto", "transformers.models.encoder_decoder", "apache_beam.typehints.intrinsic_one_ops",
    "pipelines.readers.jsonl", "pipelines.readers.parquet", "pipelines.readers.webdataset", "typeguard", "rich.status", "pyarrow.csv",
    "tyro._backends._tyro_backend", "lehr.status_page", "lehr.rendering", "tests.faults.arms",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status (negative: the signal) and what it wrote."""

    verb: str
    status: int
    output: str


class Process:
    """A running command."""

    def __init__(self, zygote: Zygote, pid: int, verb: str, log: Path) -> None:
        self.pid, self._zygote, self._verb, self._log = pid, zygote, verb, log
        self._handle = os.pidfd_open(pid)
        self._ended: Ended | None = None

    def done(self, seconds: float = 0.0) -> bool:
        """Whether it has ended, after waiting for at most so long."""
        if self._ended is not None:
            return True
        return bool(select.select([self._handle], [], [], max(0.0, seconds))[0])

    def kill(self) -> None:
        """SIGKILL, to this process alone; nothing where it has ended."""
        signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def family(self) -> dict[str, list[int]]:
        """Living processes of its session by kind: `supervisor` and `worker`."""
        found: dict[str, list[int]] = {"supervisor": [], "worker": []}
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):
                name, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(")")
                fields = rest.split()
                kind = {SUPERVISOR[:15]: "supervisor", WORKER[:15]: "worker"}.get(name)
                if kind and int(fields[3]) == self.pid and fields[0] != "Z":
                    found[kind].append(int(folder.name))
        return found

    def wait(self, seconds: float = 120.0) -> Ended:
        """Its end; one that does not end is killed and fails."""
        if self._ended is None:
            late = not self.done(seconds)
            if late:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
                self.done(30)
            status = self._zygote.reap(self.pid)
            os.close(self._handle)
            # One that was killed at once has not even opened it.
            said = self._log.read_text(errors="replace") if self._log.exists() else ""
            if late:
                said += f"\nTraceback: it did not end within {seconds} s"
            self._ended = Ended(self._verb, status, said)
        return self._ended


class Zygote:
    """The process that others are forked from, as its user sees it; one lane of work, not shared between threads."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with (folder / "zygote.log").open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.zygote"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def _ask(self, request: dict[str, Any]) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that forks commands has ended: {self._folder / 'zygote.log'}")
        return int(answer)

    def start(
        self, *argv: str, env: Mapping[str, str] | None = None, arms: Sequence[tuple[str, Mapping[str, Any]]] = ()
    ) -> Process:
        """Start `lehr ARGV`; `arms` are functions of `tests.faults.arms`, called there first."""
        self._count += 1
        log = self._folder / f"{self._count:06d}-{argv[0]}.log"
        request = {"argv": argv, "env": dict(env or {}), "log": str(log), "arms": [[n, dict(k)] for n, k in arms]}
        return Process(self, self._ask(request), argv[0], log)

    def run(self, *argv: str, **how: Any) -> Ended:
        """Run `lehr ARGV` to its end."""
        return self.start(*argv, **how).wait()

    def reap(self, pid: int) -> int:
        """Exit status of an ended process; its id is free afterwards."""
        return self._ask({"reap": pid})

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


# In the forked processes.


def _rename(name: str) -> None:
    """How this process is called in /proc."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)


def _output_to(path: str) -> None:
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number, handle in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(handle, number)


def _end(body: Callable[[], int | None]) -> None:
    """Run, then end this process as Python would."""
    code: Any = 1
    try:
        code = body() or 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


class _ForkedWorker:
    """What Beam holds of a worker: the part of `subprocess.Popen` that it uses."""

    def __init__(self, nursery: str, environment: Mapping[str, str]) -> None:
        self.returncode: int | None = None
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(nursery)
        # A worker writes where the process that asked for it does.
        request = [os.readlink("/proc/self/fd/2"), dict(environment)]
        self._socket.sendall(json.dumps(request).encode() + b"\n")

    def wait(self) -> int:
        if self.returncode is None:
            data = b""
            while not data.endswith(b"\n") and (block := self._socket.recv(64)):
                data += block
            self.returncode = int(data or b"1")
        return self.returncode

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        """Beam's own tidying; the worker ends with its supervisor."""


def _nursery(server: socket.socket, parent: int) -> None:
    """Fork a worker for every connection and tell it how the worker ended; ends with the command and the last worker."""
    from pipelines.engines import worker

    workers: dict[int, socket.socket] = {}
    server.settimeout(0.05)
    while os.getppid() == parent or workers:
        with contextlib.suppress(TimeoutError):
            connection, _ = server.accept()
            connection.settimeout(10)
            line = connection.makefile("rb").readline()
            pid = os.fork()
            if pid == 0:
                server.close()
                connection.close()
                _rename(WORKER)
                output, environment = json.loads(line)
                with contextlib.suppress(OSError):
                    _output_to(output)
                os.environ.clear()
                os.environ.update(environment)
                _end(worker.main)
            workers[pid] = connection
        while workers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            connection = workers.pop(pid)
            # As a shell says it: 128 and the signal.
            code = os.waitstatus_to_exitcode(status)
            with contextlib.suppress(OSError):
                connection.sendall(f"{code if code >= 0 else 128 - code}\n".encode())
            connection.close()
    os._exit(0)


def _fork_workers() -> None:
    """From now on supervisor and workers of this command are forked; the nursery is, before any thread runs here."""
    from apache_beam.runners.portability import local_job_service

    parent = os.getpid()
    address = f"\0lehr-faults-{parent}"
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen(64)
    if os.fork() == 0:
        _nursery(server, parent)
    server.close()

    def popen(command: Any, *, shell: bool, env: Mapping[str, str]) -> _ForkedWorker:
        return _ForkedWorker(address, env)

    subprocess_module: Any = local_job_service.subprocess
    replaced: Any = type("subprocess", (), {**vars(subprocess_module), "Popen": staticmethod(popen)})
    local_job_service.subprocess = replaced
    forking = multiprocessing.get_context("fork")

    class Supervisor(forking.Process):  # type: ignore[name-defined, misc]
        def run(self) -> None:
            _rename(SUPERVISOR)
            super().run()

    context = type("context", (), {"Pipe": staticmethod(forking.Pipe), "Process": Supervisor})
    multiprocessing.get_context = lambda method=None: context  # type: ignore[assignment]


def _command(request: dict[str, Any]) -> int:
    from lehr.cli import main
    from tests.faults import arms

    os.environ.update(request["env"])
    argv = request["argv"]
    if "--workers" in argv and argv[argv.index("--workers") + 1] != "1":
        _fork_workers()
    for name, settings in request["arms"]:
        getattr(arms, name)(**settings)
    return main(argv)


def serve() -> None:
    """Fork a process for every request until standard input ends."""
    for name in _PRELOAD:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if "reap" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["reap"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                os.setsid()
                _output_to(request["log"])
                _end(functools.partial(_command, request))
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
