"""A section whose first case leaves CUDA unusable, as an illegal memory access does."""

from __future__ import annotations

import torch

from benchmarks.gpu.cases import Case, Outcome, Size


def _nothing() -> None:
    pass


def _refuse() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def _lose() -> Outcome:
    torch.cuda.synchronize = _refuse
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def cases(device: str, size: Size) -> list[Case]:
    torch.cuda.synchronize = torch.cuda.empty_cache = _nothing
    return [Case("A table", "loses", _lose), Case("A table", "on", dict)]
