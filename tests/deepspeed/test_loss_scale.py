"""The loss scale of float16 that ShardedAdaBelief has in DeepSpeed's engine."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from belief_dist import ShardedAdaBelief
from belief_dist.deepspeed.stage0.loss_scale import EngineScaler, scaler_of

GOOD, BAD = False, True


def scales(scaler: EngineScaler, *steps: bool) -> list[float]:
    """Return the scale after each step of a model whose loss is infinite in the bad ones."""
    model = nn.Linear(3, 2)
    optimizer = ShardedAdaBelief(model.parameters(), lr=0.1)
    found = []
    for bad in steps:
        before = model.weight.detach().clone()
        loss = model(torch.ones(4, 3)).square().mean()
        scaler.scale(loss * math.inf if bad else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(before, model.weight) is bad
        found.append(scaler.get_scale())
    assert optimizer.skipped_steps == sum(steps)
    return found


def test_doubles_after_a_window_of_good_steps_and_halves_at_once():
    scaler = EngineScaler("cpu", 8.0, 2, 1.0, math.inf)
    steps = (GOOD, GOOD, GOOD, BAD, GOOD, GOOD)
    assert scales(scaler, *steps) == [8.0, 16.0, 16.0, 8.0, 8.0, 16.0]


def test_never_below_its_minimum():
    assert scales(EngineScaler("cpu", 4.0, 100, 2.0, math.inf), BAD, BAD, BAD) == [2.0, 2.0, 2.0]


def test_a_static_scale_stays_and_steps_are_skipped_all_the_same():
    scaler = EngineScaler("cpu", 128.0, 1, 128.0, 128.0)
    assert scales(scaler, GOOD, BAD, GOOD) == [128.0, 128.0, 128.0]


def test_the_scale_survives_a_checkpoint():
    scaler = EngineScaler("cpu", 8.0, 2, 1.0, math.inf)
    scales(scaler, BAD, GOOD)
    again = EngineScaler("cpu", 8.0, 2, 1.0, math.inf)
    again.load_state_dict(scaler.state_dict())
    assert scales(again, GOOD) == [8.0]  # the second good step in a row, from 4


def engine(
    fp16: dict[str, Any] | None = None, autocast: torch.amp.GradScaler | None = None
) -> SimpleNamespace:
    """Return what `scaler_of` asks of an engine, with DeepSpeed's own reading of its config."""
    from deepspeed.runtime.precision_config import DeepSpeedFP16Config

    options = DeepSpeedFP16Config(**(fp16 or {}))
    return SimpleNamespace(
        device=torch.device("cpu"),
        fp16_enabled=lambda: options.enabled,
        dynamic_loss_scale=lambda: options.loss_scale == 0,
        torch_autocast_z0_gradscaler=autocast,
        _config=SimpleNamespace(float16_config=options),
    )


@pytest.mark.parametrize(
    ("fp16", "steps", "expected"),
    [
        ({"initial_scale_power": 3, "loss_scale_window": 1}, (GOOD, BAD), [16.0, 8.0]),
        ({"initial_scale_power": 3, "min_loss_scale": 4}, (BAD, BAD), [4.0, 4.0]),
        ({"loss_scale": 32.0}, (GOOD, BAD), [32.0, 32.0]),
        ({}, (GOOD, BAD), [2.0**16, 2.0**15]),
    ],
)
def test_options_of_the_config(fp16, steps, expected):
    scaler = scaler_of(engine({"enabled": True, **fp16}))
    assert scales(scaler, *steps) == expected


def test_autocast_in_float16_keeps_torchs_options():
    scaler = scaler_of(engine(autocast=torch.amp.GradScaler("cpu", 64.0, growth_interval=1)))
    assert isinstance(scaler, EngineScaler)
    assert scales(scaler, GOOD, BAD, BAD) == [128.0, 64.0, 32.0]


def test_none_for_other_dtypes():
    assert scaler_of(engine()) is None
