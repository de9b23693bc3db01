"""Saves that go on in the background: the caller waits for a copy in memory, and trains on."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from belief_dist.checkpoint.dcp_tensor import Piece, Pieces
from belief_dist.checkpoint.errors import CheckpointError, together
from belief_dist.checkpoint.saving import Saved, check_arguments, contents, team_of, write
from belief_dist.sharding.collectives import BackendReduceScatter, Collectives, SingleRank

logger = logging.getLogger("belief_dist")


class Staging:
    """Copies of what is to be written, in host memory that later saves use again."""

    def __init__(self) -> None:
        """Start with no memory."""
        self._buffers: dict[tuple[str, torch.Size], Tensor] = {}

    def stage(self, entries: Mapping[str, Any], team: Collectives) -> dict[str, Any]:
        """Return copies of this rank's share; what all ranks hold is copied by one of them."""
        staged: dict[str, Any] = {}
        turn = 0
        for key, value in entries.items():
            if isinstance(value, Pieces):
                if value.replicated:
                    turn += 1
                    if turn % team.world_size != team.rank:
                        continue
                pieces = [self._copy(key, piece) for piece in value.pieces.values()]
                staged[key] = Pieces(value.shape, value.dtype, pieces)
            elif isinstance(value, Tensor):
                turn += 1
                if hasattr(value, "device_mesh") or turn % team.world_size == team.rank:
                    staged[key] = value.detach().cpu().clone()
            else:
                staged[key] = copy.deepcopy(value)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return staged

    def _copy(self, key: str, piece: Piece) -> Piece:
        tensor = piece.read()
        buffer = self._buffers.get((key, piece.offsets))
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            pinned = tensor.device.type == "cuda"
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._buffers[key, piece.offsets] = buffer
        held = buffer
        held.copy_(tensor, non_blocking=True)
        return Piece(piece.offsets, piece.sizes, lambda: held)

    def nbytes(self) -> int:
        """Return the bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())


class BackgroundSaver:
    """Writes the checkpoints of a run while it trains; every method is called by all ranks.

    A save that fails is raised by the next `save`, `wait` or `optimizer.step()`, on all ranks in
    the same call; the previous checkpoint is untouched. At most one save is in flight: the next one
    waits for it.

    Args:
        run, model, optimizer, scaler, keep, process_group: As for `save`.
        timeout: After which a rank that does not answer becomes an error.
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
        self._team = team_of(optimizer, process_group)
        # One for the thread, one for us: messages of the two must not mix.
        self._writers = _over_gloo(self._team, timeout)
        self._flags = _over_gloo(self._team, timeout)
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._result: Saved | None = None
        self._hook = None
        if optimizer is not None:
            self._hook = optimizer.register_step_pre_hook(self._before_step)

    def save(self, step: int, *, extra: Mapping[str, Any] | None = None) -> float:
        """Copy everything and begin to write it; return the seconds for which that has blocked.

        What the optimizer has under way is settled first.

        Raises:
            CheckpointError: On every rank: this save cannot begin, or the one before it has failed.
        """
        begin = time.perf_counter()
        self.wait()

        def collect() -> dict[str, Any]:
            check_arguments(step, self._keep)
            entries = contents(self._model, self._optimizer, self._scaler, extra)
            return self._staging.stage(entries, self._team)

        staged = together(self._flags, f"cannot save step {step} to {self._run}", collect)
        blocked = time.perf_counter() - begin
        self._thread = threading.Thread(
            target=self._write, args=(step, staged, begin, blocked), name="belief_dist save"
        )
        self._thread.start()
        if self._team.rank == 0:
            logger.info("step %d is being saved; training waited %.3f s", step, blocked)
        return blocked

    def _write(self, step: int, staged: dict[str, Any], begin: float, blocked: float) -> None:
        try:
            path, nbytes = write(
                self._writers, self._writers.group, self._run, step, staged, self._keep
            )
            self._result = Saved(path, step, blocked, time.perf_counter() - begin, nbytes)
        except BaseException as error:
            self._failure = error

    def wait(self) -> Saved | None:
        """Wait for the save in flight; return what became of the last one.

        Raises:
            CheckpointError: On every rank: it has failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            failure, self._failure = self._failure, None
            sentences = self._flags.exchange(None if failure is None else str(failure))
            first = next((sentence for sentence in sentences if sentence is not None), None)
            if first is not None:
                raise CheckpointError(first) from failure
        return self._result

    def _before_step(self, *_: Any) -> None:
        """Raise what has failed, once all ranks know that the save is over: in the same step."""
        if self._thread is None:
            return
        done = torch.tensor(int(not self._thread.is_alive()))
        if self._flags.group is not None:
            dist.all_reduce(done, op=dist.ReduceOp.MIN, group=self._flags.group)
        if done.item():
            self.wait()

    def close(self) -> Saved | None:
        """Wait as `wait` does, and let go of the optimizer."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        return self.wait()

    def __enter__(self) -> BackgroundSaver:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close; after an error, without talking to the other ranks."""
        if error is None:
            self.close()
            return
        if self._hook is not None:
            self._hook.remove()
        if self._thread is not None:
            self._thread.join()


def _over_gloo(team: Collectives, timeout: timedelta) -> Collectives:
    if team.world_size == 1:
        return SingleRank()
    group: dist.ProcessGroup = dist.new_group(
        team.members, timeout=timeout, backend="gloo", use_local_synchronization=True
    )
    return BackendReduceScatter(group)
