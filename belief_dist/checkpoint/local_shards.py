"""What this rank holds of each parameter, for either optimizer, and where it lies in the whole.

`ShardedAdaBelief` holds a range of a parameter's elements as they lie in memory, which its layout
tells; `AdaBelief` holds all of it, or under FSDP2 all of this rank's part of a DTensor. Both are a
range [start, stop) of a part of a logical tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from belief_dist.checkpoint.chunks import memory_order
from belief_dist.checkpoint.dcp_tensor import Pieces, Source, pieces_of
from belief_dist.operands import BLOCK
from belief_dist.sharded import ShardedAdaBelief
from belief_dist.sharding.dtensor import is_dtensor, local_part


@dataclass
class Holding:
    """One parameter on this rank.

    Attributes:
        name: In the checkpoint.
        param: The parameter.
        start: The first element that is held, of `local` as it lies in memory.
        stop: The first that is not held any more.
        tensors: What is held of these elements, 1-D, by the name of the state; "param" is the
            weight as it is trained, or with "remainder" its upper half. "wire_error" is of all.
        replicated: Whether every rank holds the same.
    """

    name: str
    param: Tensor
    start: int
    stop: int
    tensors: dict[str, Tensor]
    replicated: bool = False

    @property
    def local(self) -> Tensor:
        """What this rank stores of the parameter."""
        return local_part(self.param).detach()

    @property
    def order(self) -> tuple[int, ...]:
        """The dimensions in the order in which they lie in memory."""
        return memory_order(self.local.stride())

    @property
    def is_part(self) -> bool:
        """Whether this rank can hold a part of the logical tensor only."""
        return is_dtensor(self.param)

    def pieces(
        self, source: Tensor | Source, dtype: torch.dtype, *, span: tuple[int, int] | None = None
    ) -> Pieces:
        """Describe a tensor of the parameter's shape with `source` as the elements held here.

        Args:
            source: Elements [start, stop), or those of `span`.
            dtype: In the checkpoint.
            span: Another range than [start, stop).
        """
        local = self.local
        start, stop = span or (self.start, self.stop)
        within = None
        if is_dtensor(self.param):
            within = (tuple(self.param.shape), _offset(self.param))
        found = pieces_of(
            source, start, stop, local.shape, dtype, strides=local.stride(), within=within
        )
        found.replicated = self.replicated
        return found

    def block_pieces(self, source: Tensor | Source, *, span: tuple[int, int]) -> Pieces:
        """Describe the exponents of 8-bit blocks [a, b) = `span`: a flat tensor."""
        if self.is_part:
            raise ValueError(
                f"8-bit states of {self.name!r} belong to blocks of its part on this rank of a "
                f"tensor-parallel model, which no other layout has; use state_dtype=torch.bfloat16."
            )
        blocks = -(-self.local.numel() // BLOCK)
        return pieces_of(source, *span, (blocks,), torch.uint8)


def holdings(
    optimizer: Optimizer,
    names: Sequence[str],
    *,
    states: Mapping[Tensor, Mapping[str, Any]] | None = None,
) -> Iterator[Holding]:
    """Yield what this rank holds of each parameter, in the optimizer's order.

    Args:
        optimizer: `AdaBelief` or `ShardedAdaBelief`.
        names: Of its parameters.
        states: Of `AdaBelief`: those that shall be meant instead of its own.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, (name, param) in enumerate(zip(names, params, strict=True)):
        if isinstance(optimizer, ShardedAdaBelief):
            part = optimizer.layout.fragment(index, optimizer.comm.shard_index)
            start, stop = part.in_param, part.in_param + part.numel
            yield Holding(name, param, start, stop, optimizer.fragment_tensors(index))
            continue
        local = local_part(param).detach()
        state = (optimizer.state if states is None else states).get(param, {})
        tensors = {
            key: _flat(local_part(value), local)
            for key, value in state.items()
            if isinstance(value, Tensor) and key != "step"
        }
        tensors["param"] = _flat(local, local)
        yield Holding(name, param, 0, local.numel(), tensors, replicated=not is_dtensor(param))


def _flat(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a dense tensor as it lies in memory, sharing it.

    Raises:
        ValueError: It does not lie there as `like` does.
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
