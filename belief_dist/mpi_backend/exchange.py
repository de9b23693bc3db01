"""Point-to-point messages, and an all-to-all made of them."""

from __future__ import annotations

from collections.abc import Sequence

from mpi4py import MPI
from torch import Tensor

from belief_dist.mpi_backend.messages import bytes_spec, parts


class Exchange:
    """All-to-all with blocks of any sizes.

    It needs a communicator of its own, so that its messages cannot match the user's send and recv.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm
        self._rank, self._size = comm.Get_rank(), comm.Get_size()

    def start(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> list[MPI.Request]:
        """Send `outgoing[r]` to rank r and receive `incoming[r]`; empty blocks are skipped."""
        if incoming[self._rank].numel():
            incoming[self._rank].copy_(outgoing[self._rank])
        requests = []
        # Shifted by rank, so that not all ranks send to the same one first.
        for distance in range(1, self._size):
            source, to = (self._rank - distance) % self._size, (self._rank + distance) % self._size
            requests += receive(self._comm, incoming[source], source, 0)
            requests += send(self._comm, outgoing[to], to, 0)
        return requests

    def blocks(
        self, flat: Tensor, shaped: Tensor, splits: Sequence[int] | None
    ) -> Sequence[Tensor]:
        """Cut `flat`, the flattened `shaped`, into one block of rows for each rank."""
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
    return [comm.Isend(bytes_spec(flat[part]), to, tag) for part in parts(flat.numel())]


def receive(comm: MPI.Intracomm, flat: Tensor, source: int, tag: int) -> list[MPI.Request]:
    """Start to receive a flat tensor."""
    return [comm.Irecv(bytes_spec(flat[part]), source, tag) for part in parts(flat.numel())]
