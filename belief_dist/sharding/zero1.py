"""ZeRO-1: full gradients stay on every rank, and are reduced once for each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch

from belief_dist.sharding.dtensor import like_param
from belief_dist.sharding.grad_reducer import GradReducer

# Bytes from which a gradient is copied into its place at once, while it is in cache. Smaller ones
# wait for their bucket and go together: one call, on a GPU one kernel, for thousands.
_AT_ONCE = 1 << 16


class Zero1Reducer(GradReducer):
    """`param.grad` is a view of its bucket's flat buffer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See `GradReducer`."""
        super().__init__(*args, **kwargs)
        self._places = [torch.empty(0)] * len(self._params)
        for indices, buffers in zip(self._param_indices, self._buckets, strict=True):
            for index, place in zip(indices, buffers.grad_views, strict=True):
                self._places[index] = place
        # What `param.grad` is: the places themselves, or DTensors around them.
        self._views = [like_param(*pair) for pair in zip(self._places, self._params, strict=True)]
        self._moves_at_once = [
            is_dtensor or place.nbytes >= _AT_ONCE
            for is_dtensor, place in zip(self._is_dtensor, self._places, strict=True)
        ]
        # The version of a gradient when it was summed over the ranks.
        self._reduced_version: list[int | None] = [None] * len(self._params)
        self._in_no_sync = False
        # Between a step and `zero_grad`: gradients are sums over the ranks, which were used.
        self._is_spent = False
        # Whether no gradient came since that step.
        self._holds_sums = False

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients locally inside the context."""
        before, self._in_no_sync = self._in_no_sync, True
        try:
            yield
        finally:
            self._in_no_sync = before

    def _enter_backward(self) -> None:
        self._holds_sums = False
        self._local_only = self._in_no_sync or not self.driver.is_last_backward()

    def _take(self, index: int) -> None:
        reduced = self._reduced_version[index]
        if reduced is not None:
            view = self._views[index]
            # One in-place change since the reduction is this accumulation: onto a sum over ranks.
            onto_sum = self._params[index].grad is view and view._version == reduced + 1
            if onto_sum and self._is_spent:
                # A pass of another network through this one, between this one's step and its
                # zero_grad (GANs): no harm is done unless a step takes such gradients.
                self._spoil(index)
            elif onto_sum or self.schedule.arrived[index]:
                raise RuntimeError(
                    f"backward reached parameter {self._label(index)} again after its gradient was "
                    f"summed over the ranks: call zero_grad() after step(), and run all but the "
                    f"last backward of a step under optimizer.no_sync(). A step that is given up "
                    f"forgets gradients by optimizer.zero_grad()."
                )
            self._reduced_version[index] = None
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
        elsewhere = []
        for index in self._param_indices[bucket]:
            grad = self._params[index].grad
            if grad is None:
                self._places[index].zero_()
            elif grad is not self._views[index]:
                elsewhere.append(index)
            elif self._reduced_version[index] is not None and self._places[index].any():
                self._spoil(index)  # left by the last step, and not zeroed in place since
        if elsewhere:
            self._adopt(elsewhere)
        # Padding was zero when the buffer was made, and nothing has written to it since.
        flat = self._buckets[bucket].flat_grad
        assert flat is not None
        self._send(bucket, flat, accumulate=False, recycled=False)
        for index in self._param_indices[bucket]:
            self._reduced_version[index] = self._views[index]._version

    def finish(self) -> None:
        """See `GradReducer.finish`.

        Called again without a new gradient, it leaves the sums as they are: as everywhere in torch,
        a second step on one gradient takes the same gradient.
        """
        if self._holds_sums and self._reduced_version == [v._version for v in self._views]:
            return
        # The usual case, every gradient in its place, is told without a loop in Python.
        grads = [param.grad for param in self._params]
        if not all(map(is_, grads, self._views)):
            for index, grad in enumerate(grads):
                if grad is None or grad is self._views[index]:
                    continue
                if self._reduced_version[index] is not None:
                    raise RuntimeError(
                        f"the gradient of parameter {self._label(index)} was replaced after it was "
                        f"summed over the ranks; change gradients before backward ends, or build "
                        f"the optimizer with overlap=False."
                    )
        changed = self._find_changed()
        if changed is not None and self._comm.world_size == 1:
            # One rank: what the user has made of a gradient is the gradient.
            self.schedule.begin_round()
            self._reduced_version = [None] * len(self._params)
        elif changed is not None:
            self.spoiled = (
                f"the gradient of parameter {self._label(changed)} was changed after it was summed "
                f"over the ranks, where it is no gradient but a rank's share of the sum. Clip by "
                f"max_grad_norm; change gradients in a hook that is registered before the "
                f"optimizer is built; or build it with overlap=False, which reduces them in step()"
            )
        self._launch()
        self._pool.drain()

    def _find_changed(self) -> int | None:
        """Return the first parameter whose gradient was changed in place since its reduction."""
        versions = [view._version for view in self._views]
        if versions == self._reduced_version:
            return None
        schedule = self.schedule
        for bucket in schedule.order[: schedule.next]:  # those of this round
            for index in self._param_indices[bucket]:
                has_view = self._params[index].grad is self._views[index]
                if has_view and versions[index] != self._reduced_version[index]:
                    return index
        return None

    def _spoil(self, index: int) -> None:
        # On one rank a sum over the ranks is a gradient like any other.
        if self.spoiled is None and self._comm.world_size > 1:
            self.spoiled = (
                f"the gradient of parameter {self._label(index)} holds the sum of the step before, "
                f"and was added to or is mixed with new ones: call optimizer.zero_grad() after "
                f"step(), or at the latest before the backward passes of the next step"
            )

    def used(self) -> list[bool]:
        """See `GradReducer.used`."""
        return [param.grad is not None for param in self._params]

    def end_step(self) -> None:
        """See `GradReducer.end_step`; gradients stay until `zero_grad`, as torch's users expect."""
        self.schedule.begin_round()
        self._holds_sums = self._is_spent = True

    def zero_grad(self, *, set_to_none: bool) -> None:
        """See `GradReducer.zero_grad`; in the middle of a step it is called by all ranks."""
        if self.schedule.pending_grads is not None and self._overlap:
            # What is forgotten is on the way already, on some ranks more of it than on others.
            self._launch()
            self._pool.drain()
            self.forget_errors()
        self.schedule.begin_round()
        self._holds_sums = self._is_spent = False
        self.spoiled = None
        self._reduced_version = [None] * len(self._params)
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
        return self.schedule.next > 0
