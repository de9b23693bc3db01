"""Flat storage of one bucket, and the parameters and gradients that are views of it.

Because parameters and gradients are views, both collectives run in place and copy nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from belief_dist.engine_options import EngineOptions
from belief_dist.operands import BLOCK, Operands
from belief_dist.rule import compute_dtype
from belief_dist.sharding.grad_codec import codec_for
from belief_dist.sharding.layout import PARAM_ALIGN_BYTES, Bucket, Fragment, Layout
from belief_dist.state_dict import AVERAGE
from belief_dist.state_formats import join_master

# Elements whose masters are joined at a time, so that temporary memory stays small.
_WINDOW = 1 << 18


def _dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """Return the tensor's strides if its elements fill memory without gaps, else contiguous ones.

    Keeping them keeps channels-last and transposed parameters as they were.
    """
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return torch.empty(tensor.shape, device="meta").stride()
        expected *= size
    return tensor.stride()


def own_fragment(layout: Layout, buckets: Sequence[BucketBuffers], index: int) -> Fragment:
    """Return the part of parameter number `index` that this rank owns."""
    return layout.fragment(index, buckets[layout.place(index)[0]].shard_index)


def block_of(options: EngineOptions) -> int:
    """Return of how many elements a parameter's start and a shard must be multiples.

    A block that two parameters or two shards shared would be encoded by two of them.
    """
    of_states = BLOCK if options.state_dtype == torch.uint8 else 1
    # Where bytes start at a multiple of 16, a GPU reads several of them at once.
    of_masters = PARAM_ALIGN_BYTES if options.remainder_dtype == torch.int8 else 1
    return max(codec_for(options.reduce_dtype).block, of_states, of_masters)


class BucketBuffers:
    """The tensors of one bucket on one rank.

    Attributes:
        bucket: The plan.
        shard_index: Which shard this rank keeps.
        flat_param: (bucket.numel,) in the parameters' dtype; all parameters are views of it.
        flat_grad: (bucket.numel,) likewise, for the gradients; None if only the shard is kept.
        grad_views: The place of each parameter's gradient in `flat_grad`.
        gaps: Ranges [start, stop) of the bucket that are padding.
        param_shard: (bucket.shard_numel,), this rank's piece of `flat_param`.
        grad_shard: (bucket.shard_numel,) in the compute dtype: where reduced gradients arrive. For
            one rank it is `flat_grad`, in the parameters' dtype, if there is one.
        master: (bucket.shard_numel,): the parameters that are updated, in the compute dtype. It is
            `param_shard` itself unless parameters are 16 bits wide or it is on the host. With
            remainders, the bfloat16 parameters that are the upper half of the masters.
        remainder: (bucket.shard_numel,), int16 or int8: the rest of the masters, or None.
        states: exp_avg, exp_avg_sq and, with amsgrad, max_exp_avg_sq, each (bucket.shard_numel,),
            in the compute dtype or `state_dtype`; with uint8 also the exponents of each. With
            `ema_decay` also param_ema, likewise, in the compute dtype or `ema_dtype`.
        low_param: (bucket.shard_numel,): where the update writes 16-bit parameters, else None.
        wire_error: (bucket.numel,) in the parameters' dtype: what the codec keeps, or None.
        on_host: Whether `master`, states and `low_param` are in the host's memory, which is pinned
            if the parameters are on another device.
    """

    def __init__(
        self,
        bucket: Bucket,
        params: Sequence[Tensor],
        shard_index: int,
        options: EngineOptions,
        *,
        amsgrad: bool,
        on_host: bool,
        is_alone: bool,
        allocate: Callable[[int, torch.dtype, torch.device], Tensor],
    ) -> None:
        """Move `params` (one for each slot) into flat storage; their values stay.

        Args:
            bucket: The plan.
            params: The parameters of its slots.
            shard_index: Which shard to keep.
            options: What to keep, and in which form.
            amsgrad: Also keep the largest s so far.
            on_host: See the class.
            is_alone: There is no other rank.
            allocate: `Collectives.buffer`, for what is summed or gathered.
        """
        first = params[0]
        compute = compute_dtype(first.dtype)
        start, stop = bucket.shard_range(shard_index)
        self._start = start
        self.bucket = bucket
        self.shard_index = shard_index
        self.params = list(params)
        self._strides = [_dense_stride(param) for param in params]
        self.flat_param = allocate(bucket.numel, first.dtype, first.device)
        self.flat_grad: Tensor | None = None
        if options.keeps_full_gradients:
            self.flat_grad = allocate(bucket.numel, first.dtype, first.device)
        keeps_error = codec_for(options.reduce_dtype).keeps_error
        self.wire_error = torch.zeros_like(self.flat_param) if keeps_error else None
        self.grad_views: list[Tensor] = []
        for position, param in enumerate(params):
            # `.data` keeps the Parameter object that the model and its hooks hold.
            view = self.view(self.flat_param, position)
            view.copy_(param.detach())
            param.data = view
            if self.flat_grad is not None:
                # `.data` gives every view a version counter of its own, so that in-place changes
                # of one gradient can be told from those of its neighbours.
                self.grad_views.append(self.view(self.flat_grad, position).data)
        ends = [0, *(slot.stop for slot in bucket.slots)]
        starts = [*(slot.start for slot in bucket.slots), bucket.numel]
        self.gaps = [(a, b) for a, b in zip(ends, starts, strict=True) if a < b]
        self.param_shard = self.flat_param[start:stop]
        self.on_host = on_host
        is_low = first.dtype != compute
        self.low_param: Tensor | None = self.param_shard if is_low else None
        if is_low and self.on_host:
            self.low_param = self._on_host_like(self.param_shard, first.dtype)
        self.remainder: Tensor | None = None
        self.master = self.param_shard
        if is_low and options.remainder_dtype is not None:
            assert self.low_param is not None
            self.master = self.low_param
            self.remainder = self._zeros(options.remainder_dtype)
        elif self.on_host:
            self.master = self._on_host_like(self.param_shard, compute)
        elif is_low:
            self.master = self.param_shard.to(compute)
        # The update widens 16-bit gradients itself; but limits of values are those of float32.
        as_is = codec_for(options.reduce_dtype).wire_dtype(first.dtype) == first.dtype
        fits = first.dtype == compute or (as_is and options.max_grad_value is None)
        if self.flat_grad is not None and fits and is_alone:
            self.grad_shard = self.flat_grad
        else:
            self.grad_shard = torch.zeros_like(self.param_shard, dtype=compute)

        stored = options.stored_dtype(compute)
        self.states: dict[str, Tensor] = {}
        for name in ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * amsgrad:
            self.states[name] = self._zeros(stored)
            if stored == torch.uint8:
                self.states[f"{name}_exponent"] = self._zeros(torch.uint8, BLOCK)
        if options.keeps_averages:
            form = options.average_dtype(compute)
            self.states[AVERAGE] = self._zeros(form)

    def _zeros(self, dtype: torch.dtype, per: int = 1) -> Tensor:
        """Return a zero for every `per` elements of the shard, where the masters are."""
        like = self.master
        return torch.zeros(
            like.numel() // per, dtype=dtype, device=like.device, pin_memory=like.is_pinned()
        )

    @staticmethod
    def _on_host_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        pinned = tensor.device.type == "cuda"
        copy = torch.empty(tensor.shape, dtype=dtype, device="cpu", pin_memory=pinned)
        return copy.copy_(tensor)

    def view(self, flat: Tensor, position: int) -> Tensor:
        """Return the place of the parameter at `position` in a flat buffer of this bucket."""
        slot, shape = self.bucket.slots[position], self.params[position].shape
        if slot.start == slot.stop:
            return flat[slot.start : slot.stop].view(shape)
        return flat.as_strided(shape, self._strides[position], flat.storage_offset() + slot.start)

    def gaps_of_shard(self) -> list[tuple[int, int]]:
        """Return the ranges [start, stop) of the shard that are padding."""
        size = self.param_shard.numel()
        clipped = [
            (max(start - self._start, 0), min(stop - self._start, size))
            for start, stop in self.gaps
        ]
        return [(start, stop) for start, stop in clipped if start < stop]

    def own_grad(self, position: int) -> Tensor:
        """Return the part of `grad_shard` that belongs to the parameter at `position`."""
        slot = self.bucket.slots[position]
        return self.grad_shard[max(slot.start - self._start, 0) : max(slot.stop - self._start, 0)]

    @property
    def has_master(self) -> bool:
        """Whether float32 or float64 master weights are stored apart from the parameters."""
        return self.remainder is None and self.master is not self.param_shard

    def refresh_master(self, start: int = 0, stop: int | None = None) -> None:
        """Copy parameters [start, stop) of the shard into their masters."""
        window = slice(start, stop)
        if self.has_master:
            self.master[window].copy_(self.param_shard[window])
        if self.remainder is not None:
            self.remainder[window].zero_()
        self.refresh_upper_halves(window)

    def refresh_edited(self) -> None:
        """Copy those parameters of the shard into their masters that are not rounded from them."""
        now = self.param_shard.to(self.master.device)
        if self.on_host and self.low_param is not None:
            edited = now != self.low_param
            self.low_param.copy_(now)
        else:
            edited = now != self.master.to(now.dtype)
        if self.has_master:
            self.master.copy_(torch.where(edited, now.to(self.master.dtype), self.master))
        if self.remainder is not None:
            self.remainder.masked_fill_(edited, 0)

    def refresh_upper_halves(self, window: slice = slice(None)) -> None:
        """Take the host's copies of 16-bit parameters from the parameters; remainders stay."""
        if self.on_host and self.low_param is not None:
            self.low_param[window].copy_(self.param_shard[window])

    def start_average(self, start: int = 0, stop: int | None = None) -> None:
        """Let the averages of weights [start, stop) of the shard start from these weights."""
        end = self.master.numel() if stop is None else stop
        for first in range(start, end, _WINDOW):
            window = slice(first, min(first + _WINDOW, end))
            weights = self.master[window]
            if self.remainder is not None:
                weights = join_master(weights, self.remainder[window])
            self.states[AVERAGE][window].copy_(weights)

    def operands(self, grads: Tensor) -> Operands:
        """Return what a step with the reduced gradients `grads` works on: the whole shard."""
        states: dict[str, Any] = self.states
        out = None if self.remainder is not None else self.low_param
        return Operands(
            param=self.master, grad=grads, param_out=out, remainder=self.remainder, **states
        )

    def send_back(self) -> None:
        """Copy updated parameters from the host to their place, in the order of the stream."""
        if self.on_host:
            updated = self.master if self.low_param is None else self.low_param
            self.param_shard.copy_(updated, non_blocking=True)

    def nbytes(self) -> dict[str, int]:
        """Return the bytes that are really allocated, by kind."""
        grads = 0 if self.flat_grad is None else self.flat_grad.nbytes
        if self.grad_shard is not self.flat_grad:
            grads += self.grad_shard.nbytes
        masters = self.master.nbytes if self.has_master else 0
        if self.remainder is not None:
            masters += self.remainder.nbytes
        if self.on_host and self.low_param is not None:
            masters += self.low_param.nbytes
        held = {
            "parameters": self.flat_param.nbytes,
            "gradients": grads,
            "masters": masters,
            "exp_avg": 0,
            "exp_avg_sq": 0,
        }
        for name, state in self.states.items():
            kind = "exp_avg_sq" if "exp_avg_sq" in name else "exp_avg"
            kind = "averages" if name == AVERAGE else kind
            held[kind] = held.get(kind, 0) + state.nbytes
        if self.wire_error is not None:
            held["wire errors"] = self.wire_error.nbytes
        return held


def bytes_of(buckets: Sequence[BucketBuffers]) -> dict[str, int]:
    """Return the bytes that are really allocated for all buckets, by kind."""
    total: dict[str, int] = {}
    for bucket in buckets:
        for kind, nbytes in bucket.nbytes().items():
            total[kind] = total.get(kind, 0) + nbytes
    return total
