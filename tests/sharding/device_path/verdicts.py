"""Verdicts that the host reads a step later, with kernels that skip by themselves."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from belief_dist import ShardedAdaBelief, checkpoint
from belief_dist.sharding import spike_guard
from benchmarks.gpu.one_of_eight import alone
from tests.harness.models import HYPER

FORMS: list[dict[str, Any]] = [
    {},
    {"stage": 2, "max_grad_norm": 1.0},
    {"dtype": torch.bfloat16},
    {"dtype": torch.bfloat16, "master": "remainder8", "state_dtype": torch.uint8},
    {"rectify": True, "ema_decay": 0.9},
    {"ema_decay": 0.9, "ema_dtype": torch.bfloat16},
]
SPIKE = 1000
CASES = [*((1, form) for form in FORMS), *((8, form) for form in FORMS[:2])]


def build(ranks: int = 1, dtype: torch.dtype = torch.float32, **options: Any) -> ShardedAdaBelief:
    generator = torch.Generator().manual_seed(0)
    shapes = [(9, 10), (7,), (80,)]
    params = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    named = [(f"p{index}", param) for index, param in enumerate(params)]
    with alone(ranks) if ranks > 1 else nullcontext():
        return ShardedAdaBelief(named, **{**HYPER, "bucket_bytes": 400, **options})


def params_of(optimizer: ShardedAdaBelief) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def model_of(optimizer: ShardedAdaBelief) -> nn.Module:
    model = nn.Module()
    for index, param in enumerate(params_of(optimizer)):
        model.register_parameter(f"p{index}", param)
    return model


def train(optimizer: ShardedAdaBelief, seeds: Sequence[int | None]) -> None:
    """Take a step for each seed; None is one whose gradient is not finite, from SPIKE on large."""
    params = params_of(optimizer)
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed or 0)
        grads = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]
        if seed is None:
            grads[1].fill_(torch.nan)
        elif seed >= SPIKE:
            grads[1].mul_(1e4)
        torch.autograd.backward(params, grads)
        optimizer.step()
        optimizer.zero_grad()


def held(optimizer: ShardedAdaBelief) -> list[Any]:
    """Return all that training has changed, and must be the same to the last bit."""
    found: list[Any] = []
    for param in params_of(optimizer):
        state = optimizer.state[param]
        found += [param.detach().clone(), *(state[key] for key in sorted(state))]
    return copy.deepcopy(found)


def assert_same(ours: list[Any], theirs: list[Any]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize(("ranks", "form"), CASES, ids=str)
def test_a_skipped_step_leaves_everything(ranks: int, form: dict[str, Any]) -> None:
    optimizer = build(ranks, **form)
    train(optimizer, [1, 2])
    optimizer.wait_pending()
    before = held(optimizer)
    train(optimizer, [None])
    assert optimizer._engine.consensus.unread is not None  # the host does not know yet
    assert optimizer._engine.skipped_steps == 0
    assert optimizer.skipped_steps == 1  # it asks
    assert_same(held(optimizer), before)


@pytest.mark.parametrize(("ranks", "form"), CASES, ids=str)
def test_later_steps_are_those_of_a_run_without_it(ranks: int, form: dict[str, Any]) -> None:
    spoiled, plain = build(ranks, **form), build(ranks, **form)
    train(spoiled, [None, 1, None, None, 2, 3])
    train(plain, [1, 2, 3])
    spoiled.wait_pending()
    plain.wait_pending()
    assert_same(held(spoiled), held(plain))
    assert (spoiled.skipped_steps, plain.skipped_steps) == (3, 0)


@pytest.mark.parametrize(("ranks", "form"), [CASES[0], CASES[-1]], ids=str)
def test_a_spike_is_skipped(
    ranks: int, form: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spike_guard, "FEWEST", 5)  # steps take long in the interpreter
    form = {"spike_guard": 3.0, **form}
    spoiled, plain = build(ranks, **form), build(ranks, **form)
    begin = list(range(1, 6))
    train(spoiled, [SPIKE, *begin, SPIKE, None, SPIKE, 500])
    assert spoiled._engine.skipped_steps == 3
    train(plain, [SPIKE, *begin, 500])
    spoiled.wait_pending()
    assert_same(held(spoiled), held(plain))
    assert spoiled.spike_history == plain.spike_history
    train(spoiled, [SPIKE])
    assert "more than" in spoiled.last_step.why_not
    assert f"{spoiled.grad_norm.item():.4g}" in spoiled.last_step.why_not
    assert (spoiled.skipped_steps, plain.skipped_steps) == (4, 0)


def test_the_next_step_reads_it_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = build()
    with caplog.at_level(logging.WARNING, "belief_dist"):
        train(optimizer, [1, None])
        assert not caplog.records
        train(optimizer, [2])
    assert [each.getMessage() for each in caplog.records] == [
        "a gradient is not finite: step skipped on all ranks (1 so far)"
    ]


def test_a_state_dict_settles_it() -> None:
    optimizer, other = build(), build()
    train(optimizer, [1, None])
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["sharding"]["skipped_steps"] == 1
    assert [state["step"] for state in saved["state"].values()] == [1, 1, 1]
    for mine, its in zip(params_of(other), params_of(optimizer), strict=True):
        mine.data.copy_(its)
    other.load_state_dict(saved)
    train(optimizer, [2])
    train(other, [2])
    assert other.skipped_steps == 1
    assert_same(held(other), held(optimizer))


def test_a_checkpoint_settles_it(tmp_path: Path) -> None:
    optimizer, other = build(), build()
    train(optimizer, [1, None])
    checkpoint.save(tmp_path, 1, model=model_of(optimizer), optimizer=optimizer)
    train(other, [5])
    checkpoint.load(tmp_path, model=model_of(other), optimizer=other)
    train(optimizer, [2])
    train(other, [2])
    assert other.skipped_steps == optimizer.skipped_steps == 1
    assert_same(held(other), held(optimizer))


def test_an_error_is_raised_by_the_next_step() -> None:
    optimizer = build(dtype=torch.bfloat16)
    train(optimizer, [1])
    params_of(optimizer)[0].data.add_(1)
    train(optimizer, [2])
    with pytest.raises(RuntimeError, match=r"changed through `\.data`"):
        train(optimizer, [3])
    assert [optimizer.state[p]["step"] for p in params_of(optimizer)] == [1, 1, 1]


def test_averages_lent_before_the_verdict_was_read() -> None:
    lends, plain = (build(dtype=torch.bfloat16, ema_decay=0.9) for _ in range(2))
    for seed in (1, None, 2):
        train(lends, [seed])
        train(plain, [seed])
        plain.wait_pending()
        before = [param.clone() for param in params_of(plain)]
        with lends.averaged_parameters():
            assert not all(map(torch.equal, params_of(lends), before))
        assert all(map(torch.equal, params_of(lends), before))
    train(lends, [3])
    train(plain, [3])
    lends.wait_pending()
    plain.wait_pending()
    assert_same(held(lends), held(plain))
    assert lends.skipped_steps == plain.skipped_steps == 1
