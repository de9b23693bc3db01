"""A deadline for calls of MPI that have no timeout."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

_PERIOD_SECONDS = 0.5


class Watch:
    """Ends this process if a call of MPI does not return in time.

    A thread cannot be interrupted in such a call, and other threads cannot use MPI meanwhile, as
    its locks may be held. So the only way out is to exit; the launcher then ends the job.
    """

    def __init__(self) -> None:
        self._calls: dict[int, tuple[float, str]] = {}  # deadline and message, by thread
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    @contextmanager
    def limit(self, timeout: timedelta, what: str) -> Iterator[None]:
        """Exit if the context takes longer than `timeout`; `what` describes the call."""
        seconds = timeout.total_seconds()
        message = f"{what} has not returned from MPI in {seconds:g} s: a rank is missing or stuck."
        thread = threading.get_ident()
        self._calls[thread] = (time.monotonic() + seconds, message)
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mpi4py watch", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            del self._calls[thread]

    def _run(self) -> None:
        while True:
            time.sleep(_PERIOD_SECONDS)
            now = time.monotonic()
            late = [message for deadline, message in list(self._calls.values()) if now > deadline]
            if late:
                print(f"belief_dist: {late[0]} This process ends.", file=sys.stderr, flush=True)
                os._exit(1)


WATCH = Watch()
