"""The way of the gradients, from backward into this rank's shards.

A hook on every parameter counts its bucket down; a full bucket is reduced while backward goes on.
Reductions start in one order on every rank, whatever the order in which gradients arrive, so that
ranks which use parameters differently still match: at first that of the layout, later the one that
all ranks together have seen in the first step. When backward ends, every rank starts what is left:
a reduction never waits for the `step` of a peer, which may stand behind a collective of the script.
All buckets once are a *round*, and every backward pass is one. There are two ways to hold what is
not yet reduced:

* `zero1.Zero1Reducer`: every gradient has its place in a flat buffer for good, where it adds up
  over backward passes. A later round sums all of it again; `no_sync` saves earlier ones.
* `zero2.Zero2Reducer`: a gradient lives in a recycled buffer until its bucket is reduced. A later
  round adds to the shard. `micro_batches.MicroBatchReducer` does so, too, and counts the rounds.

An exception inside backward leaves a round half done, on this rank alone perhaps. `zero_grad`
then completes it and gives the step up, together with the `step` of the other ranks.

With ordered reduction the shard holds, bit for bit, what one process gets that adds the gradients
of every round and in it of every rank, in that order, in the compute dtype.

From a gradient to the wire: the hook calls `on_gradient`, which calls `_launch` when a bucket is
full, which calls `_reduce` (the two ways differ), `_send`, `ReduceStream.start` and
`Collectives.start_reduce`.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import FrameType

import torch
from torch import Tensor
from torch._C import _current_graph_task_id
from torch.autograd.graph import _engine_run_backward
from torch.utils.hooks import RemovableHandle

from belief_dist import async_device
from belief_dist.engine_options import EngineOptions
from belief_dist.kernels import squared_norm_bins_
from belief_dist.norm import NUM_WORDS
from belief_dist.phases import Phases, TimedWait
from belief_dist.sharding.bucket import BucketBuffers
from belief_dist.sharding.buffer_pool import BufferPool
from belief_dist.sharding.collectives import Collectives, Named, ReduceRequest, naming
from belief_dist.sharding.driver import Driver
from belief_dist.sharding.dtensor import is_dtensor, local_grad
from belief_dist.sharding.grad_codec import codec_for
from belief_dist.sharding.norms import MODEL
from belief_dist.sharding.param_storage import ParamStorage
from belief_dist.sharding.reduce_stream import ReduceStream
from belief_dist.sharding.schedule import Schedule

INTERRUPTED = "a backward pass has raised, and was not taken back: call optimizer.zero_grad()"

# Flat buffers of gradients that exist at the same time: one fills while another travels. A pass
# whose gradients arrive out of order may need more.
_RECYCLED = 2

# Bytes from which a CPU's gradient is copied into its place at once, while it is in cache. Smaller
# ones, and all on a GPU, wait for their bucket and go together: one kernel for thousands.
_AT_ONCE = 1 << 16


class GradReducer(ABC):
    """Reduces the gradients of one optimizer; see the module.

    Args:
        params: All parameters.
        buckets: Whose slots name parameters by their index in `params`.
        comm: All ranks, which call `step` together.
        comms: Of each bucket, the ranks that share it.
        options: Overlap, and in which form gradients travel.
        driver: Knows which backward pass is the last one before a step.
        storage: Looks whether parameters still lie in their buckets.
        phases: Of the optimizer.
        norms: Of each bucket the norm in which its gradients count on this rank, see `norms`.
        own_norms: Those that are of one param group, on any rank.
        label: Names a parameter in errors.

    Attributes:
        schedule: The order of the reductions.
        is_closed: Whether another reducer has taken the parameters over.
        spoiled: After `finish`, why this step must not be taken on this rank: a sentence about a
            gradient that was changed after its reduction. None if nothing is wrong.
        dropped: After `finish`, the parameters whose gradients were set to None after their
            reduction; it must be the same on all ranks.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        buckets: Sequence[BucketBuffers],
        comm: Collectives,
        comms: Sequence[Collectives],
        options: EngineOptions,
        driver: Driver,
        storage: ParamStorage,
        phases: Phases,
        *,
        norms: Sequence[int],
        own_norms: Sequence[int],
        label: Callable[[int], str],
    ) -> None:
        # - What is reduced, and how
        self._params = params
        self._buckets = buckets
        self._comm = comm
        self._comms = comms
        self._overlap = options.overlap
        self._codec = codec_for(options.reduce_dtype)
        self._norms = norms
        self._own_norms = own_norms
        self._label = label
        self.driver = driver
        self._storage = storage
        self._phases = phases
        self.is_closed = False
        self.spoiled: str | None = None
        self.dropped: list[int] = []
        self._param_indices = [[slot.param for slot in b.bucket.slots] for b in buckets]
        # Of every parameter, its bucket and its position there.
        self._param_slot = [(0, 0)] * len(params)
        for b, indices in enumerate(self._param_indices):
            for position, index in enumerate(indices):
                self._param_slot[index] = (b, position)
        self._is_dtensor = [is_dtensor(param) for param in params]
        # Where the host runs ahead, a launch costs more than what a cache could save.
        large = not async_device.runs_behind(buckets[0].flat_param.device)
        self._moves_at_once = [is_dtensor(p) or (large and p.nbytes >= _AT_ONCE) for p in params]
        self._has_densified = False
        # - The running backward pass
        self._task = -1  # autograd's number of it
        self._nested = False  # called by another one
        self._pass: int | None = None  # the outermost one, until it has ended
        self._local_only = False  # its gradients stay on this rank for now
        # - The running round of reductions
        self.schedule = Schedule(len(buckets), len(params))
        self._stream = ReduceStream(buckets[0].flat_param.device, comm.world_size)
        # Of every set of ranks, whose memory only they share.
        sizes: dict[Collectives, int] = {}
        for each, buffers in zip(comms, buckets, strict=True):
            sizes[each] = max(sizes.get(each, 0), self._message_nbytes(buffers))
        self._pools = {each: BufferPool(_RECYCLED, n, each.scratch) for each, n in sizes.items()}
        as_is = all(
            self._codec.wire_dtype(each.flat_param.dtype) == each.flat_param.dtype
            for each in buckets
        )
        in_place = options.keeps_full_gradients and as_is
        for each, nbytes in sizes.items():
            each.reserve(nbytes, buckets[0].flat_param.device, in_place=in_place)
        self._bins: dict[tuple[Collectives, int], Tensor] = {}
        # An optimizer of an earlier phase, or of a cell that was run before, may still be alive.
        for earlier in {id(each): each for p in params for each in _reducers_of(p)}.values():
            earlier.close()
        owner = weakref.ref(self)
        self._hooks = [_add_hook(param, owner, i) for i, param in enumerate(params)]

    def _message_nbytes(self, buffers: BucketBuffers) -> int:
        """Return the bytes of all gradients of a bucket, as they are or as they travel."""
        numel, dtype = buffers.bucket.numel, buffers.flat_param.dtype
        codec = self._codec
        return max(
            numel * dtype.itemsize, codec.wire_numel(numel) * codec.wire_dtype(dtype).itemsize
        )

    def close(self) -> None:
        """Remove the hooks from the parameters: another reducer takes them over."""
        self.is_closed = True
        for hook in self._hooks:
            hook.remove()

    def nbytes(self) -> int:
        """Return the bytes of recycled buffers."""
        return sum(pool.nbytes() for pool in self._pools.values())

    # - Backward

    def on_gradient(self, index: int) -> None:
        """Take the gradient that backward has just accumulated for parameter `index`.

        Runs once for every parameter and backward: models have thousands, so it is kept short.
        """
        task = _current_graph_task_id()
        if task != self._task:
            self._task, self._nested = task, _in_nested_backward()
            self._storage.take_over()
            self._enter_backward()
            if not self._nested and task != self._pass:
                self._begin_pass(task)
        self._take(index)
        schedule = self.schedule
        if self._local_only or self._nested or schedule.arrived[index]:
            return
        schedule.arrived[index] = True
        pending = schedule.pending_grads
        if pending is None:  # counted late, as parameters may be frozen until backward begins
            pending = schedule.pending_grads = self._count_gradients()
            schedule.completed = []
        bucket = self._param_slot[index][0]
        pending[bucket] -= 1
        if not pending[bucket]:
            schedule.completed.append(bucket)
            if self._overlap:
                self._launch(pending)

    def _begin_pass(self, task: int) -> None:
        if self.is_interrupted:
            raise RuntimeError(f"{INTERRUPTED} before the next backward.")
        self._pass, self._local_only = task, self._stays_local()
        owner = weakref.ref(self)

        def end_of_backward() -> None:
            reducer = owner()
            if reducer is not None:
                reducer._pass = None
                if not reducer._local_only:
                    reducer._end_round()

        # Autograd calls back on every rank that ran a pass, whatever parameters it has used; but
        # not if the pass raises.
        torch.autograd.Variable._execution_engine.queue_callback(end_of_backward)

    @property
    def is_interrupted(self) -> bool:
        """Whether a backward pass has raised, so that other ranks wait for the rest of its round.

        Asked between backward passes.
        """
        return self._pass is not None and not self._local_only

    @property
    def is_awaited(self) -> bool:
        """Whether other ranks wait for this one in a step, which `zero_grad` must join first."""
        return self.is_interrupted

    @property
    def may_give_up(self) -> bool:
        """Whether all ranks may then skip the step; otherwise it is an error on all."""
        return True

    def end_interrupted(self) -> None:
        """Send what is left of the round that was interrupted, whatever it is worth."""
        self._end_round()
        self._pass = None

    def _count_gradients(self) -> list[int]:
        """Return how many gradients each bucket waits for; frozen parameters get none."""
        trains = [param.requires_grad for param in self._params]
        return [sum(map(trains.__getitem__, indices)) for indices in self._param_indices]

    def _launch(self, pending: Sequence[int] | None = None) -> None:
        """Start the reductions whose turn it is, up to the first that is still `pending`."""
        schedule = self.schedule
        while schedule.next < len(self._buckets):
            bucket = schedule.order[schedule.next]
            # A bucket that is full before its turn waits: messages have no tags, so ranks must not
            # launch two buckets in opposite orders.
            if pending is not None and pending[bucket] > 0:
                return
            if schedule.next == 0:
                # Squares of an earlier round are those of incomplete sums: the last round counts.
                self._clear_bins()
                schedule.rounds += 1
            with self._phases("reduce"):
                self._reduce(bucket)
            schedule.next += 1

    def _clear_bins(self) -> None:
        device = self._buckets[0].param_shard.device
        # Apart for each set of ranks, whose sums may be taken at the same time.
        kinds = {(self._comm, norm) for norm in (MODEL, *self._own_norms)}
        kinds |= set(zip(self._comms, self._norms, strict=True))
        self._bins = {
            kind: torch.zeros(NUM_WORDS, dtype=torch.int64, device=device) for kind in kinds
        }

    def _bins_of(self, bucket: int) -> Tensor:
        return self._bins[self._comms[bucket], self._norms[bucket]]

    @property
    def norm_bins(self) -> Tensor:
        """The squares of this rank's shards, norm by norm, after `finish`.

        What is not finite counts in the first, wherever it is.
        """
        found: dict[int, Tensor] = {}
        for (_, norm), bins in self._bins.items():
            found[norm] = found[norm] + bins if norm in found else bins
        bins = found[MODEL]
        others = [each for norm, each in found.items() if norm != MODEL]
        if others:
            bins = bins.clone()
        for each in others:
            bins[-1:].add_(each[-1:])  # `+=` would copy it once more
        own = [found[norm] for norm in self._own_norms]
        return torch.cat([bins, *own]) if own else bins

    def _drain(self) -> None:
        """Wait for all reductions that have begun."""
        for pool in self._pools.values():
            pool.drain()

    def _forget_sums(self, indices: Sequence[int]) -> None:
        """Take the gradients of some parameters out of the sums, and out of their squares."""
        self._drain()
        for index in indices:
            bucket, position = self._param_slot[index]
            self._buckets[bucket].own_grad(position).zero_()
        self._clear_bins()
        for bucket, buffers in enumerate(self._buckets):
            comm = self._comms[bucket]
            # Of ranks that keep the same shard, each counts its part.
            counted = buffers.grad_shard.view(comm.num_replicas, -1)[comm.rank // comm.num_shards]
            squared_norm_bins_(self._bins_of(bucket), counted)

    def _send(self, bucket: int, flat: Tensor, *, accumulate: bool, recycled: bool) -> None:
        """Start to sum `flat` over the ranks; it goes back to the pool if it is `recycled`."""
        message, buffers, codec = flat, self._buckets[bucket], self._codec
        comm, pool = self._comms[bucket], self._pools[self._comms[bucket]]
        wire_dtype = codec.wire_dtype(flat.dtype)
        if wire_dtype != flat.dtype:
            message = pool.take(codec.wire_numel(flat.numel()), wire_dtype, flat.device)
            codec.encode_(message, flat, buffers.wire_error, self._idle_errors(bucket))
            if recycled:
                pool.give_back(flat)
            recycled = True
        bins = self._bins_of(bucket)
        addends = self._num_addends()
        request = ReduceRequest(message, buffers.grad_shard, bins, codec, accumulate, addends)
        what = f"summing the gradients of bucket {bucket}"
        with naming(comm, what):  # it may wait for an earlier one
            handle = TimedWait(self._stream.start(comm, request), self._phases, "reduce_wait")
        pool.lend(Named(handle, comm, what), message if recycled else None)

    def _num_addends(self) -> int | None:
        """Return how many ranks, the first ones, add to the running round; None if all do."""
        return None

    def _idle_errors(self, bucket: int) -> list[Tensor]:
        """Return the places of rounding errors whose parameters have no gradient on this rank."""
        buffers = self._buckets[bucket]
        if buffers.wire_error is None:
            return []
        used = self.used()
        return [
            buffers.view(buffers.wire_error, position)
            for position, index in enumerate(self._param_indices[bucket])
            if not used[index]
        ]

    def forget_errors(self) -> None:
        """Drop what rounding has cut off in a step that was skipped or given up."""
        for buffers in self._buckets:
            if buffers.wire_error is not None:
                buffers.wire_error.zero_()

    # - What ZeRO-1 and ZeRO-2 differ in

    @abstractmethod
    def no_sync(self) -> AbstractContextManager[None]:
        """Return a context in which gradients add up without communication, where that helps."""

    @abstractmethod
    def _stays_local(self) -> bool:
        """Return whether the gradients of the pass that begins stay on this rank for now."""

    @abstractmethod
    def _enter_backward(self) -> None:
        """Notice that a backward pass has begun, or a nested one has begun or ended."""

    @abstractmethod
    def _take(self, index: int) -> None:
        """Bring a gradient to its place."""

    @abstractmethod
    def _reduce(self, bucket: int) -> None:
        """Start the reduction of a bucket."""

    @abstractmethod
    def _end_round(self) -> None:
        """Start what is left of the round."""

    @abstractmethod
    def finish(self) -> None:
        """Reduce what is left, and return when the bins and all shards are complete."""

    @abstractmethod
    def used(self) -> list[bool]:
        """Return which parameters have got a gradient since the last step, on this rank."""

    @abstractmethod
    def end_step(self) -> None:
        """Notice that a step has taken the gradients."""

    @abstractmethod
    def zero_grad(self, *, set_to_none: bool) -> None:
        """Forget all gradients."""

    @property
    @abstractmethod
    def has_begun(self) -> bool:
        """Whether gradients have been reduced since the last step."""

    # - What both need

    def _drop_grads(self) -> None:
        with torch._C.DisableTorchFunction():  # whose modes slow it while gathers travel
            for param in self._params:
                param.grad = None

    def _local_grad(self, index: int) -> Tensor:
        """Return the gradient of the part that this rank stores, dense."""
        param = self._params[index]
        grad = param.grad
        assert grad is not None
        if self._is_dtensor[index]:
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


def _reducers_of(param: Tensor) -> list[GradReducer]:
    """Return the reducers whose hooks are on a parameter."""
    hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
    owners = [getattr(hook, "belief_dist_owner", None) for hook in hooks.values()]
    return [reducer for owner in owners if owner is not None and (reducer := owner()) is not None]


def _add_hook(param: Tensor, owner: weakref.ref[GradReducer], index: int) -> RemovableHandle:
    def on_gradient(param: Tensor) -> None:
        reducer = owner()  # a weak reference: hooks do not keep the buffers alive
        if reducer is None:
            return
        if torch.is_grad_enabled():  # only in backward(create_graph=True)
            with torch.no_grad():
                reducer.on_gradient(index)
        else:
            reducer.on_gradient(index)

    on_gradient.belief_dist_owner = owner  # type: ignore[attr-defined]
    # torch refuses the hook while a parameter is frozen, but keeps one that was there before.
    trains = param.requires_grad
    param.requires_grad_(True)
    handle: RemovableHandle = param.register_post_accumulate_grad_hook(on_gradient)
    param.requires_grad_(trains)
    return handle
