"""Gives all ranks the buffers of the first rank: random features, statistics of a batch norm.

An optimizer is handed parameters, not the module; DistributedDataParallel, which has it, does this.
So the modules that hold the parameters are looked for among all live objects, once.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from belief_dist.sharding.collectives import Collectives


def modules_around(params: Sequence[Tensor]) -> list[nn.Module]:
    """Return all live modules that hold any of `params`, themselves or in modules inside.

    In the order of their first parameter; those that hold more come before those inside them.
    """
    places = {id(param): place for place, param in enumerate(params)}
    holders = []
    for thing in gc.get_objects():
        if issubclass(type(thing), nn.Module):
            inside = [places[id(p)] for p in thing.parameters() if id(p) in places]
            if inside:
                holders.append((min(inside), -len(inside), thing))
    holders.sort(key=lambda each: each[:2])
    return [module for _, _, module in holders]


def find_buffers(params: Sequence[Tensor], shared: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Return the buffers of the modules around `params`, in an order that the model fixes.

    Buffers that are not plain dense tensors are left out.

    Args:
        params: Parameters.
        shared: Those that all ranks share; None if they share all. Buffers of modules that hold
            another one, such as an expert, are left out.
    """
    found: dict[int, Tensor] = {}
    apart = set(map(id, params)) - set(map(id, params if shared is None else shared))
    for module in modules_around(params):  # modules inside others add nothing new
        skipped: set[int] = set()
        for inside in module.modules() if apart else ():
            if any(id(param) in apart for param in inside._parameters.values()):
                skipped.update(map(id, inside.buffers()))
        for buffer in module.buffers():
            if id(buffer) in skipped:
                continue
            if type(buffer) is Tensor and buffer.layout == torch.strided and not buffer.is_meta:
                found.setdefault(id(buffer), buffer)
    return list(found.values())


@torch.no_grad()
def spread_buffers(comm: Collectives, params: Sequence[Tensor], shared: Sequence[Tensor]) -> None:
    """Copy the first rank's buffers to all ranks; called by all ranks.

    Args:
        comm: The ranks.
        params: All parameters.
        shared: As for `find_buffers`.

    Raises:
        ValueError: On all ranks: they have other buffers.
    """
    if comm.world_size == 1:
        return
    buffers = find_buffers(params, shared)
    kinds = [(tuple(each.shape), str(each.dtype)) for each in buffers]
    everyone = comm.exchange(kinds)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise ValueError(
                f"rank {rank} has other buffers than rank 0 in the modules around its parameters "
                f"({len(theirs)} and {len(everyone[0])}, with their shapes and dtypes). Build the "
                f"same model on every rank, or pass sync_buffers=False to leave buffers as they "
                f"are."
            )
    if not buffers:
        return
    # As one message of bytes, wherever the buffers lie.
    parts = [each.detach().contiguous().view(-1).view(torch.uint8) for each in buffers]
    message = torch.cat([part.to(params[0].device) for part in parts])
    comm.broadcast_(message)
    for buffer, part in zip(buffers, message.split([len(p) for p in parts]), strict=True):
        # A copy starts at an address that suits the dtype.
        values = part.clone().view(buffer.dtype).view(buffer.shape)
        if not torch.equal(buffer, values.to(buffer.device)):
            buffer.copy_(values)
