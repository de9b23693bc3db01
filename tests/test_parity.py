"""AdaBelief equals the official adabelief-pytorch 0.2.1, switch by switch."""

from __future__ import annotations

import contextlib
import io
import itertools
from typing import Any

import pytest
import torch
from adabelief_pytorch import AdaBelief as Official

from belief_dist import AdaBelief

SHAPES = [(5, 7), (), (3,), (2, 3, 4)]
STEPS = 50

SWITCHES = [
    dict(
        zip(
            ("weight_decouple", "fixed_decay", "rectify", "degenerated_to_sgd", "amsgrad"),
            on,
            strict=True,
        )
    )
    for on in itertools.product([True, False], repeat=5)
    # Refused here, with the reason: fixed_decay without decoupling is ignored by the official
    # package, and so is amsgrad under rectify.
    if not (on[1] and not on[0]) and not (on[2] and on[4])
]


def train(
    cls: type[torch.optim.Optimizer], dtype: torch.dtype, hyper: dict[str, Any]
) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    more = {"print_change_log": False} if cls is Official else {}
    with contextlib.redirect_stdout(io.StringIO()):  # the official class prints a banner
        optimizer = cls(params, **hyper, **more)
    for _ in range(STEPS):
        for param in params:
            param.grad = torch.randn(param.shape, dtype=dtype) * 10 ** torch.empty(()).uniform_(
                -2, 0
            )
        optimizer.step()
    return params, optimizer


def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Largest difference, relative to the largest element of its tensor."""
    return max(
        float((x - y).detach().double().abs().max() / y.detach().double().abs().max())
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("hyper", SWITCHES, ids=lambda h: "-".join(k for k in h if h[k]) or "none")
@pytest.mark.parametrize("eps, weight_decay", [(1e-16, 0.0), (1e-8, 0.02), (1e-2, 0.02)])
@pytest.mark.parametrize(
    "dtype, tolerance",
    [
        # 50 steps of a handful of roundings each; measured: 3e-16 at most.
        (torch.float64, 1e-12),
        # 8 ulp of the largest element (ulp = 2^-23): the order of operations differs (ours has no
        # fused multiply-add, and multiplies by 1/sqrt(bias) where theirs divides).
        (torch.float32, 8 * 2.0**-23),
    ],
    ids=["fp64", "fp32"],
)
def test_equals_the_official_package(
    hyper: dict[str, Any], eps: float, weight_decay: float, dtype: torch.dtype, tolerance: float
) -> None:
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": eps, "weight_decay": weight_decay, **hyper}
    ours, optimizer = train(AdaBelief, dtype, options)
    theirs, official = train(Official, dtype, options)
    assert distance(ours, theirs) <= tolerance
    for a, b in zip(ours, theirs, strict=True):
        mine, other = optimizer.state[a], official.state[b]
        assert mine["step"] == other["step"] == STEPS
        assert distance([mine["exp_avg"]], [other["exp_avg"]]) <= tolerance
        assert distance([mine["exp_avg_sq"]], [other["exp_avg_var"]]) <= tolerance
        if hyper["amsgrad"]:
            assert distance([mine["max_exp_avg_sq"]], [other["max_exp_avg_var"]]) <= tolerance


def test_the_oracle_can_fail() -> None:
    """The comparison sees a wrong eps and a wrong scale of the gradient."""
    base = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-2, "rectify": False}
    theirs, _ = train(Official, torch.float64, base)
    for wrong in ({"eps": 1.1e-2}, {"betas": (0.9, 0.991)}):
        ours, _ = train(AdaBelief, torch.float64, {**base, **wrong})
        assert distance(ours, theirs) > 1e-6
