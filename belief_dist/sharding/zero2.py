"""ZeRO-2: a full gradient exists only while its bucket fills and travels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from belief_dist.sharding.grad_reducer import GradReducer
from belief_dist.sharding.sharded_grad import ShardedGrad


class Zero2Reducer(GradReducer):
    """`param.grad` is a `ShardedGrad` after backward: the gradient is in the shards."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See `GradReducer`."""
        super().__init__(*args, **kwargs)
        self._filling: dict[int, Tensor] = {}  # flat buffers by bucket
        self._views: dict[tuple[int, int], list[Tensor]] = {}  # of these, by bucket and address
        # Of the running round: whose gradients have come, and which of them lie in a flat buffer.
        self._arrived = [False] * len(self._params)
        self._in_flat = [False] * len(self._params)
        self._rounds = 0  # whose sums are in the shards
        self._is_spent = False  # a step has taken them
        self._used = [False] * len(self._params)
        # What `param.grad` is once a round has ended, for parameters unused on this rank as well.
        self._stand_ins = list(map(ShardedGrad, self._params))
        self._has_stand_in = [False] * len(self._params)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Do nothing: a full gradient that waits is what ZeRO-2 saves."""
        yield

    def _stays_local(self) -> bool:
        return False

    def _enter_backward(self) -> None:
        if not self._rounds or any(self._arrived):
            return
        gone, zeroed = self._find_dropped()
        if not any(self._has_stand_in):  # as after `zero_grad`: nothing to add to
            self._drain()
            if not self._is_spent:
                self.forget_errors()
            self._rounds = 0
        elif gone or zeroed:
            self._forget_sums([*gone, *zeroed])

    def _forget_arrivals(self) -> None:
        self._arrived = [False] * len(self._params)
        self._in_flat = [False] * len(self._params)

    def _find_dropped(self) -> tuple[list[int], list[int]]:
        """Return the parameters whose `grad` was set to None, and those where it was zeroed."""
        gone, zeroed = [], []
        for index, param in enumerate(self._params):
            if self._has_stand_in[index]:
                grad = param.grad
                if not isinstance(grad, ShardedGrad):
                    gone.append(index)
                    self._stand_ins[index].take_added()
                    self._has_stand_in[index] = self._used[index] = False
                elif grad.is_zeroed:
                    zeroed.append(index)
                    grad.is_zeroed = False
        return gone, zeroed

    def _take(self, index: int) -> None:
        bucket, position = self._param_slot[index]
        if self.schedule.turn[bucket] < self.schedule.next:
            raise RuntimeError(
                f"one backward reached parameter {self._label(index)} again after its gradient was "
                f"reduced; use torch.utils.checkpoint with use_reentrant=False, or stage=1 with "
                f"overlap=False."
            )
        param = self._params[index]
        if isinstance(param.grad, ShardedGrad):
            param.grad = param.grad.take_added()
            if param.grad is None:
                return
        self._arrived[index] = self._used[index] = self._has_stand_in[index] = True
        grad = param.grad
        assert grad is not None
        if self._moves_at_once[index] or self._in_flat[index] or grad.is_sparse:
            views = self._views_of(bucket)
            # A parameter that is used twice in re-entrant passes gets its gradient in parts.
            if self._in_flat[index]:
                views[position].add_(self._local_grad(index))
            else:
                views[position].copy_(self._local_grad(index))
            self._in_flat[index] = True
            param.grad = self._stand_ins[index]

    def _views_of(self, bucket: int) -> list[Tensor]:
        """Return the places of a bucket's gradients in the buffer that it fills."""
        buffers = self._buckets[bucket]
        flat = self._filling.get(bucket)
        if flat is None:
            like = buffers.flat_param
            pool = self._pools[self._comms[bucket]]
            flat = self._filling[bucket] = pool.take(like.numel(), like.dtype, like.device)
        # The pool has a few buffers, which come back in turn.
        key = (bucket, flat.data_ptr())
        views = self._views.get(key)
        if views is None:
            places = range(len(buffers.bucket.slots))
            views = self._views[key] = [buffers.view(flat, position) for position in places]
        return views

    def _reduce(self, bucket: int) -> None:
        views = self._views_of(bucket)
        flat = self._filling.pop(bucket)
        # A recycled buffer holds another bucket's gradients wherever this one has none.
        indices = self._param_indices[bucket]
        empty = [flat[start:stop] for start, stop in self._buckets[bucket].gaps]
        empty += [view for view, i in zip(views, indices, strict=True) if not self._arrived[i]]
        if empty:
            torch._foreach_zero_(empty)
        waiting = [
            (view, index)
            for view, index in zip(views, indices, strict=True)
            if self._arrived[index] and not self._in_flat[index]
        ]
        if waiting:
            grads = [self._local_grad(index) for _, index in waiting]
            torch._foreach_copy_([view for view, _ in waiting], grads)
            for _, index in waiting:
                self._params[index].grad = self._stand_ins[index]
        self._send(bucket, flat, accumulate=self._rounds > 0, recycled=True)
        if not self._overlap:  # then one buffer serves all buckets in turn
            self._drain()

    def _end_round(self) -> None:
        self._launch()
        self._rounds += 1
        self._is_spent = False
        self._forget_arrivals()
        self.schedule.begin_round()
        if not all(self._has_stand_in):
            for index, param in enumerate(self._params):
                if param.grad is None and param.requires_grad:
                    param.grad = self._stand_ins[index]
                    self._has_stand_in[index] = True

    def finish(self) -> None:
        """See `GradReducer.finish`."""
        if self.is_interrupted:  # no rank takes what this one has
            self.end_interrupted()
            self._drain()
            return
        if self._rounds:
            self._forget_dropped()
        # A rank that has no gradient takes part all the same.
        if self._take_assigned() or self._rounds == 0:
            self._end_round()
        self._drain()

    def _forget_dropped(self) -> None:
        gone, zeroed = self._find_dropped()
        if gone or zeroed:
            self._forget_sums([*gone, *zeroed])
        self.dropped = gone

    def _take_assigned(self) -> bool:
        """Take gradients that no backward pass has brought; return whether any wait for a round."""
        for index, param in enumerate(self._params):
            grad = param.grad
            if grad is not None and (not isinstance(grad, ShardedGrad) or grad.added is not None):
                self._take(index)
        return any(self._arrived)

    def used(self) -> list[bool]:
        """See `GradReducer.used`."""
        return self._used

    def end_step(self) -> None:
        """See `GradReducer.end_step`; the sums stay until `zero_grad`, as torch's users expect."""
        self._is_spent = True
        self.dropped = []

    def zero_grad(self, *, set_to_none: bool) -> None:
        """See `GradReducer.zero_grad`."""
        if self.has_begun:
            self.forget_errors()
        self._drain()
        for stand_in in compress(self._stand_ins, self._has_stand_in):
            stand_in.take_added()  # of a pass that has raised
            stand_in.is_zeroed = False
        for bucket, flat in self._filling.items():
            self._pools[self._comms[bucket]].give_back(flat)
        self._filling.clear()
        self._forget_arrivals()
        self.schedule.begin_round()
        self._drop_grads()
        self._rounds = 0
        self._used = [False] * len(self._params)
        self._has_stand_in = [False] * len(self._params)
        self._is_spent = False
        self.spoiled = None
        self.dropped = []

    @property
    def has_begun(self) -> bool:
        """See `GradReducer.has_begun`."""
        return (self._rounds > 0 and not self._is_spent) or any(self._arrived)
