"""Bits that flip in memory: which of them are noticed, when, and what noticing costs.

In each trial one bit of one rank flips behind torch's back between two steps, or between backward
and step, and training goes on for a few steps. A second run of many steps without any flip counts
false alarms, and a third takes steps of a larger model with and without the checks in turns.
"""

from __future__ import annotations

import copy
import random
import time
from collections import Counter
from contextlib import nullcontext
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from belief_dist import ShardedAdaBelief
from benchmarks.engines import loss_of
from benchmarks.local_ranks import on_ranks, threads_of
from benchmarks.team import Workload

RANKS = 3
_STEPS = 3  # after a flip
_WORK = Workload(2, 1, layers=10, width=512, batch=1, context=128, dtype="float32")
_CHECKS = {"check_replicas": True, "check_states": True}
_FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16, float32 masters": {"dtype": torch.bfloat16},
    "bfloat16, remainders, 8-bit states": {
        "dtype": torch.bfloat16,
        "master": "remainder",
        "state_dtype": torch.uint8,
        "stage": 2,
    },
}


def run_flips(flips: int, seed: int) -> list[dict[str, Any]]:
    """Flip `flips` bits; return a row for each kind of memory."""
    rows: list[dict[str, Any]] = on_ranks(RANKS, _trials, flips, seed)
    return rows


def run_clean(steps: int) -> int:
    """Train for so many steps in all forms together; return how many false alarms there were."""
    alarms: int = on_ranks(RANKS, _clean, steps)
    return alarms


def run_cost(ranks: int, rounds: int) -> dict[str, Any]:
    """Time steps of a GPT with and without `check_states`, in turns."""
    found: dict[str, Any] = on_ranks(ranks, _cost, rounds)
    return {"ranks": ranks, "threads per rank": threads_of(ranks), "rounds": rounds, **found}


def _model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 24)).to(dtype)


def _build(form: str) -> tuple[nn.Module, ShardedAdaBelief]:
    options = {"dtype": torch.float32, **_FORMS[form]}
    model = _model(options.pop("dtype"))
    optimizer = ShardedAdaBelief(
        model.named_parameters(), lr=1e-3, bucket_bytes=1 << 13, **_CHECKS, **options
    )
    return model, optimizer


def _backward(model: nn.Module, step: int) -> None:
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(step * RANKS + dist.get_rank())
    x = torch.randn(4, 48, generator=generator).to(dtype)
    model(x).square().sum().backward()


def _flip(tensor: Tensor, draw: random.Random) -> None:
    flat = tensor.detach().contiguous().view(-1)
    assert flat.data_ptr() == tensor.data_ptr()
    memory = flat.view(torch.uint8).numpy()
    memory[draw.randrange(memory.size)] ^= np.uint8(1 << draw.randrange(8))


def _memory(optimizer: ShardedAdaBelief) -> dict[str, list[Tensor]]:
    """Return what can flip on this rank between two steps, by kind."""
    found: dict[str, list[Tensor]] = {"parameter": list(optimizer._params)}
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.numel():
                kind = {"remainder": "master"}.get(name, name.removesuffix("_exponent"))
                found.setdefault(kind, []).append(value)
    return found


def _trials(flips: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)  # the same on all ranks
    caught: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    named: Counter[str] = Counter()
    after: dict[str, list[int]] = {}
    built = {form: _build(form) for form in _FORMS}
    kept = {}
    for form, (model, optimizer) in built.items():
        for step in (1, 2):
            _backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        kept[form] = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for _ in range(flips):
        form = draw.choice(list(_FORMS))
        culprit = draw.randrange(RANKS)
        kind = draw.choice(["parameter", "exp_avg", "exp_avg_sq", "master", "gradient"])
        if kind == "master" and form == "float32":
            kind = "parameter"  # which is its own master
        model, optimizer = built[form]
        model.load_state_dict(kept[form][0])
        optimizer.load_state_dict(kept[form][1])
        for step in (3, 4):  # what was loaded is taken for right until it was read once
            _backward(model, step)
            flipping = _flip_sums(optimizer, culprit, draw) if kind == "gradient" else None
            with flipping if flipping and step == 4 else nullcontext():
                optimizer.step()
            optimizer.zero_grad()
        optimizer.wait_pending()
        if kind != "gradient":
            choices = _memory(optimizer).get(kind, []) if dist.get_rank() == culprit else []
            one = random.Random(draw.random())  # ranks have other numbers of pieces
            if choices:
                _flip(one.choice(choices), one)
        row = f"{kind}"
        tried[row] += 1
        for count in range(1, _STEPS + 1):
            try:
                _backward(model, 4 + count)
                optimizer.step()
                optimizer.zero_grad()
            except RuntimeError as error:
                caught[row] += 1
                after.setdefault(row, []).append(count)
                said = str(error)
                named[row] += f"rank {culprit}" in said
                optimizer.zero_grad()
                break
    return [
        {
            "flipped": kind,
            "flips": tried[kind],
            "caught": caught[kind],
            "rank named": named[kind],
            "at step (most)": max(after.get(kind, [0])) or "-",
        }
        for kind in sorted(tried)
    ]


def _flip_sums(optimizer: ShardedAdaBelief, culprit: int, draw: random.Random) -> Any:
    """Return a context whose step flips a bit of a summed gradient, which looks like any other."""
    one = random.Random(draw.random())
    engine = optimizer._engine
    finish = engine.reducer.finish

    def finish_and_flip() -> None:
        finish()
        if dist.get_rank() == culprit:
            _flip(one.choice([bucket.grad_shard for bucket in engine.buckets]), one)

    return mock.patch.object(engine.reducer, "finish", finish_and_flip)


def _clean(steps: int) -> int:
    alarms = 0
    built = [_build(form) for form in _FORMS]
    for step in range(steps // len(built)):
        for model, optimizer in built:
            try:
                _backward(model, step)
                optimizer.step()
                if step % 97 == 0:
                    optimizer.check_states()
            except RuntimeError:
                alarms += 1
            optimizer.zero_grad()
    return alarms


def _cost(rounds: int) -> dict[str, Any]:
    trained = {}
    for checks in (False, True):
        model = _WORK.model()
        options = {"lr": 1e-4, "check_states": checks}
        trained[checks] = model, ShardedAdaBelief(model.named_parameters(), **options)
    tokens = _WORK.tokens(dist.get_rank())
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(rounds + 1):
        for checks in (False, True) if turn % 2 else (True, False):
            model, optimizer = trained[checks]
            dist.barrier()
            begin = time.perf_counter()
            loss_of(model, tokens).backward()
            optimizer.step()
            optimizer.wait_pending()
            optimizer.zero_grad()
            if turn:  # the first is for warming up
                seconds[checks].append(time.perf_counter() - begin)
    pairs = zip(seconds[True], seconds[False], strict=True)
    return {
        "parameters": sum(p.numel() for p in trained[True][0].parameters()),
        "without ms": round(1e3 * median(seconds[False]), 1),
        "with ms": round(1e3 * median(seconds[True]), 1),
        "ratio": round(median(a / b for a, b in pairs), 4),
    }
