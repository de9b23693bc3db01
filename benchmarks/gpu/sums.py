"""The bits of sums in rank order, exact norms, checksums and 8-bit messages, GPU against CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from belief_dist import kernels
from belief_dist.norm import NUM_WORDS, norm_from_bins
from belief_dist.sharding.grad_codec import BLOCK, BLOCK_BYTES, codec_for
from benchmarks.gpu.cases import SAME, Case, Outcome, Size

_TABLE = "Sums, norms and messages, against the CPU"


def spread(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Return numbers over many decades, whose sum depends on the order."""
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.empty(count).uniform_(-6, 3, generator=generator)
    return (torch.randn(count, generator=generator) * 10**exponent).to(dtype)


def new_bins(device: str) -> Tensor:
    return torch.zeros(NUM_WORDS, dtype=torch.int64, device=device)


def equal(ours: Tensor, theirs: Tensor) -> bool:
    """Compare bits: numbers that are not finite are equal to themselves here."""
    words = ours.element_size()
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[words]
    return torch.equal(ours.cpu().view(kind), theirs.cpu().view(kind))


def same_norm(ours: Tensor, theirs: Tensor) -> bool:
    """Compare what bins stand for: lower ones than are read depend on how a kernel cuts."""
    ours, theirs = ours.cpu(), theirs.cpu()
    return equal(norm_from_bins(ours), norm_from_bins(theirs)) and bool(ours[-1] == theirs[-1])


def sums_equal(
    device: str, n: int, ranks: int, dtype: torch.dtype, accumulate: bool, special: bool
) -> bool:
    pieces = [spread(n, dtype, rank) for rank in range(ranks)]
    if special:
        for position, number in enumerate((float("inf"), float("nan"), -0.0, 1e-45, 3e38)):
            pieces[0][position :: max(n // 3, 1)] = number
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    found = []
    for place in ("cpu", device):
        out, bins = spread(n, compute, 99).to(place), new_bins(place)
        moved = [piece.to(place, copy=True) for piece in pieces]
        kernels.ordered_sum_(out, moved, bins, accumulate=accumulate)
        found.append((out, bins))
    (out, bins), (other, others) = found
    if special:  # which of many NaN bits an addition makes is the processor's affair
        out, other = (torch.nan_to_num(x.cpu(), nan=7.0) for x in (out, other))
    return equal(out, other) and same_norm(bins, others)


def _norms_equal(device: str, n: int, dtype: torch.dtype) -> bool:
    values = spread(n, dtype, 1)
    found = []
    for place in ("cpu", device):
        bins = new_bins(place)
        for part in values.to(place, copy=True).split(n // 2 + 1):
            kernels.squared_norm_bins_(bins, part)
        found.append(bins)
    return same_norm(*found)


def _checksums_equal(device: str, n: int, dtype: torch.dtype) -> bool:
    values = spread(n // 8 * 8, dtype, 2)
    return all(
        int(kernels.checksums([values], [first]))
        == int(kernels.checksums([values.to(device)], [first]))
        for first in (0, 3, (1 << 33) + 5)
    )


def _messages_equal(device: str, n: int, dtype: torch.dtype) -> bool:
    """Encode twice, so that the errors of the first count, and add up.

    An infinity comes in the second alone: behind it errors are NaN, whose bits processors choose.
    """
    blocks = max(n // BLOCK, 1)
    values = spread(blocks * BLOCK, dtype, 3)
    values[: BLOCK // 2] = 0
    again = values.flip(0)
    again[BLOCK - 1] = float("inf")
    found = []
    for place in ("cpu", device):
        error = torch.zeros_like(values, device=place)
        wires = []
        for each in (values, again):
            wires.append(torch.empty(blocks * BLOCK_BYTES, dtype=torch.uint8, device=place))
            kernels.encode_int8_(wires[-1], each.to(place, copy=True), error)
        out, bins = torch.empty(values.numel(), device=place), new_bins(place)
        codec_for(torch.int8).sum_(out, wires, bins, accumulate=False)
        found.append((bins, torch.cat(wires), torch.nan_to_num(error), torch.nan_to_num(out)))
    (bins, *ours), (others, *theirs) = found
    return same_norm(bins, others) and all(equal(a, b) for a, b in zip(ours, theirs, strict=True))


def cases(device: str, size: Size) -> list[Case]:
    n, short = size.bits, {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}
    found: list[Case] = []

    def add(name: str, check: Callable[[], bool]) -> None:
        def run() -> Outcome:
            return {"elements": n, SAME: check()}

        found.append(Case(_TABLE, name, run))

    for dtype, ranks in ((d, w) for d in short for w in (1, 2, 8)):
        check = partial(sums_equal, device, n, ranks, dtype)
        name = f"sum and norm, {ranks} x {short[dtype]}"
        add(name, partial(check, accumulate=False, special=False))
        if ranks != 2:
            add(f"{name}, accumulated", partial(check, accumulate=True, special=False))
    for dtype in (torch.float32, torch.bfloat16):
        check = partial(sums_equal, device, n, 3, dtype, False, True)
        add(f"sum and norm, 3 x {short[dtype]}, inf and nan among them", check)
    for dtype, name in short.items():
        add(f"norm alone, {name}", partial(_norms_equal, device, n, dtype))
        add(f"checksum, {name}", partial(_checksums_equal, device, n, dtype))
    for dtype in (torch.float32, torch.bfloat16):
        add(f"8-bit message, {short[dtype]}", partial(_messages_equal, device, n, dtype))
    return found
