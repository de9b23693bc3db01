"""Pending operations, and the thread that drives MPI's progress on them."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

from belief_dist.mpi_backend.messages import Staging

# A waiting rank first polls without pausing, which is fastest for short messages. But where ranks
# share cores, a rank that keeps polling is descheduled for milliseconds, while one that sleeps is
# woken at once.
_EAGER_SECONDS = 500e-6
_PAUSE_SECONDS = 50e-6


class Health:
    """Whether a group can still be used: after a failure its communicator cannot."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.failure: str | None = None

    def check(self) -> None:
        """Raise if an operation has failed before."""
        if self.failure is not None:
            raise dist.DistBackendError(
                f"{self.name} cannot be used any more: {self.failure} End this job."
            )

    def fail(self, failure: str) -> dist.DistBackendError:
        """Record the failure and return it as an error."""
        if self.failure is None:
            self.failure = failure
            _Failed.any = True
        return dist.DistBackendError(f"{self.name}: {failure}")


class MpiWork(dist.Work):
    """One operation: MPI's requests, and the work to do when they are complete."""

    def __init__(
        self,
        what: str,
        requests: Sequence[MPI.Request],
        staging: Staging,
        results: list[Tensor],
        timeout: timedelta,
        health: Health,
    ) -> None:
        super().__init__()
        self._what = what
        self._requests = list(requests)
        self._staging = staging
        self._results = results
        self._timeout = timeout.total_seconds()
        self._health = health
        self._started = time.monotonic()
        self._lock = threading.RLock()
        self._done = False
        self._error: BaseException | None = None
        self._source = -1
        self._future: torch.futures.Future[list[Tensor]] | None = None
        self._pending_future: torch.futures.Future[list[Tensor]] | None = None

    def poll(self) -> bool:
        """Let MPI progress; return whether the operation has ended, successfully or not."""
        if self._done:
            return True
        # The thread that holds the lock is polling already.
        if not self._lock.acquire(blocking=False):
            return False
        try:
            if self._done:
                return True
            self._advance()
        finally:
            self._lock.release()
        if self._done:
            self._complete_future()
        return self._done

    def _advance(self) -> None:
        statuses = [MPI.Status()]
        try:
            if len(self._requests) == 1:
                complete = self._requests[0].Test(statuses[0])
            else:
                complete = MPI.Request.Testall(self._requests)
            if complete:
                self._source = statuses[0].Get_source()
                self._staging.finish()
                self._done = True
            elif time.monotonic() - self._started > self._timeout:
                self._fail_late(self._timeout)
        except MPI.Exception as error:
            self._fail(
                f"{self._what} failed in MPI: {error.Get_error_string()}; a peer has probably "
                f"ended."
            )
        except Exception as error:  # from staging.finish(); raised by wait()
            self._error, self._done = error, True

    def _fail_late(self, seconds: float) -> None:
        self._fail(
            f"{self._what} was not complete after {seconds:g} s: a rank is missing, is stuck, or "
            f"has called something else. If it is only slow, make the group with a longer timeout."
        )

    def _fail(self, failure: str) -> None:
        # MPI may still write into the buffers of requests that it cannot cancel.
        _Failed.works.append(self)
        self._error, self._done = self._health.fail(failure), True

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Wait until the result may be used.

        Args:
            timeout: Zero means the group's.

        Raises:
            DistBackendError: The timeout is over, or MPI reports an error.
        """
        seconds = timeout.total_seconds()
        begin = time.monotonic()
        eager_until = begin + _EAGER_SECONDS
        with PROGRESS.paused():
            while not self.poll():
                now = time.monotonic()
                if 0 < seconds < now - begin:
                    with self._lock:
                        if not self._done:
                            self._fail_late(seconds)
                elif now < eager_until:
                    os.sched_yield()
                else:
                    time.sleep(_PAUSE_SECONDS)
        if self._error is not None:
            raise self._error
        return True

    def is_completed(self) -> bool:
        """Return whether the operation has ended."""
        return self.poll()

    def is_success(self) -> bool:
        """Return whether it has ended without an error."""
        return self.poll() and self._error is None

    def exception(self) -> BaseException | None:
        """Return its error, if it has ended with one."""
        return self._error

    def synchronize(self) -> None:
        """See `wait`."""
        self.wait()

    def result(self) -> list[Tensor]:
        """Return the tensors that hold the result."""
        return self._results

    def source_rank(self) -> int:
        """Return the rank in the group that a received message came from."""
        return self._source

    _source_rank = source_rank  # torch's name

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        """Return a future of `result()`, which completes without a call of `wait`."""
        with self._lock:
            if self._future is None:
                self._future = self._pending_future = torch.futures.Future()
        if self._done:
            self._complete_future()
        return self._future

    def _complete_future(self) -> None:
        # Several threads may see the end of the operation; only one may complete the future.
        with self._lock:
            future, self._pending_future = self._pending_future, None
        if future is None:
            return
        if self._error is None:
            future.set_result(self._results)
        else:
            future.set_exception(self._error)  # type: ignore[arg-type]  # torch takes any


class CoalescedWork(dist.Work):
    """Several operations that torch has coalesced into one."""

    def __init__(self, works: Sequence[MpiWork]) -> None:
        super().__init__()
        self._works = list(works)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Wait for all of them."""
        return all([work.wait(timeout) for work in self._works])

    def is_completed(self) -> bool:
        """Return whether all have ended."""
        return all([work.is_completed() for work in self._works])

    def is_success(self) -> bool:
        """Return whether all have ended without an error."""
        return all([work.is_success() for work in self._works])

    def exception(self) -> BaseException | None:
        """Return the first error."""
        return next((e for work in self._works if (e := work.exception()) is not None), None)

    def synchronize(self) -> None:
        """See `wait`."""
        self.wait()

    def result(self) -> list[Tensor]:
        """Return the tensors of all."""
        return [tensor for work in self._works for tensor in work.result()]

    def get_future(self) -> torch.futures.Future[Any]:
        """Return a future of `result()`."""
        gathered = torch.futures.collect_all([work.get_future() for work in self._works])
        return gathered.then(
            lambda done: [tensor for each in done.value() for tensor in each.value()]
        )


class _Failed:
    """Failures in this process, for the exit handler."""

    any = False
    works: list[MpiWork] = []  # noqa: RUF012  # kept alive to the end, see MpiWork._fail


class Progress:
    """A thread that polls pending operations, as few MPI libraries progress on their own.

    It also keeps operations (and their tensors) alive whose handles have been dropped.
    """

    def __init__(self) -> None:
        self._works: list[MpiWork] = []
        self._changed = threading.Condition()
        self._waiting = 0
        self._thread: threading.Thread | None = None
        self._ended = False

    def add(self, work: MpiWork) -> None:
        """Poll `work` until it ends."""
        with self._changed:
            self._works.append(work)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mpi4py", daemon=True)
                self._thread.start()
            self._changed.notify()

    def paused(self) -> _Pause:
        """Return a context in which this thread pauses, because a waiting caller polls.

        A poll of one operation makes MPI progress on all of them.
        """
        return _Pause(self)

    def end(self) -> None:
        """Stop the thread, before MPI is finalized."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._works and not self._ended:
                    self._changed.wait()
                if self._ended:
                    return
                works = list(self._works)
            # A waiting caller polls its own operation only, so futures of others are polled here.
            if self._waiting == 0 or any(work._future is not None for work in works):
                ended = {id(work) for work in works if work.poll()}
            else:
                ended = {id(work) for work in works if work._done}
            if ended:
                with self._changed:
                    self._works = [work for work in self._works if id(work) not in ended]
            time.sleep(_PAUSE_SECONDS)


class _Pause:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __enter__(self) -> None:
        with self._progress._changed:
            self._progress._waiting += 1

    def __exit__(self, *_: object) -> None:
        with self._progress._changed:
            self._progress._waiting -= 1


PROGRESS = Progress()


def _at_exit() -> None:
    PROGRESS.end()
    if _Failed.any:
        # MPI_Finalize would wait for the missing rank.
        sys.stdout.flush()
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(1)


atexit.register(_at_exit)
