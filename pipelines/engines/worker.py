"""A local worker process: Beam's own, which ends with its supervisor from its first moment on.

Beam's worker waits up to a minute for its logs' receiver and then another for whoever gives it work, and it finishes the bundle it is
at, which may be hours of work for nobody on a device that the next attempt needs. So nothing of Beam is imported before the
process follows its supervisor.
"""

from __future__ import annotations

import fcntl
import os
import sys
import threading

WORKER_LOST = 75
LOCK = "LEHR_SUPERVISOR_LOCK"
"""Variable of the environment that names a file, which the supervisor holds a lock on for as long as it lives."""


def end_with_supervisor() -> None:
    """End this process as soon as its supervisor has ended, however that died: the kernel then lets go of its lock."""
    path = os.environ[LOCK]

    def follow() -> None:
        try:
            fcntl.flock(os.open(path, os.O_RDWR), fcntl.LOCK_SH)
        except FileNotFoundError:
            pass  # it has ended, and the command has tidied up
        finally:
            os._exit(WORKER_LOST)

    threading.Thread(target=follow, name="lehr-supervisor", daemon=True).start()


def main() -> None:
    """Follow the supervisor, then work for it."""
    end_with_supervisor()
    from apache_beam.runners.worker import sdk_worker_main

    sdk_worker_main.main(sys.argv)
