"""ZeRO-1: full gradients stay on every rank, and are reduced once for each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch

from belief_dist.sharding.dtensor import like_param
from belief_dist.sharding.grad_reducer import GradReducer


class Zero1Reducer(GradReducer):
    """`param.grad` is a view of its bucket's flat buffer, and stays this rank's own gradient."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See `GradReducer`."""
        super().__init__(*args, **kwargs)
        self._places = [torch.empty(0)] * len(self._params)
        for indices, buffers in zip(self._param_indices, self._buckets, strict=True):
            for index, place in zip(indices, buffers.grad_views, strict=True):
                self._places[index] = place
        # What `param.grad` is: the places themselves, or DTensors around them.
        self._views = [like_param(*pair) for pair in zip(self._places, self._params, strict=True)]
        # Of the last round: the version of each gradient, or None where there was none.
        self._reduced_version: list[int | None] | None = None
        self._sent_version: list[int | None] = [None] * len(self._params)  # of the running one
        self._has_more = False  # gradients have come since
        self._is_spent = False  # a step has taken it
        self._in_no_sync = False

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients locally inside the context."""
        # A rank that uses no parameter in it must know as well that the last round is out of date.
        self._has_more = True
        before, self._in_no_sync = self._in_no_sync, True
        try:
            yield
        finally:
            self._in_no_sync = before

    def _stays_local(self) -> bool:
        stays = self._in_no_sync or not self._overlap or not self.driver.is_last_backward()
        if not stays and self._codec.keeps_error and self._reduced_version and not self._is_spent:
            # The errors that the first round has cut off would be fed back, and nothing else of it.
            raise RuntimeError(
                "with reduce_dtype=torch.int8, run all but the last backward of a step under "
                "optimizer.no_sync(), and forget gradients by optimizer.zero_grad()."
            )
        return stays

    def _enter_backward(self) -> None:
        self._has_more = True

    def _take(self, index: int) -> None:
        schedule = self.schedule
        if schedule.next and schedule.turn[self._param_slot[index][0]] < schedule.next:
            raise RuntimeError(
                f"one backward reached parameter {self._label(index)} again after its bucket was "
                f"reduced; use torch.utils.checkpoint with use_reentrant=False, or overlap=False."
            )
        if self._moves_at_once[index] and self._params[index].grad is not self._views[index]:
            self._adopt([index])

    def _adopt(self, indices: Sequence[int]) -> None:
        """Move gradients that autograd or the user has made into their places in the buckets."""
        torch._foreach_copy_(
            [self._places[index] for index in indices],
            [self._local_grad(index) for index in indices],
        )
        for index in indices:
            self._params[index].grad = self._views[index]

    def _reduce(self, bucket: int) -> None:
        elsewhere, empty = [], []
        for index in self._param_indices[bucket]:
            grad = self._params[index].grad
            if grad is None:
                empty.append(self._places[index])
            elif grad is not self._views[index]:
                elsewhere.append(index)
        if empty:
            torch._foreach_zero_(empty)
        if elsewhere:
            self._adopt(elsewhere)
        # Padding was zero when the buffer was made, and nothing has written to it since.
        flat = self._buckets[bucket].flat_grad
        assert flat is not None
        self._send(bucket, flat, accumulate=False, recycled=False)
        # Now, as a hook of the user's may still come in this backward, too late.
        for index in self._param_indices[bucket]:
            has_grad = self._params[index].grad is not None
            self._sent_version[index] = self._views[index]._version if has_grad else None

    def _end_round(self) -> None:
        self._launch()
        # The next backward adds to what is sent now.
        self._drain()
        self.schedule.begin_round()
        self._reduced_version = list(self._sent_version)
        self._has_more = self._is_spent = False

    def _versions(self) -> list[int | None]:
        """Return the version of each gradient: None if there is none, -1 outside its place."""
        grads = [param.grad for param in self._params]
        # The usual case, every gradient in its place, is told without a loop in Python.
        if all(map(is_, grads, self._views)):
            return [view._version for view in self._views]
        return [
            None if grad is None else view._version if grad is view else -1
            for grad, view in zip(grads, self._views, strict=True)
        ]

    def finish(self) -> None:
        """See `GradReducer.finish`.

        Called again without a new gradient, it leaves the sums as they are: as everywhere in torch,
        a second step on one gradient takes the same gradient.
        """
        if self.is_interrupted:  # no rank takes what this one has
            self.end_interrupted()
            return
        before = self._reduced_version
        if before is None or self._has_more:
            self._end_round()
            return
        now = self._versions()
        if now == before:
            return
        # A gradient that was changed after its step is a new one; and on a single rank, what the
        # user has made of a gradient is the gradient.
        if self._is_spent or self._comm.world_size == 1:
            self._end_round()
            return
        changes = [pair for pair in enumerate(zip(before, now, strict=True)) if len({*pair[1]}) > 1]
        gone = [index for index, (_, version) in changes if version is None]
        if gone:
            self._forget_sums(gone)
            self.dropped += gone
        for index, (_, version) in changes:
            if version is not None:
                how = "replaced or set" if version == -1 else "changed"
                self.spoiled = (
                    f"the gradient of parameter {self._label(index)} was {how} after it was summed "
                    f"over the ranks, which no longer counts. Clip by max_grad_norm; change "
                    f"gradients in a hook that is registered before the optimizer is built; or "
                    f"build it with overlap=False, which reduces them in step()"
                )
                return
        self._reduced_version = now

    def used(self) -> list[bool]:
        """See `GradReducer.used`."""
        return [param.grad is not None for param in self._params]

    def end_step(self) -> None:
        """See `GradReducer.end_step`; gradients stay until `zero_grad`, as torch's users expect."""
        self._is_spent = True
        self.dropped.clear()

    def zero_grad(self, *, set_to_none: bool) -> None:
        """See `GradReducer.zero_grad`."""
        if self._reduced_version is not None and not self._is_spent:
            self.forget_errors()
        self.schedule.begin_round()
        self._reduced_version = None
        self._has_more = self._is_spent = False
        self.spoiled = None
        self.dropped.clear()
        # With None, autograd hands over the next gradients instead of adding to zeros.
        if set_to_none:
            self._drop_grads()
        else:
            for buffers in self._buckets:
                assert buffers.flat_grad is not None
                buffers.flat_grad.zero_()
            for param, view in zip(self._params, self._views, strict=True):
                if param.grad is not None and param.grad is not view:  # waits for its bucket
                    param.grad.zero_()

    @property
    def has_begun(self) -> bool:
        """See `GradReducer.has_begun`."""
        return self._reduced_version is not None and not self._is_spent
