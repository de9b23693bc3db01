"""ZeRO-2: a full gradient exists only while its bucket fills and travels."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from belief_dist.sharding.grad_reducer import GradReducer


class Zero2Reducer(GradReducer):
    """`param.grad` is None after backward: the gradient is in the shards."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See `GradReducer`."""
        super().__init__(*args, **kwargs)
        self._filling: dict[int, Tensor] = {}  # flat buffers by bucket
        self._placed = [False] * len(self._params)  # in one of these
        self._rounds = 0
        self._used = [False] * len(self._params)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Do nothing: a full gradient that waits is what ZeRO-2 saves."""
        yield

    def _enter_backward(self) -> None:
        # A round ends with its backward pass, so that the next one can add to the shards. Autograd
        # calls back on every rank that ran a pass, whatever parameters it has used.
        if not self._nested:
            owner = weakref.ref(self)

            def end_of_backward() -> None:
                reducer = owner()
                if reducer is not None and any(reducer._placed):
                    reducer._end_round()

            torch.autograd.Variable._execution_engine.queue_callback(end_of_backward)

    def _take(self, index: int) -> None:
        bucket, position = self._param_slot[index]
        if self.schedule.turn[bucket] < self.schedule.next:
            raise RuntimeError(
                f"one backward reached parameter {self._label(index)} again after its gradient was "
                f"reduced; use torch.utils.checkpoint with use_reentrant=False, or stage=1 with "
                f"overlap=False."
            )
        param, buffers = self._params[index], self._buckets[bucket]
        grad = self._local_grad(index)
        if bucket not in self._filling:
            numel = buffers.bucket.numel
            self._filling[bucket] = self._pool.take(numel, param.dtype, param.device)
        # A parameter that is used twice in re-entrant passes gets its gradient in parts.
        view = buffers.view(self._filling[bucket], position)
        if self._placed[index]:
            view.add_(grad)
        else:
            view.copy_(grad)
        self._placed[index] = self._used[index] = True
        param.grad = None

    def _reduce(self, bucket: int) -> None:
        buffers = self._buckets[bucket]
        flat = self._filling.pop(bucket, None)
        if flat is None:  # no parameter of the bucket is used on this rank; the others still wait
            like = buffers.flat_param
            flat = self._pool.take(like.numel(), like.dtype, like.device)
            flat.zero_()
        else:
            # A recycled buffer holds another bucket's gradients wherever this one has none.
            for start, stop in buffers.gaps:
                flat[start:stop].zero_()
            for position, index in enumerate(self._param_indices[bucket]):
                if not self._placed[index]:
                    buffers.view(flat, position).zero_()
        self._send(bucket, flat, accumulate=self._rounds > 0, recycled=True)
        if not self._overlap:  # then one buffer serves all buckets in turn
            self._pool.drain()

    def _end_round(self) -> None:
        self._launch()
        self._rounds += 1
        self._placed = [False] * len(self._params)
        self.schedule.begin_round()

    def finish(self) -> None:
        """See `GradReducer.finish`."""
        for index, param in enumerate(self._params):
            if param.grad is not None:
                self._take(index)
        # A rank that has no gradient takes part all the same.
        if any(self._placed) or self._rounds == 0:
            self._end_round()
        self._pool.drain()

    def used(self) -> list[bool]:
        """See `GradReducer.used`."""
        return self._used

    def end_step(self) -> None:
        """See `GradReducer.end_step`; the step has used the gradients up."""
        self._rounds = 0
        self._used = [False] * len(self._params)

    def zero_grad(self, *, set_to_none: bool) -> None:
        """See `GradReducer.zero_grad`."""
        if self.has_begun:
            self.forget_errors()
        self._pool.drain()
        self._drop_grads()
        for flat in self._filling.values():
            self._pool.give_back(flat)
        self._filling.clear()
        self._placed = [False] * len(self._params)
        self.schedule.begin_round()
        self.end_step()

    @property
    def has_begun(self) -> bool:
        """See `GradReducer.has_begun`."""
        return self._rounds > 0 or any(self._placed)
