"""Asynchronous saves: copy to host memory, then write in a thread while training goes on."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from belief_dist.checkpoint import run_directory
from belief_dist.checkpoint.dcp_tensor import DcpChunk, DcpTensor
from belief_dist.checkpoint.entries import METADATA_KEY
from belief_dist.checkpoint.errors import CheckpointError, run_together
from belief_dist.checkpoint.saving import (
    Saved,
    check_arguments,
    comm_of,
    contents,
    describe_all,
    write,
)
from belief_dist.sharding.collectives import BackendReduceScatter, Collectives, SingleRank

logger = logging.getLogger("belief_dist")

# How long an exception that leaves a saver's block waits for a save of which nothing is written
# any more. Ranks have about equally much to write, so that those which run end at about one time.
STILL_SECONDS = 10.0


class Staging:
    """Copies of a checkpoint's entries in host memory, which later saves reuse."""

    def __init__(self) -> None:
        """Start without buffers."""
        self._buffers: dict[tuple[str, torch.Size], Tensor] = {}

    def stage(self, entries: Mapping[str, Any], comm: Collectives) -> dict[str, Any]:
        """Return copies of this rank's share; of replicated tensors every rank copies a part.

        Buffers are among the entries of the rank that writes them, and of no other.
        """
        buffers = set(entries[METADATA_KEY][0]["buffers"])
        staged: dict[str, Any] = {}
        turn = 0  # replicated tensors are dealt out to the ranks in turn
        for key, value in entries.items():
            if isinstance(value, DcpTensor):
                if value.replicated:
                    turn += 1
                    if turn % comm.world_size != comm.rank:
                        continue
                chunks = [self._copy(key, chunk) for chunk in value.chunks.values()]
                staged[key] = DcpTensor(value.shape, value.dtype, chunks)
            elif key in buffers:
                staged[key] = value.detach().cpu().clone()
            elif isinstance(value, Tensor):
                turn += 1
                if hasattr(value, "device_mesh") or turn % comm.world_size == comm.rank:
                    staged[key] = value.detach().cpu().clone()
            else:
                staged[key] = copy.deepcopy(value)
        if torch.cuda.is_available():
            # The copies are non-blocking, and training may overwrite their sources next.
            torch.cuda.current_stream().synchronize()
        return staged

    def _copy(self, key: str, chunk: DcpChunk) -> DcpChunk:
        tensor = chunk.read()
        buffer = self._buffers.get((key, chunk.offsets))
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            pinned = tensor.device.type == "cuda"
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._buffers[key, chunk.offsets] = buffer
        staged = buffer  # bound here: `buffer` may be None for the type checker inside the lambda
        staged.copy_(tensor, non_blocking=True)
        return DcpChunk(chunk.offsets, chunk.sizes, lambda: staged)

    def nbytes(self) -> int:
        """Return the size of all buffers in bytes."""
        return sum(buffer.nbytes for buffer in self._buffers.values())


class _Writer:
    """A thread that the end of the process waits for, unless it was given up.

    Python waits for ordinary threads alone, and no thread can be made one or cease to be one. So
    the writing one is a daemon, and an ordinary one waits for it.
    """

    def __init__(self, write: Callable[[], None]) -> None:
        self._is_over = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(write,), name="belief_dist save", daemon=True
        )
        threading.Thread(target=self._is_over.wait, name="belief_dist save's end").start()
        self._thread.start()

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        finally:
            self._is_over.set()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout: float | None = None) -> None:
        self._thread.join(timeout)

    def give_up(self) -> None:
        """Let the process end without it."""
        self._is_over.set()


class BackgroundSaver:
    """Writes the checkpoints of a run while it trains; every method is called by all ranks.

    If a save fails, the next `save`, `wait` or `optimizer.step()` raises, on all ranks in the same
    call; the previous checkpoint is unchanged. At most one save is in flight: the next one waits
    for it. An exception that leaves the `with` block waits, too, as long as ranks are writing, and
    not for a rank that has stopped.

    Args:
        run, model, optimizer, scaler, keep, process_group: As for `save`.
        timeout: How long to wait for a rank before that is an error.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        model: torch.nn.Module | None = None,
        optimizer: Optimizer | None = None,
        scaler: Any = None,
        keep: int | None = None,
        process_group: dist.ProcessGroup | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        """See the class."""
        self._run, self._keep = Path(run), keep
        self._model, self._optimizer, self._scaler = model, optimizer, scaler
        self._comm = comm_of(optimizer, process_group)
        # Two groups, one for the writing thread and one for the caller: if they shared one, their
        # collectives could interleave differently on different ranks.
        self._writers = _over_gloo(self._comm, timeout)
        self._flags = _over_gloo(self._comm, timeout)
        self._staging = Staging()
        self._thread: _Writer | None = None
        self._step = 0  # that is being saved
        self._failure: BaseException | None = None
        self._result: Saved | None = None
        self._hook = None
        if optimizer is not None:
            self._hook = optimizer.register_step_pre_hook(self._before_step)

    def save(self, step: int, *, extra: Mapping[str, Any] | None = None) -> float:
        """Copy everything and start to write it; return the seconds for which this has blocked.

        Waits for the optimizer's pending communication first.

        Raises:
            CheckpointError: On every rank, if this save cannot start or the previous one failed.
        """
        begin = time.perf_counter()
        self.wait()

        def collect() -> dict[str, Any]:
            check_arguments(step, self._keep)
            entries = contents(
                self._model,
                self._optimizer,
                self._scaler,
                extra,
                has_buffers=self._comm.rank == 0,
            )
            return self._staging.stage(entries, self._comm)

        staged = run_together(self._flags, f"cannot save step {step} to {self._run}", collect)
        describe_all(self._flags, self._optimizer, staged)
        blocked = time.perf_counter() - begin
        self._step = step
        self._thread = _Writer(lambda: self._write(step, staged, begin, blocked))
        if self._comm.rank == 0:
            logger.info("step %d is being saved; training waited %.3f s", step, blocked)
        return blocked

    def _write(self, step: int, staged: dict[str, Any], begin: float, blocked: float) -> None:
        try:
            path, nbytes = self._store(step, staged)
            self._result = Saved(path, step, blocked, time.perf_counter() - begin, nbytes)
        except BaseException as error:
            self._failure = error
            # At once: a script that ends without `close` would never say it.
            logger.error("step %d could not be saved in the background: %s", step, error)

    def _store(self, step: int, entries: dict[str, Any]) -> tuple[Path, int]:
        """Write a checkpoint; return its path, and the bytes of this rank."""
        return write(self._writers, self._writers.group, self._run, step, entries, self._keep)

    def wait(self) -> Saved | None:
        """Wait for the save in flight, and return the result of the last save.

        Raises:
            CheckpointError: On every rank, if that save failed on any.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            failure, self._failure = self._failure, None
            messages = self._flags.exchange(None if failure is None else str(failure))
            first = next((message for message in messages if message is not None), None)
            if first is not None:
                raise CheckpointError(first) from failure
        return self._result

    def _before_step(self, *_: Any) -> None:
        """Raise the error of a failed save, in the first step at which all ranks have ended it."""
        if self._thread is None:
            return
        # MIN: 1 only if the threads of all ranks have ended.
        done = torch.tensor(int(not self._thread.is_alive()))
        if self._flags.group is not None:
            dist.all_reduce(done, op=dist.ReduceOp.MIN, group=self._flags.group)
        if done.item():
            self.wait()

    def close(self) -> Saved | None:
        """Wait for the save in flight, and remove the hook from the optimizer."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        return self.wait()

    def __enter__(self) -> BackgroundSaver:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close; after an error without collectives, as other ranks may not take part in them.

        For the same reason the save in flight may never end: it is waited for while it moves on.
        """
        if error is None:
            self.close()
            return
        if self._hook is not None:
            self._hook.remove()
        if self._thread is not None and not self._ends_by_itself(self._thread):
            self._thread.give_up()
            sentence = (
                f"the save of step {self._step} in the background was given up, as nothing of it "
                f"was written for {STILL_SECONDS:g} s: another rank has stopped or left, or the "
                f"disk does not answer. Earlier checkpoints are unchanged."
            )
            logger.error("%s", sentence)
            if hasattr(error, "add_note"):  # since Python 3.11
                error.add_note(sentence)
        self._thread = None

    def _ends_by_itself(self, thread: _Writer) -> bool:
        """Wait for the save as long as any rank writes, and return whether it has ended."""
        written, since = -1, time.monotonic()
        while thread.is_alive():
            now = run_directory.bytes_written(self._run, self._step)
            if now != written:
                written, since = now, time.monotonic()
            elif time.monotonic() - since > STILL_SECONDS:
                return False
            thread.join(0.1)
        return True


def _over_gloo(comm: Collectives, timeout: timedelta) -> Collectives:
    if comm.world_size == 1:
        return SingleRank()
    # gloo also beside NCCL: a thread must not queue collectives on the communicator of training.
    # With use_local_synchronization only the members need to call this.
    group: dist.ProcessGroup = dist.new_group(
        comm.members, timeout=timeout, backend="gloo", use_local_synchronization=True
    )
    return BackendReduceScatter(group)
