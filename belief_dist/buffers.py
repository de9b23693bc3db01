"""Flat storage of one bucket, and the parameters and gradients that are views of it.

Because parameters and gradients are views, both collectives run in place and copy nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from belief_dist.layout import Bucket, Slot
from belief_dist.rule import compute_dtype


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


class BucketBuffers:
    """The tensors of one bucket on one rank.

    Attributes:
        flat_param: (bucket.numel,) in the parameters' dtype; all parameters are views of it.
        flat_grad: (bucket.numel,) likewise, for the gradients.
        param_shard: (bucket.shard_numel,), this rank's piece of `flat_param`.
        grad_shard: (bucket.shard_numel,) in the compute dtype: where reduced gradients arrive. It
            is this rank's piece of `flat_grad` unless parameters are 16 bits wide.
        master: (bucket.shard_numel,) in the compute dtype: the parameters that are updated. It is
            `param_shard` itself unless parameters are 16 bits wide.
        exp_avg, exp_avg_sq, max_exp_avg_sq: (bucket.shard_numel,) in the compute dtype; the last
            is None without amsgrad.
    """

    def __init__(
        self, bucket: Bucket, params: Sequence[Tensor], rank: int, *, amsgrad: bool
    ) -> None:
        """Move `params` (one for each slot) into flat storage; their values stay."""
        first = params[0]
        compute = compute_dtype(first.dtype)
        start, stop = bucket.shard_range(rank)
        self.bucket = bucket
        self.params = list(params)
        self.flat_param = torch.zeros(bucket.numel, dtype=first.dtype, device=first.device)
        self.flat_grad = torch.zeros_like(self.flat_param)
        self.grad_views: list[Tensor] = []
        for slot, param in zip(bucket.slots, params, strict=True):
            stride = _dense_stride(param)
            view = self._view(self.flat_param, slot, param.shape, stride)
            view.copy_(param.detach())
            param.data = view
            # `.data` gives every view a version counter of its own, so that in-place changes of
            # one gradient can be told from those of its neighbours.
            self.grad_views.append(self._view(self.flat_grad, slot, param.shape, stride).data)
        self.param_shard = self.flat_param[start:stop]
        if first.dtype == compute:
            self.master = self.param_shard
            self.grad_shard = self.flat_grad[start:stop]
        else:
            self.master = self.param_shard.to(compute)
            self.grad_shard = torch.zeros_like(self.master)
        self.exp_avg = torch.zeros_like(self.master)
        self.exp_avg_sq = torch.zeros_like(self.master)
        self.max_exp_avg_sq = torch.zeros_like(self.master) if amsgrad else None

    @staticmethod
    def _view(flat: Tensor, slot: Slot, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
        if slot.start == slot.stop:
            return flat[slot.start : slot.stop].view(tuple(shape))
        return flat.as_strided(tuple(shape), tuple(stride), flat.storage_offset() + slot.start)

    @property
    def has_master(self) -> bool:
        """Whether master weights are stored apart from the parameters."""
        return self.master is not self.param_shard

    def refresh_master(self) -> None:
        """Take the master weights from the parameters, whose values somebody has set."""
        self.master.copy_(self.param_shard)

    def nbytes(self) -> dict[str, int]:
        """Return the bytes that are really allocated, by kind."""
        grads = self.flat_grad.nbytes
        if self.has_master:
            grads += self.grad_shard.nbytes
        maximum = self.max_exp_avg_sq
        return {
            "parameters": self.flat_param.nbytes,
            "gradients": grads,
            "masters": self.master.nbytes if self.has_master else 0,
            "exp_avg": self.exp_avg.nbytes,
            "exp_avg_sq": self.exp_avg_sq.nbytes + (maximum.nbytes if maximum is not None else 0),
        }
