"""Parameters with ranks of their own, and what these agree about before all ranks do.

An expert is held by some ranks only, which share its states, sum its gradients and hold equal
copies of it. Whether it has a gradient, and whether its copies are equal, is their affair; what
they find wrong goes into the message of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from belief_dist.async_device import upload
from belief_dist.sharding.collectives import Collectives, naming
from belief_dist.sharding.layout import Layout


class RankSet(NamedTuple):
    """Ranks that share some of the parameters: all of the optimizer, or those of a param group.

    Attributes:
        comm: The ranks.
        params: Which parameters, by index.
        buckets: These are their buckets.
        is_all: They share all parameters.
    """

    comm: Collectives
    params: list[int]
    buckets: list[int]
    is_all: bool

    def of_params(self, used: list[bool]) -> list[bool]:
        """Return what is said of these parameters, of all."""
        return used if self.is_all else [used[index] for index in self.params]

    def write_back(self, used: list[bool], found: Sequence[bool]) -> None:
        """Say something else of these parameters."""
        if self.is_all:
            used[:] = found
        else:
            for index, is_used in zip(self.params, found, strict=True):
                used[index] = is_used

    def places_of(self, indices: Sequence[int]) -> list[int]:
        """Return the positions of those `indices` that are in `params`."""
        places = {index: place for place, index in enumerate(self.params)} if indices else {}
        return [places[index] for index in indices if index in places]

    def checksum(self, sums: Tensor | None, device: torch.device) -> Tensor:
        """Return one word for all copies that these ranks hold.

        Args:
            sums: (number of all buckets,), int64: of the parameters of each; None for 0.
            device: Of the result.
        """
        if sums is None or not self.buckets:
            return torch.zeros((), dtype=torch.int64, device=device)
        if self.is_all:
            return sums.sum()
        # No index: it would be a tensor of the host's, and wait for the device.
        return torch.stack([sums[number] for number in self.buckets]).sum()


def rank_sets(layout: Layout, comms: Sequence[Collectives]) -> list[RankSet]:
    """Return who shares which parameters.

    Args:
        layout: Of all parameters.
        comms: All ranks of the optimizer, and then those of param groups with ranks of their own.
    """
    found = []
    for number, comm in enumerate(comms):
        params = [index for index, spec in enumerate(layout.params) if spec.ranks == number]
        buckets = [index for index, plan in enumerate(layout.buckets) if plan.ranks == number]
        found.append(RankSet(comm, params, buckets, len(comms) == 1))
    return found


def agree_inside(
    ranks: RankSet,
    used: list[bool],
    dropped: Sequence[int],
    sums: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Agree about parameters with the ranks that share them; called by all of these.

    Args:
        ranks: These.
        used: Which parameters have a gradient on this rank; then, on any of `ranks`.
        dropped: Which parameters had one when it was reduced.
        sums: As for `RankSet.checksum`.
        device: Of the parameters.

    Returns:
        (2,), int64: whether a gradient is torn, see `read_use`, and whether copies differ. None
        for a single rank.
    """
    comm = ranks.comm
    if comm.world_size == 1 or not ranks.params:
        return None
    mine = ranks.of_params(used)
    replica = ranks.checksum(sums, device)
    own = torch.stack([replica, mixed(replica)])
    words = use_words(mine, ranks.places_of(dropped), comm.world_size, device)
    message = torch.cat([own, words])
    with naming(comm, "agreeing about parameters with ranks of their own"):
        comm.sum_(message)
    agreed, torn = read_use(message[2:], mine, comm.world_size)
    ranks.write_back(used, agreed)
    differ = (message[:2] != own * comm.world_size).any()
    return torch.stack([torn, differ]).long()


def use_words(
    used: Sequence[bool], dropped: Sequence[int], world_size: int, device: torch.device
) -> Tensor:
    """Return a word for each parameter, of which ranks send the sum: see `read_use`."""
    if all(used):
        return torch.ones(len(used), dtype=torch.int64, device=device)
    each = list(map(int, used))
    for index in dropped:
        each[index] = world_size + 1
    return upload(each, torch.int64, device)


def read_use(words: Tensor, used: Sequence[bool], world_size: int) -> tuple[list[bool], Tensor]:
    """Return which parameters are used on any rank, and whether a gradient is torn.

    It is if some ranks have dropped it after its reduction: it is in the sums of the others.
    """
    of_dropped = world_size + 1
    torn = ((words >= of_dropped) & (words != of_dropped * world_size)).any()
    # A rank that has used every parameter need not wait for the answer of the others.
    return (list(used) if all(used) else (words % of_dropped > 0).tolist()), torn


def mixed(word: Tensor) -> Tensor:
    """Return a word that tells sums apart in which `word` alone would agree by accident."""
    return (word ^ (word >> 32)).square()
