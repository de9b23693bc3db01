"""Messages between two ranks, and between every two."""

from __future__ import annotations

from collections.abc import Sequence

from mpi4py import MPI
from torch import Tensor

from belief_dist.mpi_backend.messages import moved, parts


class Exchange:
    """Blocks of any sizes between every two ranks.

    The communicator is its own, so that no message of the user's is mistaken for one of these.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm
        self._rank, self._size = comm.Get_rank(), comm.Get_size()

    def start(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> list[MPI.Request]:
        """Send `outgoing[r]` to rank r and receive `incoming[r]` from it; empty ones stay here."""
        if incoming[self._rank].numel():
            incoming[self._rank].copy_(outgoing[self._rank])
        requests = []
        for distance in range(1, self._size):
            source, to = (self._rank - distance) % self._size, (self._rank + distance) % self._size
            requests += receive(self._comm, incoming[source], source, 0)
            requests += send(self._comm, outgoing[to], to, 0)
        return requests

    def blocks(
        self, flat: Tensor, shaped: Tensor, splits: Sequence[int] | None
    ) -> Sequence[Tensor]:
        """Cut `flat`, whose rows are those of `shaped`, into one block for each rank."""
        rows = shaped.shape[0] if shaped.ndim else 1
        if not splits:
            if rows % self._size:
                raise ValueError(
                    f"all_to_all without split sizes cuts dimension 0 into {self._size} equal "
                    f"blocks, but it has {rows} rows; pass split sizes."
                )
            splits = [rows // self._size] * self._size
        if len(splits) != self._size or sum(splits) != rows:
            raise ValueError(
                f"all_to_all split sizes {list(splits)} must be {self._size} numbers that add up "
                f"to the {rows} rows of the tensor."
            )
        width = flat.numel() // rows if rows else 0
        blocks: Sequence[Tensor] = flat.split([count * width for count in splits])
        return blocks


def send(comm: MPI.Intracomm, flat: Tensor, to: int, tag: int) -> list[MPI.Request]:
    """Start to send a flat tensor."""
    return [comm.Isend(moved(flat[part]), to, tag) for part in parts(flat.numel())]


def receive(comm: MPI.Intracomm, flat: Tensor, source: int, tag: int) -> list[MPI.Request]:
    """Start to receive a flat tensor."""
    return [comm.Irecv(moved(flat[part]), source, tag) for part in parts(flat.numel())]
