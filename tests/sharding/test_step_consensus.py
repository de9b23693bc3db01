"""Ranks that have come apart are told so at the next step, with the place, and nothing is lost."""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from belief_dist import ShardedAdaBelief
from belief_dist.sharding import rank_sets
from tests.harness.models import HYPER, SHAPES, make_grad, make_params
from tests.harness.ranks import run_ranks
from tests.harness.reference import backward

Stage = Literal[1, 2]


def one_step(optimizer: ShardedAdaBelief, params: list[nn.Parameter], step: int) -> None:
    backward(params, [make_grad(s, step, dist.get_rank(), i) for i, s in enumerate(SHAPES)])
    optimizer.step()
    optimizer.zero_grad()


def snapshot(optimizer: ShardedAdaBelief) -> Any:
    return copy.deepcopy(optimizer.state_dict()["state"])


def same(a: Any, b: Any) -> bool:
    return all(
        torch.equal(torch.as_tensor(a[i][key]), torch.as_tensor(b[i][key]))
        for i in a
        for key in a[i]
    )


def flipped_bit(dtype: torch.dtype, index: int, bit: int, culprit: int) -> None:
    """One bit of one element on one rank: rank, bucket and parameter are named on all ranks."""
    params = make_params(dtype)
    names = [f"layer.{i}" for i in range(len(params))]
    optimizer = ShardedAdaBelief(list(zip(names, params, strict=True)), bucket_bytes=1500, **HYPER)
    one_step(optimizer, params, 1)
    before = snapshot(optimizer)
    word = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    words = params[index].data.view(word).view(-1)
    good = words[-1].clone()
    if dist.get_rank() == culprit:
        words[-1] ^= 1 << bit
    bucket = optimizer.layout.place(index)[0]
    sentence = (
        f"the copies of parameter 'layer.{index}' (bucket {bucket}) differ between the "
        f"{dist.get_world_size()} ranks of the process group: rank {culprit} differs from"
    )
    with pytest.raises(RuntimeError, match=re.escape(sentence)):
        one_step(optimizer, params, 2)
    assert same(before, snapshot(optimizer))
    # Repaired, it goes on.
    words[-1] = good
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 2


def repaired_bit(dtype: torch.dtype, index: int, culprit: int, stage: Stage) -> None:
    """With "repair" the rank gets what the others have, owner or not, and the step is skipped."""
    params, steady = make_params(dtype), make_params(dtype)
    options = {"bucket_bytes": 1500, "stage": stage, "on_desync": "repair", **HYPER}
    optimizer, undisturbed = (
        ShardedAdaBelief(params, **options),
        ShardedAdaBelief(steady, **options),
    )
    for step in (1, 2, 3):
        if step == 2:
            words = params[index].data.view({2: torch.int16, 4: torch.int32}[dtype.itemsize])
            if dist.get_rank() == culprit:
                words.view(-1)[:3] ^= 1 << 9
            one_step(optimizer, params, 9)
            assert optimizer.skipped_steps == 1
            # Masters of the owner's that were taken for edited are those of the others' parameters.
            undisturbed.refresh_masters() if dtype != torch.float32 else None
            optimizer.refresh_masters() if dtype != torch.float32 else None
        one_step(optimizer, params, step)
        one_step(undisturbed, steady, step)
    assert same(snapshot(undisturbed), snapshot(optimizer))
    assert all(map(torch.equal, params, steady))


def two_against_two() -> None:
    """Without a majority nobody knows who is right: an error, and nothing was changed."""
    params = make_params()
    optimizer = ShardedAdaBelief(params, bucket_bytes=1500, on_desync="repair", **HYPER)
    with torch.no_grad():
        params[7].data[0, 0] = dist.get_rank() % 2
    with pytest.raises(RuntimeError, match="none has a majority"):
        one_step(optimizer, params, 1)
    assert params[7][0, 0] == dist.get_rank() % 2 and optimizer.skipped_steps == 0


def other_options() -> None:
    """A learning rate that one rank has set alone is an error, and not another model per rank."""
    params = make_params()
    optimizer = ShardedAdaBelief(params, bucket_bytes=1500, **HYPER)
    one_step(optimizer, params, 1)
    before = snapshot(optimizer)
    last = dist.get_world_size() - 1
    kept = optimizer.param_groups[0]["lr"]
    if dist.get_rank() == last:
        optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(
        ValueError,
        match=rf"options of group: the group's rank 0 has lr=0\.05, rank {last} has lr=0\.5",
    ):
        one_step(optimizer, params, 2)
    assert same(before, snapshot(optimizer))
    optimizer.param_groups[0]["lr"] = kept
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 2


def other_loss_scale() -> None:
    params = make_params()
    optimizer = ShardedAdaBelief(params, bucket_bytes=1500, **HYPER)
    first = dist.get_rank() == 0
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0 if first else 8.0)
    scaler.scale(torch.stack([p.sum() for p in params]).sum()).backward()
    with (
        pytest.raises(ValueError, match="disagree about the loss scale"),
        pytest.warns(FutureWarning),
    ):
        scaler.step(optimizer)
    assert optimizer.state[params[0]]["step"] == 0


def no_check_when_it_is_off() -> None:
    """`check_replicas=False` trusts the ranks."""
    params = make_params()
    optimizer = ShardedAdaBelief(params, check_replicas=False, **HYPER)
    if dist.get_rank() == 0:
        params[7].data[0, 0] += 1.0
    one_step(optimizer, params, 1)
    assert optimizer.state[params[0]]["step"] == 1


def answer_that_comes_late(stage: Stage) -> None:
    """Where the host must not wait, the next step or reading the state tells, and counts back."""
    params = make_params()
    optimizer = ShardedAdaBelief(params, bucket_bytes=1500, stage=stage, **HYPER)
    one_step(optimizer, params, 1)
    before = snapshot(optimizer)
    if dist.get_rank() == 0:
        params[7].data[-1, -1] += 1.0
    optimizer._engine.consensus.defers = True  # as on a CUDA device
    one_step(optimizer, params, 2)
    with pytest.raises(RuntimeError, match="rank 0 differs from the others"):
        optimizer.step()
    assert same(before, snapshot(optimizer))


@pytest.mark.parametrize("world_size", [3, 4])
def test_ranks_that_come_apart(world_size: int, tmp_path: Path) -> None:
    run_ranks(
        world_size,
        tmp_path,
        partial(flipped_bit, torch.float32, 7, 0, 1),
        partial(flipped_bit, torch.float32, 1, 31, 2),
        partial(flipped_bit, torch.bfloat16, 6, 15, 0),
        *(
            partial(repaired_bit, dtype, index, culprit, stage)
            for culprit in range(3)
            for dtype, index, stage in ((torch.float32, 7, 1), (torch.bfloat16, 6, 2))
        ),
        *([two_against_two] if world_size == 4 else []),
        other_options,
        other_loss_scale,
        no_check_when_it_is_off,
        partial(answer_that_comes_late, 1),
        partial(answer_that_comes_late, 2),
    )


word = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(word, min_size=1, max_size=7))
def test_equal_words_are_told_from_others(words: list[int]) -> None:
    """Words whose sums agree by accident (x + 1 and x - 1) are told apart by their squares."""
    sent = torch.tensor(words)
    rows = torch.stack([sent, rank_sets.mixed(sent)], dim=1)
    agrees = bool((rows.sum(0) == rows[0] * len(words)).all())
    assert agrees == (len(set(words)) == 1)
