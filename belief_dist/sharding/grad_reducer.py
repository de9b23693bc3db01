"""The way of the gradients, from backward into this rank's shards.

A hook on every parameter counts its bucket down; a full bucket is reduced while backward goes on.
Reductions start in one order on every rank, whatever the order in which gradients arrive, so that
ranks which use parameters differently still match: at first that of the layout, later the one that
all ranks together have seen in the first step. Two ways to hold what is not yet reduced:

* `FullGradients` (ZeRO-1): every gradient has its place in a flat buffer for good, and several
  backward passes add up there (`no_sync`) before one reduction.
* `ShardedGradients` (ZeRO-2): a gradient lives in a recycled buffer until its bucket is reduced.
  Every backward pass is one *round* of reductions that adds to the shard.

With ordered reduction the shard holds, bit for bit, what one process gets that adds the gradients
of every round and in it of every rank, in that order, in the compute dtype.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from operator import is_
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._C import _current_graph_task_id
from torch.autograd.graph import _engine_run_backward
from torch.utils.hooks import RemovableHandle

from belief_dist.norm import NUM_WORDS
from belief_dist.sharding.bucket import BucketBuffers, Recycler
from belief_dist.sharding.codec import encode_, encoded_nbytes
from belief_dist.sharding.collectives import Collectives, Handle
from belief_dist.sharding.dtensor import is_dtensor, like_param, local_grad

# Bytes from which a gradient is copied into its place at once, while it is in cache. Smaller ones
# wait for their bucket and go together: one call, on a GPU one kernel, for thousands.
_AT_ONCE = 1 << 16
# Flat buffers of gradients that exist at the same time, unless the order of arrival needs more.
_RECYCLED = 2


def _in_nested_backward() -> bool:
    """Return whether the running backward was called by another one (re-entrant checkpoints).

    A parameter may get a gradient in each of several such passes, so that the first one does not
    tell that it is complete.
    """
    depth = 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        depth += frame.f_code is _engine_run_backward.__code__
        frame = frame.f_back
    # The outermost call is not on the stack of a device's own thread, which Python did not start.
    outermost = 0 if isinstance(threading.current_thread(), threading._DummyThread) else 1
    return depth > outermost


class Gradients(ABC):
    """Reduces the gradients of one optimizer; see the module.

    Args:
        params: All parameters.
        buckets: Whose slots name parameters by their index in `params`.
        links: The process group.
        counts: Tells of each bucket whether its gradients count in the norm, on this rank.
        overlap: Reduce while backward goes on.
        wire_dtype: Gradients are rounded to it before they travel; None means not at all.
        label: Names a parameter in errors.
        is_last: Tells, when a backward pass begins, whether it is the last one before the step.

    Attributes:
        bins: (norm.NUM_WORDS,), int64, after `finish`: the squares of this rank's shards, for
            buckets that count in the norm.
        other_bins: The same for all other buckets.
        order: Bucket indices in the order in which reductions start.
        completed: Those that became full in the last backward, in this order.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        buckets: Sequence[BucketBuffers],
        links: Collectives,
        *,
        counts: Sequence[bool],
        overlap: bool,
        wire_dtype: torch.dtype | None,
        label: Callable[[int], str],
        is_last: Callable[[], bool],
    ) -> None:
        self._params = params
        self._buckets = buckets
        self._links = links
        self._counts = counts
        self._overlap = overlap
        self._wire_dtype = wire_dtype
        self._label = label
        self._is_last = is_last
        self._members = [[slot.param for slot in b.bucket.slots] for b in buckets]
        # Of every parameter, its bucket and its position there.
        self._home = [(0, 0)] * len(params)
        for b, members in enumerate(self._members):
            for position, index in enumerate(members):
                self._home[index] = (b, position)
        self._is_cut = [is_dtensor(param) for param in params]
        self._silent = False  # gradients of the running backward stay on this rank for now
        self._recycler = Recycler(max((b.wire_nbytes(wire_dtype) for b in buckets), default=0))
        self._in_flight: deque[_InFlight] = deque()
        self._task = -1  # autograd's number of the running backward pass
        self._nested = False
        self._has_densified = False
        self.bins = self.other_bins = torch.zeros(0)
        self.completed: list[int] = []
        self.set_order(range(len(buckets)))
        self._start_round()
        owner = weakref.ref(self)
        self._hooks = [_add_hook(param, owner, i) for i, param in enumerate(params)]

    def close(self) -> None:
        """Let go of the parameters."""
        for hook in self._hooks:
            hook.remove()

    def set_order(self, order: Sequence[int]) -> None:
        """Start reductions in this order of bucket indices from the next round on.

        It must be the same on all ranks.
        """
        self.order = list(order)
        self._turn = {bucket: turn for turn, bucket in enumerate(order)}

    def _start_round(self) -> None:
        self._next = 0  # the turn of the next reduction
        self._waiting: list[int] | None = None  # gradients that each bucket still lacks
        self._fired = [False] * len(self._params)

    def _count_gradients(self) -> list[int]:
        """Return how many gradients each bucket waits for; frozen parameters get none."""
        trains = [param.requires_grad for param in self._params]
        return [sum(map(trains.__getitem__, members)) for members in self._members]

    # - Backward

    def on_gradient(self, index: int) -> None:
        """Take the gradient that backward has just accumulated for parameter `index`.

        Runs once for every parameter and backward: models have thousands, so it is kept short.
        """
        task = _current_graph_task_id()
        if task != self._task:
            self._task, self._nested = task, _in_nested_backward()
            self._enter_backward()
        self._take(index)
        if self._silent or self._nested or self._fired[index]:
            return
        self._fired[index] = True
        waiting = self._waiting
        if waiting is None:
            waiting = self._waiting = self._count_gradients()
            self.completed = []
        bucket = self._home[index][0]
        waiting[bucket] -= 1
        if not waiting[bucket]:
            self.completed.append(bucket)
            if self._overlap:
                self._launch(waiting)

    def _launch(self, waiting: Sequence[int] | None = None) -> None:
        """Start the reductions whose turn it is, up to the first that is still `waiting`."""
        while self._next < len(self._buckets):
            bucket = self.order[self._next]
            if waiting is not None and waiting[bucket] > 0:
                return
            if self._next == 0:
                # The last round of a step is the one whose sums are complete.
                device = self._buckets[0].param_shard.device
                self.bins = torch.zeros(NUM_WORDS, dtype=torch.int64, device=device)
                self.other_bins = torch.zeros_like(self.bins)
            self._reduce(bucket)
            self._next += 1

    def _start(self, bucket: int, flat: Tensor, *, accumulate: bool, recycled: bool) -> None:
        """Send `flat` on its way, and recycle it afterwards if it is `recycled`."""
        wire, buffers = flat, self._buckets[bucket]
        if self._wire_dtype == torch.int8:
            wire = self._borrow(encoded_nbytes(flat.numel()), torch.uint8, flat.device)
            self._encode_(wire, flat, bucket)
        elif self._wire_dtype is not None and self._wire_dtype != flat.dtype:
            wire = self._borrow(flat.numel(), self._wire_dtype, flat.device)
            wire.copy_(flat)
        if wire is not flat:
            if recycled:
                self._recycler.give_back(flat)
            recycled = True
        bins = self.bins if self._counts[bucket] else self.other_bins
        handle = self._links.start_reduce(wire, buffers.grad_shard, bins, accumulate=accumulate)
        self._in_flight.append(_InFlight(handle, wire if recycled else None))

    def _encode_(self, wire: Tensor, flat: Tensor, bucket: int) -> None:
        buffers = self._buckets[bucket]
        assert buffers.wire_error is not None
        used = self.used()
        # A parameter without a gradient sends nothing: nobody might use it, and its error be lost.
        kept = [
            (place, place.clone())
            for position, index in enumerate(self._members[bucket])
            if not used[index]
            for place in [buffers.view(buffers.wire_error, position)]
        ]
        for place, _ in kept:
            place.zero_()
        encode_(wire, flat, buffers.wire_error)
        for place, error in kept:
            place.copy_(error)

    def forget_errors(self) -> None:
        """Drop what rounding has cut off in a step that was skipped or given up."""
        for buffers in self._buckets:
            if buffers.wire_error is not None:
                buffers.wire_error.zero_()

    def _borrow(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        while self._recycler.lent >= _RECYCLED and any(
            f.recycled is not None for f in self._in_flight
        ):
            self._finish_oldest()
        return self._recycler.take(numel, dtype, device)

    def _finish_oldest(self) -> None:
        oldest = self._in_flight.popleft()
        oldest.handle.wait()
        if oldest.recycled is not None:
            self._recycler.give_back(oldest.recycled)

    def _drain(self) -> None:
        while self._in_flight:
            self._finish_oldest()

    # - What the two ways differ in

    @abstractmethod
    def no_sync(self) -> AbstractContextManager[None]:
        """Return a context in which gradients add up without communication, where that helps."""

    @abstractmethod
    def _enter_backward(self) -> None:
        """Notice that a backward pass has begun, or a nested one has ended."""

    @abstractmethod
    def _take(self, index: int) -> None:
        """Bring a gradient to its place."""

    @abstractmethod
    def _reduce(self, bucket: int) -> None:
        """Start the reduction of a bucket."""

    @abstractmethod
    def finish(self) -> None:
        """Reduce what is left, and return when `bins` and all shards are complete."""

    @abstractmethod
    def used(self) -> list[bool]:
        """Return which parameters have got a gradient since the last step, on this rank."""

    @abstractmethod
    def end_step(self) -> None:
        """Be ready for the next step's gradients."""

    @abstractmethod
    def zero_grad(self, *, set_to_none: bool) -> None:
        """Forget all gradients."""

    @property
    @abstractmethod
    def has_begun(self) -> bool:
        """Whether gradients have been reduced since the last step."""

    def nbytes(self) -> int:
        """Return the bytes of recycled buffers."""
        return self._recycler.nbytes()

    def _drop_grads(self) -> None:
        with torch._C.DisableTorchFunction():  # whose modes slow it while gathers travel
            for param in self._params:
                param.grad = None

    def _local(self, index: int) -> Tensor:
        """Return the gradient of the part that this rank stores, dense."""
        param = self._params[index]
        grad = param.grad
        assert grad is not None
        if self._is_cut[index]:
            grad = local_grad(grad, param)
        if not grad.is_sparse:
            return grad
        if not self._has_densified:
            self._has_densified = True
            warnings.warn(
                f"the gradient of parameter {self._label(index)} is sparse and is made dense: a "
                f"sharded optimizer gains nothing from sparse=True.",
                stacklevel=2,
            )
        return grad.to_dense()


class FullGradients(Gradients):
    """ZeRO-1: `param.grad` is a view of its bucket's flat buffer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See `Gradients`."""
        super().__init__(*args, **kwargs)
        self._places = [torch.empty(0)] * len(self._params)
        for members, buffers in zip(self._members, self._buckets, strict=True):
            for index, place in zip(members, buffers.grad_views, strict=True):
                self._places[index] = place
        # What `param.grad` is; the places themselves, or DTensors around them.
        self._views = [like_param(*pair) for pair in zip(self._places, self._params, strict=True)]
        self._at_once = [
            is_cut or place.nbytes >= _AT_ONCE
            for is_cut, place in zip(self._is_cut, self._places, strict=True)
        ]
        # The version of a gradient when it was summed over the ranks.
        self._reduced_version: list[int | None] = [None] * len(self._params)
        self._in_no_sync = False

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients locally inside the context."""
        before, self._in_no_sync = self._in_no_sync, True
        try:
            yield
        finally:
            self._in_no_sync = before

    def _enter_backward(self) -> None:
        self._silent = self._in_no_sync or not self._is_last()

    def _take(self, index: int) -> None:
        reduced = self._reduced_version[index]
        if reduced is not None:
            view = self._views[index]
            # One in-place change since the reduction is this accumulation: onto a sum over ranks.
            onto_sum = self._params[index].grad is view and view._version == reduced + 1
            if onto_sum or self._fired[index]:
                raise RuntimeError(
                    f"backward reached parameter {self._label(index)} again after its gradient was "
                    f"summed over the ranks: call zero_grad() after step(), and run all but the "
                    f"last backward of a step under optimizer.no_sync(). A step that is given up "
                    f"forgets gradients by optimizer.zero_grad()."
                )
            self._reduced_version[index] = None
        if self._at_once[index] and self._params[index].grad is not self._views[index]:
            self._adopt([index])

    def _adopt(self, indices: Sequence[int]) -> None:
        """Move gradients that autograd or the user has made into their places in the buckets."""
        torch._foreach_copy_(
            [self._places[index] for index in indices], [self._local(index) for index in indices]
        )
        for index in indices:
            self._params[index].grad = self._views[index]

    def _reduce(self, bucket: int) -> None:
        elsewhere = []
        for index in self._members[bucket]:
            grad = self._params[index].grad
            if grad is None:
                self._places[index].zero_()
            elif grad is not self._views[index]:
                elsewhere.append(index)
        if elsewhere:
            self._adopt(elsewhere)
        flat = self._buckets[bucket].flat_grad
        assert flat is not None
        self._start(bucket, flat, accumulate=False, recycled=False)
        for index in self._members[bucket]:
            self._reduced_version[index] = self._views[index]._version

    def finish(self) -> None:
        """See `Gradients.finish`."""
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
        self._launch()
        self._drain()

    def used(self) -> list[bool]:
        """See `Gradients.used`."""
        return [param.grad is not None for param in self._params]

    def end_step(self) -> None:
        """See `Gradients.end_step`; gradients stay until `zero_grad`, as torch's users expect."""
        self._start_round()

    def zero_grad(self, *, set_to_none: bool) -> None:
        """See `Gradients.zero_grad`; in the middle of a step it is called by all ranks."""
        if self._waiting is not None and self._overlap:
            # What is forgotten is on the way already, on some ranks more of it than on others.
            self._launch()
            self._drain()
            self.forget_errors()
        self._start_round()
        self._reduced_version = [None] * len(self._params)
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
        """See `Gradients.has_begun`."""
        return self._next > 0


class ShardedGradients(Gradients):
    """ZeRO-2: a full gradient exists only while its bucket fills and travels."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See `Gradients`."""
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
        if not self._nested:
            owner = weakref.ref(self)

            def end_of_backward() -> None:
                gradients = owner()
                if gradients is not None and any(gradients._placed):
                    gradients._end_round()

            torch.autograd.Variable._execution_engine.queue_callback(end_of_backward)

    def _take(self, index: int) -> None:
        bucket, position = self._home[index]
        if self._turn[bucket] < self._next:
            raise RuntimeError(
                f"one backward reached parameter {self._label(index)} again after its gradient was "
                f"reduced; use torch.utils.checkpoint with use_reentrant=False, or stage=1 with "
                f"overlap=False."
            )
        param, buffers = self._params[index], self._buckets[bucket]
        grad = self._local(index)
        if bucket not in self._filling:
            numel = buffers.bucket.numel
            self._filling[bucket] = self._borrow(numel, param.dtype, param.device)
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
        if flat is None:
            flat = self._borrow(
                buffers.bucket.numel, buffers.params[0].dtype, buffers.params[0].device
            )
            flat.zero_()
        else:
            for start, stop in buffers.gaps:
                flat[start:stop].zero_()
            for position, index in enumerate(self._members[bucket]):
                if not self._placed[index]:
                    buffers.view(flat, position).zero_()
        self._start(bucket, flat, accumulate=self._rounds > 0, recycled=True)
        if not self._overlap:
            self._drain()

    def _end_round(self) -> None:
        self._launch()
        self._rounds += 1
        self._placed = [False] * len(self._params)
        self._start_round()

    def finish(self) -> None:
        """See `Gradients.finish`."""
        for index, param in enumerate(self._params):
            if param.grad is not None:
                self._take(index)
        # A rank that has no gradient takes part all the same.
        if any(self._placed) or self._rounds == 0:
            self._end_round()
        self._drain()

    def used(self) -> list[bool]:
        """See `Gradients.used`."""
        return self._used

    def end_step(self) -> None:
        """See `Gradients.end_step`; the step has used the gradients up."""
        self._rounds = 0
        self._used = [False] * len(self._params)

    def zero_grad(self, *, set_to_none: bool) -> None:
        """See `Gradients.zero_grad`."""
        if self.has_begun:
            self.forget_errors()
        self._drain()
        self._drop_grads()
        for flat in self._filling.values():
            self._recycler.give_back(flat)
        self._filling.clear()
        self._placed = [False] * len(self._params)
        self._start_round()
        self.end_step()

    @property
    def has_begun(self) -> bool:
        """See `Gradients.has_begun`."""
        return self._rounds > 0 or any(self._placed)


class _InFlight:
    """A reduction under way."""

    def __init__(self, handle: Handle, recycled: Tensor | None) -> None:
        self.handle = handle
        self.recycled = recycled  # what may be used again afterwards


def _add_hook(param: Tensor, owner: weakref.ref[Gradients], index: int) -> RemovableHandle:
    def on_gradient(param: Tensor) -> None:
        gradients = owner()  # a weak reference: hooks do not keep the buffers alive
        if gradients is None:
            return
        if torch.is_grad_enabled():  # only in backward(create_graph=True)
            with torch.no_grad():
                gradients.on_gradient(index)
        else:
            gradients.on_gradient(index)

    # torch refuses the hook while a parameter is frozen, but keeps one that was there before.
    trains = param.requires_grad
    param.requires_grad_(True)
    handle: RemovableHandle = param.register_post_accumulate_grad_hook(on_gradient)
    param.requires_grad_(trains)
    return handle
