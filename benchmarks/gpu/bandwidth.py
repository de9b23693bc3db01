"""How much of a copy's bandwidth each kernel reaches, the copy being timed in the same process."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch

from belief_dist import AdaBelief, kernels
from belief_dist.rule import step_scalars
from belief_dist.sharding.grad_codec import BLOCK, BLOCK_BYTES, codec_for
from benchmarks.gpu.cases import Case, Outcome, Size
from benchmarks.gpu.forms import FORMS, OPTIONS, Form, make, traffic
from benchmarks.gpu.sums import new_bins
from benchmarks.gpu.timing import median

_SUMS = "Sums in rank order, norms and messages"
_WIRES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


def outcome(nbytes: int, run: Callable[[], Any], device: str, size: Size) -> Outcome:
    """Time what moves `nbytes`."""
    taken = median(run, device, size.rounds, ahead=True)
    speed = nbytes / taken.total / 1e6
    floor = copy_speed(device, size.elements, size.rounds)
    return {"ms": taken.total, "GB/s": speed, "of a copy": f"{speed / floor:.0%}"}


@lru_cache
def copy_speed(device: str, elements: int, rounds: int) -> float:
    """Return the GB/s of a copy on the device, reads and writes together."""
    source = torch.zeros(elements, device=device)
    target = torch.empty_like(source)
    taken = median(lambda: target.copy_(source), device, rounds, ahead=True)
    return 2 * source.nbytes / taken.total / 1e6


def _update(form: Form, device: str, size: Size) -> Outcome:
    operands, scalars = make(form, size.elements, device), step_scalars(OPTIONS, 3)
    run = partial(kernels.update_, [operands], scalars, fused=True)
    return outcome(traffic(operands), run, device, size)


def _adamw(device: str, size: Size) -> Outcome:
    param = torch.randn(size.elements, device=device, requires_grad=True)
    param.grad = torch.randn_like(param)
    optimizer = torch.optim.AdamW([param], fused=True)
    return outcome(28 * size.elements, optimizer.step, device, size)


def _many(kind: Any, device: str, size: Size) -> Outcome:
    params = [torch.randn(64 << 10, device=device) for _ in range(size.tensors)]
    for param in params:
        param.requires_grad_().grad = torch.randn_like(param)
    optimizer = kind(params, lr=1e-3, fused=True)
    taken = median(optimizer.step, device, size.rounds)
    return {"ms": taken.total, "host ms": taken.host}


def _sum(wire: str, ranks: int, with_norm: bool, device: str, size: Size) -> Outcome:
    n = max(size.elements // 2 // ranks // BLOCK, 1) * BLOCK
    dtype = _WIRES[wire]
    values = torch.randn(ranks, n, device=device) * 1e-3
    bins = new_bins(device) if with_norm else None
    out = torch.empty(n, device=device)
    if dtype == torch.int8:
        pieces = torch.empty(ranks, n // BLOCK * BLOCK_BYTES, dtype=torch.uint8, device=device)
        for piece, each in zip(pieces, values, strict=True):
            kernels.encode_int8_(piece, each, torch.zeros_like(each))
    else:
        pieces = values.to(dtype)
    codec = codec_for(dtype)
    parts = list(pieces)
    run = partial(codec.sum_, out, parts, bins, accumulate=False)
    return outcome(pieces.nbytes + out.nbytes, run, device, size)


def _norm(device: str, size: Size) -> Outcome:
    values, bins = torch.randn(size.elements, device=device), new_bins(device)
    run = partial(kernels.squared_norm_bins_, bins, values)
    return outcome(values.nbytes, run, device, size)


def _torch_norm(device: str, size: Size) -> Outcome:
    values = torch.randn(size.elements, device=device)
    return outcome(values.nbytes, partial(torch.linalg.vector_norm, values), device, size)


def _checksum(device: str, size: Size) -> Outcome:
    values = torch.randn(size.elements, device=device)
    return outcome(values.nbytes, partial(kernels.checksums, [values], [0]), device, size)


def _encode(device: str, size: Size) -> Outcome:
    n = size.elements // BLOCK * BLOCK
    values, error = torch.randn(n, device=device), torch.zeros(n, device=device)
    wire = torch.empty(n // BLOCK * BLOCK_BYTES, dtype=torch.uint8, device=device)
    nbytes = values.nbytes + 2 * error.nbytes + wire.nbytes
    return outcome(nbytes, partial(kernels.encode_int8_, wire, values, error), device, size)


def cases(device: str, size: Size) -> list[Case]:
    updates = f"Update of {size.elements / 2**20:g} Mi elements"
    sums = f"{_SUMS}, {size.elements / 2**20:g} Mi elements; sums, half of it in all pieces"
    many = f"Optimizer step, {size.tensors} tensors of 64 Ki float32"
    here = {"device": device, "size": size}

    def copy() -> Outcome:
        return outcome(8 * size.elements, _copy(device, size), device, size)

    found = [Case(updates, "copy", copy)]
    found += [Case(updates, name, partial(_update, form, **here)) for name, form in FORMS.items()]
    found.append(Case(updates, "torch AdamW fused, float32", partial(_adamw, **here)))
    for wire in _WIRES:
        for ranks in (1, 2, 8):
            for with_norm in (False, True):
                name = f"sum of {ranks} x {wire}{', with norm' * with_norm}"
                found.append(Case(sums, name, partial(_sum, wire, ranks, with_norm, **here)))
    found += [
        Case(sums, "exact norm alone, fp32", partial(_norm, **here)),
        Case(sums, "torch's norm, fp32", partial(_torch_norm, **here)),
        Case(sums, "checksum, fp32", partial(_checksum, **here)),
        Case(sums, "8-bit encoding, fp32", partial(_encode, **here)),
        Case(many, "AdaBelief", partial(_many, AdaBelief, **here)),
        Case(many, "torch AdamW fused", partial(_many, torch.optim.AdamW, **here)),
    ]
    return found


def _copy(device: str, size: Size) -> Callable[[], Any]:
    source = torch.zeros(size.elements, device=device)
    return partial(torch.empty_like(source).copy_, source)
