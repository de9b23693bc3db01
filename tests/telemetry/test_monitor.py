"""StepMonitor: its numbers are the definitions', and training does not notice it."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from belief_dist import AdaBelief, ShardedAdaBelief
from belief_dist.telemetry import StepMonitor, read_records
from tests.harness.models import HYPER, SHAPES, make_grad, make_params
from tests.harness.ranks import run_ranks
from tests.harness.reference import backward

pytestmark = pytest.mark.filterwarnings(
    "ignore:eps=.* dominates", "ignore:offload='cpu' updates on 1 thread"
)
TINY = {**HYPER, "eps": 1e-12}


def expected(
    ms: list[Tensor],
    ss: list[Tensor],
    ps: list[Tensor],
    gs: list[Tensor],
    step: int,
    options: dict[str, Any],
) -> dict[str, float]:
    """Return the statistics of whole tensors, by their definitions, in float64."""
    m, s, p, g = (torch.cat([t.double().flatten() for t in each]) for each in (ms, ss, ps, gs))
    beta1, beta2 = options["betas"]
    eps, lr = options["eps"], options["lr"]
    m_hat, s_hat = m / (1 - beta1**step), s / (1 - beta2**step)
    direction = m_hat / (s_hat.sqrt() + eps)
    floor = eps * (1 - beta2**step) / (1 - beta2)

    def rms(x: Tensor) -> float:
        return float(x.square().mean().sqrt())

    return {
        "l2_norm/param": float(p.norm()),
        "l2_norm/moment": float(m.norm()),
        "l2_norm/second_moment_sqrt": float(s.sum().sqrt()),
        "l2_norm/grad": float(g.norm()),
        "l2_norm/update": lr * float(direction.norm()),
        "rms/update_direction": rms(direction),
        "update_to_weight": lr * rms(direction) / rms(p),
        "belief/signal": float(direction.abs().mean()),
        "belief/surprise": float(((g - m).square() / s_hat).mean()),
        "belief/eps_share": float((s < 2 * floor).double().mean()),
    }


def assert_tells(record: dict[str, Any] | None, name: str, values: dict[str, float]) -> None:
    assert record is not None
    told = {key: record.get(f"{key}/{name}") for key in values}
    # Sums of float32 numbers in windows.
    assert told == pytest.approx(values, rel=2e-5), name


@pytest.mark.parametrize("eps", [1e-12, 1e-2])
def test_numbers_of_one_process(eps: float) -> None:
    params = make_params()
    names = [f"layer{number}" for number in range(len(params))]
    options = {**HYPER, "eps": eps}
    optimizer = AdaBelief(
        [{"params": list(zip(names, params, strict=True))[:4]}, {"params": params[4:], "lr": 0.02}]
        if False
        else list(zip(names, params, strict=True)),
        **options,
    )
    monitor = StepMonitor(optimizer, [], every=1, per_parameter=True)
    for step in range(1, 4):
        grads = [make_grad(shape, step, 0, index) for index, shape in enumerate(SHAPES)]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
        record = monitor.log(step, loss=torch.tensor(0.5))
        states = [optimizer.state[param] for param in params]
        ms, ss = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
        detached = [param.detach() for param in params]
        whole = expected(ms, ss, detached, grads, step, options)
        assert_tells(record, "group0", whole)
        assert record is not None and record["loss"] == 0.5
        assert record["l2_norm/grad/global"] == pytest.approx(whole["l2_norm/grad"])
        assert record["bytes/exp_avg"] == sum(m.nbytes for m in ms)
        for index in (0, 6):
            own = [[each[index]] for each in (ms, ss, detached, grads)]
            assert_tells(record, names[index], expected(*own, step, options))
