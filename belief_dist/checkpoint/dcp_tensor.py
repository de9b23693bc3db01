"""A tensor of which this rank holds some chunks, for torch.distributed.checkpoint (DCP).

DCP's `_Checkpointable` protocol has three methods: which chunks this rank holds, what it writes for
them, and where the elements of a chunk are. `DcpTensor` implements them, so that DCP's own planners
save and reshard it, just as plain tensors and DTensors.
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

from belief_dist.checkpoint.chunks import chunks_of_range, inverse, memory_order, permuted

# Returns elements [a, b), counted from the start of the range that this rank holds.
ReadRange = Callable[[int, int], Tensor]


class DcpChunk:
    """One chunk of a logical tensor, and how to get its elements."""

    def __init__(self, offsets: Sequence[int], sizes: Sequence[int], read: Callable[[], Tensor]):
        """Hold offsets and sizes; `read` returns the elements, in the shape `sizes`."""
        self.offsets = torch.Size(offsets)
        self.sizes = torch.Size(sizes)
        self.read = read


class DcpTensor(Tensor):
    """A tensor of which this process holds some chunks.

    It has a shape and a dtype, but no storage: every operation is refused, and only DCP's planners,
    which use the protocol's methods, can save and load it.
    """

    chunks: dict[torch.Size, DcpChunk]
    replicated: bool  # whether every process holds all of the tensor; otherwise chunks are disjoint

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, chunks: Sequence[DcpChunk]
    ) -> DcpTensor:
        """Make a tensor of this shape and dtype, of which this process holds `chunks`."""
        self: DcpTensor = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=dtype, device=torch.device("cpu"), requires_grad=False
        )
        self.chunks = {chunk.offsets: chunk for chunk in chunks}
        self.replicated = False
        return self

    def __create_write_items__(self, name: str, tensor: Any) -> list[WriteItem]:
        """Return what this process writes (DCP protocol)."""
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(chunk.offsets, chunk.sizes),
                    properties=properties,
                    size=self.size(),
                ),
            )
            for chunk in self.chunks.values()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Return the chunks that this process reads (DCP protocol)."""
        return [ChunkStorageMetadata(c.offsets, c.sizes) for c in self.chunks.values()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """Return the elements of a chunk, to write or to fill (DCP protocol)."""
        assert index.offset is not None
        return self.chunks[index.offset].read()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        """Refuse every operation."""
        raise TypeError(f"{func} cannot work on a tensor that is spread over ranks.")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Return shape and dtype."""
        return f"DcpTensor(shape={tuple(self.shape)}, dtype={self.dtype}, here={len(self.chunks)})"


def make_dcp_tensor(
    source: Tensor | ReadRange,
    start: int,
    stop: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    strides: Sequence[int] | None = None,
    within: tuple[Sequence[int], Sequence[int]] | None = None,
) -> DcpTensor:
    """Make a `DcpTensor` of which this rank holds elements [start, stop), counted in memory order.

    Args:
        source: The (stop - start,) elements, or a function that returns a range of them.
        start: First element that this rank holds.
        stop: End of the range (exclusive).
        shape: Shape of the tensor, or with `within` of the local part of a larger one.
        dtype: Dtype in the checkpoint.
        strides: Strides of the dense tensor; None means contiguous.
        within: For a local part: shape of the whole tensor, and offsets of the part in it.
    """
    shape = tuple(shape)
    order = tuple(range(len(shape))) if strides is None else memory_order(strides)
    global_shape, origin = within if within is not None else (shape, (0,) * len(shape))
    # Chunks are cut with the dimensions in memory order, and described in the tensor's own order.
    back = inverse(order)
    chunks = []
    for chunk in chunks_of_range(permuted(shape, order), start, stop):
        offsets = permuted(chunk.offsets, back)
        chunks.append(
            DcpChunk(
                [base + offset for base, offset in zip(origin, offsets, strict=True)],
                permuted(chunk.sizes, back),
                _chunk_reader(source, chunk.start - start, chunk.sizes, back),
            )
        )
    if math.prod(shape) == 0:
        # Every rank holds all of an empty tensor; DCP writes one of the equal chunks.
        empty = torch.empty(shape, dtype=dtype)
        chunks.append(DcpChunk(origin, shape, lambda: empty))
    return DcpTensor(global_shape, dtype, chunks)


def _chunk_reader(
    source: Tensor | ReadRange, start: int, sizes: Sequence[int], back: Sequence[int]
) -> Callable[[], Tensor]:
    stop = start + math.prod(sizes)

    def read() -> Tensor:
        flat = source[start:stop] if isinstance(source, Tensor) else source(start, stop)
        return flat.view(tuple(sizes)).permute(tuple(back))

    return read
