"""A whole training step of a GPT on one GPU, beside other optimizers."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu.cases import Case, Outcome, Size, describe, parameters
from benchmarks.gpu.contenders import OURS, PEERS, Maker
from benchmarks.gpu.timing import Memory, kernels_of, median, synchronizing

_COLUMNS = ("total ms", "host ms", "step ms", "step host ms", "kernels", "busy ms")


def measure(make: Maker, device: str, size: Size, dtype: torch.dtype = torch.bfloat16) -> Outcome:
    """Train a fresh model, and return all figures of a row."""
    model = size.step.model(dtype, device)
    tokens = size.step.tokens(device)
    count = parameters(model)
    memory = Memory(device)
    contender = make(model, device)
    whole = median(partial(contender.iterate, tokens), device, size.rounds)

    def until_step() -> None:
        contender.zero_grad()
        contender.backward(tokens)

    step = median(contender.step, device, size.rounds, before=until_step, warm=1)
    peak, held = memory.peak(), memory.held()  # before the profiler and the double batch
    kernels, busy = kernels_of(partial(contender.iterate, tokens), device)
    if contender.skipped():
        raise RuntimeError(f"{contender.skipped()} steps were skipped: a gradient is not finite")
    figures = (whole.total, whole.host, step.total, step.host, kernels, busy)
    row: Outcome = {
        **dict(zip(_COLUMNS, figures, strict=True)),
        "peak MiB": None if peak is None else round(peak / 2**20),
        "peak bytes/parameter": None if peak is None else peak / count,
        "held bytes/parameter": None if held is None else held / count,
    }
    try:
        contender.accumulate_and_clip(tokens)  # what is allocated once may wait
        run = partial(contender.accumulate_and_clip, tokens)
        row["waits for the GPU"] = synchronizing(run, device)
    except Exception as error:  # the figures stay
        row |= {"status": "failed", "note": f"two batches and clipping: {describe(error)}"}
    return row


def title(size: Size) -> str:
    shape = size.step
    with torch.device("meta"):
        millions = parameters(shape.model(torch.float32, "meta")) / 1e6
    return (
        f"GPT of {millions:.0f} M parameters, {shape.layers} layers, width {shape.width}, "
        f"bfloat16, batch {shape.batch} x {shape.context}"
    )


def cases(device: str, size: Size) -> list[Case]:
    table = title(size)
    ours = [Case(table, name, partial(measure, make, device, size)) for name, make in OURS.items()]
    peers = [
        Case(table, name, partial(measure, make, device, size), packages, counts=False)
        for name, (make, packages) in PEERS.items()
    ]
    # What imports the least comes first, and what may leave its mark on the process comes last.
    return ours[:1] + peers[:2] + ours[1:] + peers[2:]
