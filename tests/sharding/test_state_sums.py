"""Bits that flip in states and masters between two steps are noticed; nothing else is."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from belief_dist import ShardedAdaBelief, checkpoint
from belief_dist.checkpoint.errors import CheckpointError
from belief_dist.sharding.step_consensus import RAISED, LastStep
from tests.harness.models import HYPER, SHAPES, make_grad, make_params
from tests.harness.ranks import run_ranks
from tests.harness.reference import backward

FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16 and masters": {"dtype": torch.bfloat16},
    "ZeRO-2, remainders, 8 bits": {
        "dtype": torch.bfloat16,
        "stage": 2,
        "master": "remainder8",
        "state_dtype": torch.uint8,
    },
    "bfloat16 states": {"state_dtype": torch.bfloat16},
    "amsgrad": {"amsgrad": True},
    "offload": {"dtype": torch.bfloat16, "offload": "cpu"},
    "float64": {"dtype": torch.float64},
    "average": {"ema_decay": 0.9},
    "bfloat16 average": {"dtype": torch.bfloat16, "ema_decay": 0.9, "ema_dtype": torch.bfloat16},
}


def build(
    dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[list[nn.Parameter], ShardedAdaBelief]:
    params = make_params(dtype)
    options = {"check_states": True, "bucket_bytes": 1500, **HYPER, **options}
    named = [(f"p{index}", param) for index, param in enumerate(params)]
    return params, ShardedAdaBelief(named, **options)


def one_step(
    optimizer: ShardedAdaBelief,
    params: list[nn.Parameter],
    step: int,
    used: range = range(len(SHAPES)),
) -> None:
    grads = [make_grad(s, step, dist.get_rank(), i) for i, s in enumerate(SHAPES)]
    backward([params[i] for i in used], [grads[i] for i in used])
    optimizer.step()
    optimizer.zero_grad()


def flip(tensor: Tensor, byte: int, bit: int) -> None:
    """Flip a bit behind torch's back."""
    tensor.view(torch.uint8).numpy().reshape(-1)[byte] ^= np.uint8(1 << bit)


def watched_of(optimizer: ShardedAdaBelief, index: int) -> dict[str, Tensor]:
    """Return what is watched of this rank's part of a parameter."""
    state = optimizer.state[optimizer.param_groups[0]["params"][index]]
    return {key: t for key, t in state.items() if isinstance(t, Tensor) and t.numel()}


def flipped_state(form: str, index: int, kind: str, culprit: int, saves: bool, tmp: Path) -> None:
    """It is told at the step after the one that has read it, or at a save."""
    params, optimizer = build(**FORMS[form])
    for step in (1, 2):
        one_step(optimizer, params, step)
    optimizer.check_states()
    if dist.get_rank() == culprit:
        tensor = watched_of(optimizer, index)[kind]
        flip(tensor, tensor.nbytes - 1, 3)
    shown = kind.removesuffix("_exponent").replace("remainder", "master")
    bucket = optimizer.layout.place(index)[0]
    said = rf"{shown} of bucket {bucket} \(parameters [^)]*p{index}[^)]*\)"
    if saves:
        with pytest.raises(CheckpointError, match=f"rank {culprit}: .*{said}: bits have changed"):
            checkpoint.save(tmp, 1, optimizer=optimizer, model=module_of(params))
        assert not list(tmp.glob("*"))
    else:
        one_step(optimizer, params, 3)
    before = [param.clone() for param in params]
    for _ in range(2):  # there is no way on but a checkpoint
        with pytest.raises(RuntimeError, match=f"{said} of rank {culprit}: bits have changed"):
            one_step(optimizer, params, 4)
        optimizer.zero_grad()
    assert all(map(torch.equal, params, before))
    number = 4 if saves else 5
    assert optimizer.last_step == LastStep(number, False, RAISED)


def module_of(params: list[nn.Parameter]) -> nn.Module:
    module = nn.Module()
    for index, param in enumerate(params):
        module.register_parameter(f"p{index}", param)
    return module


def flip_while_some_steps_are_behind(kind: str) -> None:
    """Parameters that miss steps break buckets up; their neighbours are watched all the same."""
    params, optimizer = build()
    for step in range(1, 4):
        one_step(optimizer, params, step, used=range(0, 5))
    for step in range(4, 7):
        one_step(optimizer, params, step)
    index = 7
    if dist.get_rank() == 0:
        flip(watched_of(optimizer, index)[kind], 2, 6)
    one_step(optimizer, params, 7)
    with pytest.raises(RuntimeError, match=f"{kind} of bucket .* of rank 0"):
        one_step(optimizer, params, 8)


def nothing_is_told_falsely(form: str, tmp: Path) -> None:
    """Skipped steps, missing gradients, edits of states and weights, loads, saves, new groups."""
    params, optimizer = build(**FORMS[form])
    module = module_of(params)
    used = [range(0, 8), range(0, 3), range(2, 8), range(0, 8), range(0, 8), range(5, 6)]
    kept: Any = None
    for step in range(1, 31):
        now = used[step % len(used)]
        if step % 7 == 3:
            skipped = optimizer.skipped_steps
            bad = [torch.full(s, float("nan")) for s in SHAPES]
            backward(params, bad)
            optimizer.step()
            optimizer.zero_grad()
            assert optimizer.skipped_steps == skipped + 1
            assert optimizer.last_step[1:] == (False, "a gradient is not finite")
        if step % 7 == 4:  # as a user may, who resets or scales them
            for state in optimizer.state.values():
                for key, value in state.items():
                    if isinstance(value, Tensor) and key == "exp_avg":
                        value.zero_()
        if step % 7 == 5:
            with torch.no_grad():
                params[step % len(params)].mul_(0.5)
        if step % 11 == 1:
            checkpoint.save(tmp, step, model=module, optimizer=optimizer)
        if step % 11 == 6:
            checkpoint.load(tmp, model=module, optimizer=optimizer)
        if step % 11 == 7:
            kept = optimizer.state_dict()
            optimizer.load_state_dict(kept)
        if step == 20:
            extra = nn.Parameter(torch.ones(7, dtype=params[0].dtype))
            optimizer.add_param_group({"params": [("extra", extra)]})
            module.register_parameter("extra", extra)
        if step == 25:
            optimizer.param_groups[0]["lr"] /= 2
        one_step(optimizer, params, step, used=now)
        assert optimizer.last_step == LastStep(optimizer.last_step.number, True, "")
        optimizer.check_states()


def without_the_option() -> None:
    params, optimizer = build(check_states=False)
    one_step(optimizer, params, 1)
    flip(watched_of(optimizer, 7)["exp_avg"], 0, 6)
    for step in (2, 3):
        one_step(optimizer, params, step)
    optimizer.check_states()


def a_verdict_that_comes_late() -> None:
    params, optimizer = build()
    optimizer._engine.consensus.defers = True  # as on a CUDA device
    one_step(optimizer, params, 1)
    if dist.get_rank() == 1:
        flip(watched_of(optimizer, 7)["exp_avg_sq"], 1, 1)
    one_step(optimizer, params, 2)
    one_step(optimizer, params, 3)
    with pytest.raises(RuntimeError, match=re.escape("exp_avg_sq of bucket")):
        optimizer.step()


def test_flipped_bits(tmp_path: Path) -> None:
    kinds = {
        "float32": ["exp_avg", "exp_avg_sq"],
        "bfloat16 and masters": ["master", "exp_avg_sq"],
        "ZeRO-2, remainders, 8 bits": ["remainder", "exp_avg", "exp_avg_sq_exponent"],
        "bfloat16 states": ["exp_avg"],
        "amsgrad": ["max_exp_avg_sq"],
        "offload": ["master", "exp_avg"],
        "float64": ["exp_avg_sq"],
        "average": ["param_ema"],
        "bfloat16 average": ["param_ema"],
    }
    cases = [
        partial(flipped_state, form, 7, kind, culprit % 2, saves, tmp_path / f"{form}{kind}{saves}")
        for form in FORMS
        for culprit, kind in enumerate(kinds[form])
        for saves in (False, True)
    ]
    run_ranks(
        3,
        tmp_path,
        *cases,
        partial(flip_while_some_steps_are_behind, "exp_avg"),
        partial(flip_while_some_steps_are_behind, "exp_avg_sq"),
        without_the_option,
        a_verdict_that_comes_late,
        *(partial(nothing_is_told_falsely, form, tmp_path / form) for form in FORMS),
    )


def test_one_rank_alone() -> None:
    params = make_params()
    optimizer = ShardedAdaBelief(params, check_states=True, **HYPER)
    for step in (1, 2, 3):
        if step == 2:
            flip(watched_of(optimizer, 7)["exp_avg"], 0, 6)
        backward(params, [make_grad(s, step, 0, i) for i, s in enumerate(SHAPES)])
        if step < 3:
            optimizer.step()
            continue
        with pytest.raises(RuntimeError, match=r"exp_avg of bucket 0 .* of rank 0"):
            optimizer.step()
