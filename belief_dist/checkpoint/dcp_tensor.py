"""A logical tensor of which this rank holds some boxes, as torch.distributed.checkpoint sees it.

DCP asks three questions of a tensor that it does not know (its `_Checkpointable` protocol): which
boxes are here, what to write for them, and where the elements of one are. `Pieces` answers them,
so that DCP's own planners save and reshard it, beside plain tensors and DTensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from belief_dist.checkpoint.chunks import boxes, inverse, memory_order, permuted

Source = Callable[[int, int], Tensor]  # elements [a, b) of the range that this rank holds


class Piece:
    """One box of a logical tensor, and its elements."""

    def __init__(self, offsets: Sequence[int], sizes: Sequence[int], read: Callable[[], Tensor]):
        """Describe; `read` returns the elements in the shape `sizes`."""
        self.offsets = torch.Size(offsets)
        self.sizes = torch.Size(sizes)
        self.read = read


class Pieces(Tensor):
    """A tensor of which this process holds the elements of some boxes, and no other does.

    It has a shape and a dtype, but no operation works on it except saving and loading by DCP.
    """

    pieces: dict[torch.Size, Piece]
    replicated: bool  # every process holds all of it

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, pieces: Sequence[Piece]) -> Pieces:
        """Describe a tensor of this shape and dtype, of which `pieces` are here."""
        self: Pieces = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=dtype, device=torch.device("cpu"), requires_grad=False
        )
        self.pieces = {piece.offsets: piece for piece in pieces}
        self.replicated = False
        return self

    def __create_write_items__(self, name: str, tensor: Any) -> list[WriteItem]:
        """Answer DCP: what this process writes."""
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, piece.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(piece.offsets, piece.sizes),
                    properties=properties,
                    size=self.size(),
                ),
            )
            for piece in self.pieces.values()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Answer DCP: what this process wants to read."""
        return [ChunkStorageMetadata(p.offsets, p.sizes) for p in self.pieces.values()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """Answer DCP: where the elements of a box are."""
        assert index.offset is not None
        return self.pieces[index.offset].read()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        """Refuse every operation."""
        raise TypeError(f"{func} cannot work on a tensor that is spread over ranks.")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Return shape and dtype."""
        return f"Pieces(shape={tuple(self.shape)}, dtype={self.dtype}, here={len(self.pieces)})"


def pieces_of(
    source: Tensor | Source,
    start: int,
    stop: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    strides: Sequence[int] | None = None,
    within: tuple[Sequence[int], Sequence[int]] | None = None,
) -> Pieces:
    """Describe a tensor whose elements [start, stop), as they lie in memory, are here.

    Args:
        source: (stop - start,) elements, or a function that returns some of them.
        start: The first that is here.
        stop: The first that is not here any more.
        shape: Of the tensor, or of the part of it that is stored in this order.
        dtype: Of its elements in the checkpoint.
        strides: If the tensor is dense in another order of its dimensions.
        within: (shape, offsets) of the whole tensor and of this part of it.
    """
    shape = tuple(shape)
    order = tuple(range(len(shape))) if strides is None else memory_order(strides)
    whole, origin = within if within is not None else (shape, (0,) * len(shape))
    back = inverse(order)
    found = []
    for box in boxes(permuted(shape, order), start, stop):
        found.append(
            Piece(
                [o + base for o, base in zip(permuted(box.offsets, back), origin, strict=True)],
                permuted(box.sizes, back),
                _reader(source, box.start - start, box.sizes, back),
            )
        )
    if math.prod(shape) == 0:  # every rank has all of it, and DCP writes it once
        empty = torch.empty(shape, dtype=dtype)
        found.append(Piece(origin, shape, lambda: empty))
    return Pieces(whole, dtype, found)


def _reader(
    source: Tensor | Source, at: int, sizes: Sequence[int], back: Sequence[int]
) -> Callable[[], Tensor]:
    count = math.prod(sizes)

    def read() -> Tensor:
        flat = source[at : at + count] if isinstance(source, Tensor) else source(at, at + count)
        return flat.view(tuple(sizes)).permute(tuple(back))

    return read
