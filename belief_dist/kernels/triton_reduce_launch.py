"""Launch the kernels of `triton_reduce` and `triton_scales` on the memory of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from belief_dist.async_device import current, upload
from belief_dist.kernels import eager
from belief_dist.kernels.build import one_line
from belief_dist.kernels.eager import CODE_BLOCK, CODE_BYTES
from belief_dist.kernels.triton_tables import chunks_of
from belief_dist.norm import NUM_WORDS, add_squares_
from belief_dist.rule import compute_dtype

# Of the machine's memory, at most so many messages are read at once; more are read in turn.
_UNROLLED = 8
_CHUNK_TILES = 8  # consecutive tiles of squares that share an entry of a table
_TABLES = 64
_POINTERS = 1 << 16  # of buckets, a few bytes each; a CUDA graph reads its own again and again


class Shape(NamedTuple):
    """How `triton_reduce.reduce` is cut; each thread has four elements of a tile, or eight."""

    tile: int
    threads: int
    programs: int  # on each multiprocessor: as many as fit, since bins take registers


def _shape(nbytes: int, *, codes: bool) -> Shape:
    """Return what was fastest on an H100, by the bytes that are read for each sum.

    Where there is much to read, a larger tile is looked through for its highest bin less often;
    where there is little, more programs hide what splitting takes.
    """
    if codes or nbytes <= 4:
        return Shape(512, 128, 8)
    return Shape(2048, 512, 2) if nbytes > 8 else Shape(1024, 128, 4)


class _Table(NamedTuple):
    segments: Tensor  # int64, as a kernel of `triton_reduce` takes it
    chunks: Tensor  # (chunks,), int64


class TritonReductions:
    """Ordered sums, squares, checksums and factors on a GPU.

    With `interprets`, they work on CPU tensors.
    """

    def __init__(self, *, interprets: bool) -> None:
        # Not before: whoever imports this module need not have Triton.
        from belief_dist.kernels import triton_kernel, triton_reduce, triton_scales

        self._interprets = interprets
        warp = 32
        if not interprets:
            warp = torch.cuda.get_device_properties(torch.cuda.current_device()).warp_size
        self._kernels = triton_reduce
        self._scales = triton_scales
        self._dtypes = triton_kernel.DTYPES
        self._threads_per_warp = warp
        self.shape: Shape | None = None  # takes the place of `_shape`, for tests and tuning
        self.checksum_tile, self.checksum_chunk = 2048, 8
        self._tables: dict[tuple[Any, ...], _Table] = {}
        self._pointers: dict[tuple[Any, ...], Tensor] = {}
        self._constants: dict[tuple[Any, ...], Tensor] = {}
        self._options: dict[str, Any] = {"num_stages": 1, "enable_fp_fusion": False}

    def find_problem(self, device: str) -> str | None:
        """Return why these kernels cannot be used: they do not compile here, or have other bits."""
        here = torch.randn(2, 512, generator=torch.Generator().manual_seed(0))
        sums = torch.zeros(512)
        there, found = here.to(device), torch.zeros(512, device=device)
        bins, others = (torch.zeros(NUM_WORDS, dtype=torch.int64, device=device) for _ in range(2))
        expected = torch.zeros(NUM_WORDS, dtype=torch.int64)
        try:
            self.ordered_sum_(found, list(there), bins)
            self.add_squares_(others, list(there))
            scales = self.grad_scales(bins + others, 3, None, 0.5)
            checked = self.checksums([there], [5])
        except Exception as error:  # a compiler can raise anything
            return f"a first launch failed ({one_line(error)})"
        eager.ordered_sum_(sums, list(here))
        add_squares_(expected, torch.cat([sums, *here]))
        wanted = eager.grad_scales(expected, world_size=3, loss_scale=None, limit=0.5)
        pairs = [
            (found, sums),
            (scales, wanted),
            (checked, eager.checksum(here.view(-1), 5).view(1)),
        ]
        if not all(torch.equal(ours.cpu(), theirs) for ours, theirs in pairs):
            return "a first sum has other bits than plain torch"
        return None

    # - Sums and squares

    def ordered_sum_(
        self,
        out: Tensor | None,
        pieces: Sequence[Tensor],
        bins: Tensor | None,
        *,
        accumulate: bool = False,
        codes: bool = False,
    ) -> None:
        """Add messages in their order; see `kernels.ordered_sum_`.

        Args:
            out: (n,), in the compute dtype of the pieces; None computes the squares alone.
            pieces: (n,) each; with `codes` (n / CODE_BLOCK * CODE_BYTES,), uint8, see `eager`.
            bins: See `kernels.ordered_sum_`.
            accumulate: Likewise.
            codes: Pieces are 8-bit codes with a scale for each block.
        """
        first = pieces[0]
        numel = first.numel() // CODE_BYTES * CODE_BLOCK if codes else first.numel()
        if numel == 0:
            return
        stride = _distance(pieces)
        addresses = None if stride is not None else self._addresses(pieces)
        wide = (compute_dtype(first.dtype) if out is None else out.dtype) == torch.float64
        count = len(pieces)
        shape = self.shape or _shape(first.element_size() * count, codes=codes)
        programs = min(-(-numel // shape.tile), self._most_programs(shape, first.device))
        with current(first.device):
            self._kernels.reduce[(programs,)](
                out,
                first if addresses is None else None,
                addresses,
                bins,
                numel,
                stride or 0,
                count,
                DTYPE=self._dtypes[first.dtype],
                ALIGNED=math.gcd(16, *(piece.data_ptr() for piece in pieces)),
                PIECES=count if count <= _UNROLLED else 0,
                ACCUMULATE=accumulate,
                CODES=codes,
                WIDE=wide,
                TILE=shape.tile,
                **self._launch(shape.threads),
            )

    def _addresses(self, pieces: Sequence[Tensor]) -> Tensor:
        """Return (len(pieces),), int64, of pieces that have no distance in common."""
        # What other ranks keep in their memory stays where it is.
        device, starts = pieces[0].device, tuple(piece.data_ptr() for piece in pieces)
        key = (device, starts)
        table = self._pointers.get(key)
        if table is None:
            if len(self._pointers) >= _POINTERS:
                del self._pointers[next(iter(self._pointers))]
            table = self._pointers[key] = upload(starts, torch.int64, device)
        return table

    def add_squares_(self, bins: Tensor, values: Sequence[Tensor]) -> None:
        """Add the squares of contiguous tensors of one dtype to `bins`; see `norm.add_squares_`."""
        flats = [each.view(-1) for each in values if each.numel()]
        if len(flats) < 2 or any(f.data_ptr() % 16 or f.numel() % 16 for f in flats):
            for flat in flats:
                self.ordered_sum_(None, [flat], bins)
            return
        first = flats[0]
        shape = self.shape or _shape(first.element_size(), codes=False)
        rows = tuple((flat.data_ptr(), flat.numel()) for flat in flats)
        table = self._table(first.device, rows, shape.tile * _CHUNK_TILES)
        count = len(table.chunks)
        with current(first.device):
            self._kernels.squares[(min(count, self._most_programs(shape, first.device)),)](
                table.segments,
                table.chunks,
                bins,
                count,
                DTYPE=self._dtypes[first.dtype],
                WIDE=first.dtype == torch.float64,
                TILE=shape.tile,
                CHUNK_TILES=_CHUNK_TILES,
                **self._launch(shape.threads),
            )

    def _most_programs(self, shape: Shape, device: torch.device) -> int:
        return 3 if self._interprets else shape.programs * _multiprocessors(device)

    def _launch(self, threads: int) -> dict[str, Any]:
        if self._interprets:
            return self._options
        return {**self._options, "num_warps": max(threads // self._threads_per_warp, 1)}

    # - Checksums

    def checksums(self, flats: Sequence[Tensor], firsts: Sequence[int]) -> Tensor:
        """Return `eager.checksum` of each buffer, (len(flats),), int64, in one launch.

        Args:
            flats: Contiguous, multiples of 8 bytes at multiples of 16.
            firsts: The position of the first word of each.
        """
        device = flats[0].device
        sums = torch.zeros(len(flats), dtype=torch.int64, device=device)
        pairs = zip(flats, firsts, strict=True)
        rows = tuple((flat.data_ptr(), flat.nbytes // 8, first) for flat, first in pairs)
        table = self._table(device, rows, self.checksum_tile * self.checksum_chunk)
        if len(table.chunks):
            with current(device):
                self._kernels.checksums[(len(table.chunks),)](
                    table.segments,
                    table.chunks,
                    sums,
                    TILE=self.checksum_tile,
                    CHUNK_TILES=self.checksum_chunk,
                    **self._launch(256),
                )
        return sums

    def _table(self, device: torch.device, rows: tuple[tuple[int, ...], ...], size: int) -> _Table:
        """Return rows of an address and a length first, and their chunks of `size`."""
        # Buckets stay where they are for as long as there are any.
        key = (device, size, rows)
        table = self._tables.get(key)
        if table is None:
            # Other buckets than before: of an optimizer that was dropped, most likely.
            if len(self._tables) >= _TABLES:
                self._tables.clear()
            table = self._tables[key] = _Table(
                torch.tensor(rows, dtype=torch.int64).to(device),
                chunks_of([row[1] for row in rows], size).to(device),
            )
        return table

    # - Factors

    def grad_scales(
        self, bins: Tensor, world_size: int, loss_scale: Tensor | None, limit: float | None
    ) -> Tensor:
        """Return what `eager.grad_scales` does, in one launch."""
        # Not as arguments: Triton passes Python's floats as float32.
        numbers = (1.0 / world_size, limit or 0.0, 1e-6)
        constants = self._constants.get((bins.device, numbers))
        if constants is None:
            self._constants.clear()  # those of an earlier limit
            constants = upload(numbers, torch.float64, bins.device)
            self._constants[bins.device, numbers] = constants
        scales = torch.empty(3, dtype=torch.float64, device=bins.device)
        with current(bins.device):
            self._scales.grad_scales[(1,)](
                scales,
                bins,
                constants,
                loss_scale,
                CLIP=limit is not None,
                **self._launch(32),
            )
        return scales


def _distance(pieces: Sequence[Tensor]) -> int | None:
    """Return how many elements lie between the starts of neighbours, None if not equally many."""
    if len(pieces) == 1:
        return 0
    size = pieces[0].element_size()
    starts = [piece.data_ptr() for piece in pieces]
    step = starts[1] - starts[0]
    if step < 0 or step % size or any(b - a != step for a, b in pairwise(starts)):
        return None
    return step // size


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
