"""A sum and a gather whose results are known to the last bit: whether they are right."""

from __future__ import annotations

import torch

from belief_dist.sharding.collectives import Collectives, ReduceRequest


class Trial:
    """Sums and gathers one buffer; everything is called by all ranks together.

    Attributes:
        flat: The buffer, float32.
    """

    def __init__(self, comm: Collectives, piece_numel: int, device: torch.device) -> None:
        """Take a buffer.

        Args:
            comm: What is tried.
            piece_numel: Elements of each rank's piece.
            device: Where they are.
        """
        self._comm = comm
        self.flat = comm.buffer(comm.num_shards * piece_numel, torch.float32, device)
        self._pieces = self.flat.view(comm.num_shards, -1)
        self._shard = torch.zeros(piece_numel, device=device)
        # Added in another order than that of the ranks they have other bits.
        self._addends = [1e-3 * 3.0**rank for rank in range(comm.world_size)]

    def fill(self) -> None:
        """Write this rank's addends."""
        self.flat.fill_(self._addends[self._comm.rank])

    def sum(self) -> None:
        """Add them over the ranks."""
        self._comm.start_reduce(ReduceRequest(self.flat, self._shard)).wait()

    def is_summed(self) -> bool:
        """Return whether this rank's piece has the sums."""
        expected = torch.tensor(self._addends[0])
        for addend in self._addends[1:]:
            expected += torch.tensor(addend)
        return bool((self._shard.cpu() == expected).all())

    def place(self, turn: int) -> None:
        """Write this rank's piece, another one in each turn."""
        self._pieces[self._comm.shard_index].fill_(float(turn + self._comm.shard_index))

    def gather(self) -> None:
        """Gather the pieces of all ranks."""
        self._comm.start_gather(self.flat).wait()

    def is_gathered(self, turn: int) -> bool:
        """Return whether all pieces are those of a turn."""
        expected = torch.arange(float(self._comm.num_shards)).add_(turn).view(-1, 1)
        return bool((self._pieces.cpu() == expected).all())
