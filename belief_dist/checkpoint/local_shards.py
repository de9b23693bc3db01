"""The part of each parameter and its states that this rank holds, for both optimizers.

`ShardedAdaBelief` holds a range of a parameter's elements in memory order, given by its layout.
`AdaBelief` holds the whole parameter, or under FSDP2 the local part of a DTensor. Both are a range
[start, stop) of the local part of a logical tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from belief_dist.checkpoint.chunks import memory_order
from belief_dist.checkpoint.dcp_tensor import DcpTensor, ReadRange, make_dcp_tensor
from belief_dist.operands import BLOCK
from belief_dist.sharded import ShardedAdaBelief
from belief_dist.sharding.dtensor import is_dtensor, local_part


@dataclass
class LocalShard:
    """What this rank holds of one parameter.

    Attributes:
        name: Name in the checkpoint.
        param: The parameter.
        start: First element held here, counted in `local` in memory order.
        stop: End of that range (exclusive).
        tensors: 1-D tensors of these elements, by name of the state. "param" is the weight as it is
            trained, or, where there is a "remainder", its upper half. "wire_error" alone covers the
            whole parameter.
        replicated: Whether every rank holds the same elements.
    """

    name: str
    param: Tensor
    start: int
    stop: int
    tensors: dict[str, Tensor]
    replicated: bool = False

    @property
    def local(self) -> Tensor:
        """The parameter, or the local part of a DTensor."""
        return local_part(self.param).detach()

    @property
    def order(self) -> tuple[int, ...]:
        """The dimensions of `local`, from the slowest-varying in memory to the fastest."""
        return memory_order(self.local.stride())

    def dcp_tensor(
        self, source: Tensor | ReadRange, dtype: torch.dtype, *, span: tuple[int, int] | None = None
    ) -> DcpTensor:
        """Return a tensor of the parameter's shape for DCP, of which `source` is held here.

        Args:
            source: Elements [start, stop), or those of `span`.
            dtype: Dtype in the checkpoint.
            span: The range of `source`, if it is not [start, stop).
        """
        local = self.local
        start, stop = span or (self.start, self.stop)
        within = None
        if is_dtensor(self.param):  # `local` is a rectangular part of the global tensor
            within = (tuple(self.param.shape), _offset(self.param))
        tensor = make_dcp_tensor(
            source, start, stop, local.shape, dtype, strides=local.stride(), within=within
        )
        tensor.replicated = self.replicated
        return tensor

    def exponent_tensor(self, source: Tensor | ReadRange, *, span: tuple[int, int]) -> DcpTensor:
        """Return the 1-D tensor of all blocks' exponents for DCP; blocks `span` are held here."""
        if is_dtensor(self.param):
            raise ValueError(
                f"8-bit states of {self.name!r} belong to blocks of its part on this rank of a "
                f"tensor-parallel model, which no other layout has; use state_dtype=torch.bfloat16."
            )
        blocks = -(-self.local.numel() // BLOCK)
        return make_dcp_tensor(source, *span, (blocks,), torch.uint8)


def local_shards(
    optimizer: Optimizer,
    names: Sequence[str],
    *,
    states: Mapping[Tensor, Mapping[str, Any]] | None = None,
) -> Iterator[LocalShard]:
    """Yield what this rank holds of each parameter, in the optimizer's order.

    Args:
        optimizer: `AdaBelief` or `ShardedAdaBelief`.
        names: Names of its parameters.
        states: Used in place of the states of an `AdaBelief`.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, (name, param) in enumerate(zip(names, params, strict=True)):
        if isinstance(optimizer, ShardedAdaBelief):
            part = optimizer.fragment(index)
            start, stop = part.in_param, part.in_param + part.numel
            yield LocalShard(name, param, start, stop, optimizer.fragment_tensors(index))
            continue
        local = local_part(param).detach()
        state = (optimizer.state if states is None else states).get(param, {})
        # "step" is a tensor with capturable=True; it is saved as a number, with the metadata.
        tensors = {
            key: _flat(local_part(value), local)
            for key, value in state.items()
            if isinstance(value, Tensor) and key != "step"
        }
        tensors["param"] = _flat(local, local)
        yield LocalShard(name, param, 0, local.numel(), tensors, replicated=not is_dtensor(param))


def _flat(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a 1-D view of a dense tensor, in memory order.

    Raises:
        ValueError: Its memory format is not that of `like`.
    """
    if like.numel() == 0:
        return tensor.reshape(-1)
    order = memory_order(like.stride())
    moved = tensor.permute(order)
    if not moved.is_contiguous():
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} has gaps or "
            f"another memory format than its parameter's; make both contiguous."
        )
    return moved.view(-1)


def _offset(param: Any) -> tuple[int, ...]:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    return tuple(offset)
