"""Short trainings on one GPU: what must come out equal, and what must work at all."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from belief_dist import ShardedAdaBelief, checkpoint
from benchmarks.gpu.cases import SAME, Case, Outcome, Size
from benchmarks.gpu.contenders import SMALLEST, Contender, exact_attention, loss_of, sharded
from benchmarks.gpu.timing import Memory

_RATE = {"lr": 1e-3}


def train(contender: Contender, device: str, size: Size, steps: Sequence[int]) -> list[float]:
    """Train on the batches of some steps; return the losses."""
    losses = []
    with exact_attention():
        for step in steps:
            contender.zero_grad()
            loss = loss_of(contender.module, size.job.tokens(device, step))
            loss.backward()
            contender.step()
            losses.append(loss.detach())
    return torch.stack(losses).tolist()


def _equal(one: Contender, other: Contender) -> bool:
    pairs = zip(one.module.parameters(), other.module.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _compare(
    device: str, size: Size, dtype: torch.dtype, ours: dict[str, Any], theirs: dict[str, Any]
) -> Outcome:
    """Train twice from the same weights, with other options."""
    pair = [sharded(size.job.model(dtype, device), device, **each) for each in (ours, theirs)]
    losses = [train(contender, device, size, range(8)) for contender in pair]
    return {"steps": 8, "last loss": losses[0][-1], SAME: _equal(*pair)}


def _continued(device: str, size: Size, dtype: torch.dtype, options: dict[str, Any]) -> Outcome:
    """Save after 3 steps, load into a fresh optimizer, and train both 3 more."""
    first = sharded(size.job.model(dtype, device), device, **options)
    train(first, device, size, range(3))
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        checkpoint.save(folder, 3, model=first.module, optimizer=first.optimizer)
        saved = time.perf_counter()
        second = sharded(size.job.model(dtype, device), device, **options)
        checkpoint.load(folder, model=second.module, optimizer=second.optimizer)
        loaded = time.perf_counter()
    for contender in (first, second):
        train(contender, device, size, range(3, 6))
    times = {"save ms": (saved - begin) * 1e3, "build and load ms": (loaded - saved) * 1e3}
    return {"steps": 6, SAME: _equal(first, second), **times}


def _scaled(device: str, size: Size) -> Outcome:
    """Float16 autocast with a loss scale that is far too large at first."""
    model = size.job.model(torch.float32, device)
    optimizer = ShardedAdaBelief(model.parameters(), max_grad_norm=1.0, **_RATE)
    scaler = torch.amp.GradScaler(device, init_scale=2.0 ** (40 if size.steps > 22 else 20))
    losses: list[Tensor] = []
    for _ in range(size.steps):
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            loss = loss_of(model, size.job.tokens(device))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    skipped = optimizer.skipped_steps
    if not 0 < skipped < size.steps:
        raise RuntimeError(f"{skipped} of {size.steps} steps were skipped")
    return {"steps": size.steps, "skipped": skipped, **_fallen(losses)}


def _compiled(device: str, size: Size) -> Outcome:
    """torch.compile of the model, the optimizer as it is."""
    model = size.job.model(torch.float32, device)
    optimizer = ShardedAdaBelief(model.parameters(), **_RATE)
    module = torch.compile(model, backend="inductor" if device == "cuda" else "eager")
    losses = []
    for _ in range(size.steps):
        optimizer.zero_grad()
        loss = loss_of(module, size.job.tokens(device))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"steps": size.steps, **_fallen(losses)}


def _fallen(losses: Sequence[Tensor]) -> Outcome:
    first, last = float(losses[0]), float(losses[-1])
    if not last < first:
        raise RuntimeError(f"the loss went from {first:.4f} to {last:.4f}")
    return {"first loss": first, "last loss": last}


def _memory(device: str, size: Size, options: dict[str, Any]) -> Outcome:
    """Compare what is allocated after steps with what the optimizer says that it holds."""
    memory = Memory(device)
    model = size.step.model(torch.bfloat16, device)
    contender = sharded(model, device, **options)
    for _ in range(3):
        contender.iterate(size.step.tokens(device))
    contender.zero_grad()
    contender.optimizer.wait_pending()
    said = sum(contender.optimizer.bytes_per_rank().values())
    held, peak = memory.held(), memory.peak()
    figures = {"bytes_per_rank() MiB": said, "held MiB": held, "peak MiB": peak}
    row: Outcome = {k: None if v is None else round(v / 2**20) for k, v in figures.items()}
    row["held of said"] = None if held is None else f"{held / said:.1%}"
    return row


def cases(device: str, size: Size) -> list[Case]:
    here = {"device": device, "size": size}
    fp32, bf16 = torch.float32, torch.bfloat16
    clip = {"max_grad_norm": 1.0}
    equal = "Equal to the last bit"
    found = []
    for name, dtype, ours, theirs in (
        ("two runs, float32, clipping", fp32, clip, clip),
        ("two runs, bfloat16, 8-bit states", bf16, SMALLEST, SMALLEST),
        ("offload and not, float32", fp32, {"offload": "cpu"}, {}),
        ("offload and not, bfloat16", bf16, {"offload": "cpu"}, {}),
        ("a half offloaded and not, bfloat16", bf16, {"offload": 0.5, "bucket_bytes": 1 << 20}, {}),
        ("offload and not, stage 2, clipping", bf16, {"offload": "cpu", "stage": 2, **clip}, clip),
        ("stages 1 and 2", fp32, {"stage": 2}, {}),
        ("overlap and not", fp32, {"overlap": False, **clip}, clip),
        ("buckets of 1 and 32 MiB", fp32, {"bucket_bytes": 1 << 20, **clip}, clip),
    ):
        run = partial(_compare, **here, dtype=dtype, ours=ours, theirs=theirs)
        found.append(Case(equal, name, run))
    for name, dtype, options in (
        ("checkpoint, float32", fp32, {}),
        ("checkpoint, bfloat16, remainder, 8-bit states", bf16, SMALLEST),
        ("checkpoint, offload", fp32, {"offload": "cpu"}),
    ):
        found.append(Case(equal, name, partial(_continued, **here, dtype=dtype, options=options)))
    memory = "Memory of the timed model in bfloat16, optimizer and gradients included"
    for name, options in (
        ("fp32 masters", {}),
        ("stage 2", {"stage": 2}),
        ("remainder, 8-bit states", SMALLEST),
        ("remainder, 8-bit states, stage 2", {**SMALLEST, "stage": 2}),
    ):
        found.append(Case(memory, name, partial(_memory, **here, options=options)))
    found.append(Case("Trains", "GradScaler, float16", partial(_scaled, **here)))
    found.append(Case("Trains", "torch.compile", partial(_compiled, **here)))
    return found
