"""`python -m benchmarks.gpu`: the Triton update on a CUDA GPU, its bits, speed and captured graphs.

Nothing in this repository has run on a GPU yet, so no number of this script is published. It needs
no argument, prints as it goes, and ends with code 1 where bits differ, with 2 without a GPU.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from belief_dist import AdaBelief, kernels
from belief_dist.device_scalars import device_scalars
from belief_dist.operands import BLOCK, Operands
from belief_dist.options import DEFAULTS
from belief_dist.rule import step_scalars
from belief_dist.state_formats import noise_key, split_master, update_stored_reference_

F32, F64 = torch.float32, torch.float64
BF16, F16, U8 = torch.bfloat16, torch.float16, torch.uint8
ELEMENTS = 64 << 20
TENSORS, TENSOR_ELEMENTS = 1000, 64 << 10
ROUNDS = 20
OPTIONS = {**DEFAULTS, "lr": 1e-3, "weight_decay": 0.1}


class Form(NamedTuple):
    """Dtypes as `operands.Operands` has them."""

    param: torch.dtype
    grad: torch.dtype
    state: torch.dtype
    out: torch.dtype | None = None
    remainder: bool = False
    amsgrad: bool = False


FORMS = {
    "float32": Form(F32, F32, F32),
    "float32, amsgrad": Form(F32, F32, F32, amsgrad=True),
    "float64": Form(F64, F64, F64),
    "bfloat16 parameters": Form(BF16, BF16, F32),
    "float32 masters, bfloat16": Form(F32, BF16, F32, BF16),
    "float32 masters, float16": Form(F32, F16, F32, F16),
    "remainder": Form(BF16, BF16, F32, None, True),
    "masters, bfloat16 states": Form(F32, BF16, BF16, BF16),
    "remainder, bfloat16 states": Form(BF16, BF16, BF16, None, True),
    "masters, 8-bit states": Form(F32, BF16, U8, BF16),
    "remainder, 8-bit states": Form(BF16, BF16, U8, None, True),
    "remainder, 8-bit states, amsgrad": Form(BF16, BF16, U8, None, True, True),
}


def make(form: Form, n: int, device: str) -> Operands:
    optional: dict[str, Any] = {}
    param = torch.randn(n, device=device)
    if form.remainder:
        param, optional["remainder"] = split_master(param)
    if form.out is not None:
        optional["param_out"] = torch.empty(n, dtype=form.out, device=device)
    states: list[Tensor] = []
    for name in ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * form.amsgrad:
        if form.state == U8:
            states.append(torch.randint(128, (n,), dtype=U8, device=device))
            exponent = torch.full((-(-n // BLOCK),), 100, dtype=U8, device=device)
            optional[f"{name}_exponent"] = exponent
        else:
            states.append((torch.rand(n, device=device) * 1e-3).to(form.state))
    grad = torch.randn(n, device=device).mul_(1e-2).to(form.grad)
    return Operands(param.to(form.param), grad, *states, **optional, key=noise_key(1, 2))


def moved(operands: Operands, device: str) -> Operands:
    return Operands(*(x.to(device, copy=True) if isinstance(x, Tensor) else x for x in operands))


def same(ours: Operands, theirs: Operands) -> bool:
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if isinstance(a, Tensor)]
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)


def traffic(operands: Operands) -> int:
    """Return the bytes that an update has to move."""
    sizes = {n: t.nbytes for n, t in operands._asdict().items() if isinstance(t, Tensor)}
    once = sizes["grad"] + sizes.get("param_out", 0)
    return 2 * sum(sizes.values()) - once


def compare_bits(device: str, n: int = 1_000_003) -> bool:
    """Update on the device and, by the reference, on the CPU: alone and several at once."""
    equal = True
    for name, form in FORMS.items():
        here = [make(form, size, "cpu") for size in (n, 1, n // 3)]
        there = [moved(operands, device) for operands in here]
        for step in (1, 2, 1000):
            scalars = step_scalars(OPTIONS, step)
            for operands in here:
                update_stored_reference_(operands, scalars, grad_scale=0.37)
            work = [there] if step == 2 else [[each] for each in there]
            for some in work:
                kernels.update_(some, scalars, grad_scale=0.37, fused=True)
        good = all(same(a, b) for a, b in zip(there, here, strict=True))
        equal &= good
        print(f"  {name:34} {'the same bits' if good else 'OTHER BITS'}")
    return equal


def seconds(run: Callable[[], Any]) -> float:
    """Return the median time on the device."""
    times = []
    for number in range(-3, ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
        start.record()
        run()
        end.record()
        end.synchronize()
        if number >= 0:
            times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def row(name: str, size: int, run: Callable[[], Any], floor: float | None = None) -> float:
    """Print and return how many bytes per second `run` moves, out of `size`."""
    taken = seconds(run)
    share = "" if floor is None else f" {size / taken / floor:5.0%}"
    print(f"  {name:34} {taken * 1e3:7.3f} ms {size / taken / 1e9:7.0f} GB/s{share}")
    return size / taken


def copy_floor() -> float:
    source = torch.empty(ELEMENTS, device="cuda")
    target = torch.empty_like(source)
    return row("copy", 2 * source.nbytes, lambda: target.copy_(source))


def time_form(name: str, form: Form, floor: float) -> None:
    operands, scalars = make(form, ELEMENTS, "cuda"), step_scalars(OPTIONS, 3)
    row(name, traffic(operands), lambda: kernels.update_([operands], scalars, fused=True), floor)


def time_adamw(floor: float) -> None:
    param = torch.randn(ELEMENTS, device="cuda", requires_grad=True)
    param.grad = torch.randn_like(param)
    optimizer = torch.optim.AdamW([param], fused=True)
    row("torch AdamW fused, float32", 28 * ELEMENTS, optimizer.step, floor)


def time_many() -> None:
    for name, kind in (("AdaBelief", AdaBelief), ("torch AdamW fused", torch.optim.AdamW)):
        params = [torch.randn(TENSOR_ELEMENTS, device="cuda") for _ in range(TENSORS)]
        for param in params:
            param.requires_grad_().grad = torch.randn_like(param)
        optimizer: Any = kind(params, lr=1e-3, fused=True)
        taken = seconds(optimizer.step)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        optimizer.step()
        host = time.perf_counter() - begin
        print(f"  {name:34} {taken * 1e3:7.3f} ms, of which the host works {host * 1e3:.3f} ms")


def check_graph() -> bool:
    """Capture one update with a step and a learning rate on the device, and replay it."""
    work = [make(form, 100_003, "cuda") for form in [FORMS["masters, 8-bit states"]] * 3]
    step = torch.ones((), dtype=torch.int64, device="cuda")
    lr = torch.full((), 1e-3, dtype=torch.float64, device="cuda")
    scale = torch.full((), 0.5, dtype=torch.float64, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and uploads the table
        kernels.update_(work, device_scalars(OPTIONS, step, lr), grad_scale=scale, fused=True)
    torch.cuda.current_stream().wait_stream(stream)
    here = [moved(operands, "cpu") for operands in work]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step += 1
        scalars = device_scalars(OPTIONS, step, lr)
        kernels.update_(work, scalars, grad_scale=scale, fused=True)
    for number in range(5):
        lr.fill_(1e-3 / (number + 1))
        graph.replay()
        for operands in here:
            update_stored_reference_(operands, scalars.on_host(), grad_scale=0.5)
    good = int(step) == 6 and all(same(a, b) for a, b in zip(work, here, strict=True))
    print(f"  five replays: {'the same bits' if good else 'OTHER BITS'}")
    return good


def main() -> int:
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA GPU; torch sees none.", file=sys.stderr)
        return 2
    for name, usable, text in kernels.backends():
        print(f"{name}: {'' if usable else 'no, '}{text}")
    print("Bits, GPU against the reference on the CPU")
    equal = compare_bits("cuda")
    print("A captured graph")
    equal &= check_graph()
    print(f"One update of {ELEMENTS >> 20} Mi elements, and its share of a copy's bandwidth")
    floor = copy_floor()
    for name, form in FORMS.items():
        time_form(name, form, floor)
    time_adamw(floor)
    print(f"One optimizer step on {TENSORS} tensors of {TENSOR_ELEMENTS >> 10} Ki float32")
    time_many()
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
