"""The page's two small tables, from the optimizers themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from belief_dist import AdaBelief


class Step(NamedTuple):
    """A step on one coordinate: its gradient, and bias-corrected averages."""

    step: int
    g: float
    m: float
    v: float  # of g^2: Adam's
    s: float  # of (g - m)^2: AdaBelief's


def trace(gradients: Sequence[float], betas: tuple[float, float]) -> list[Step]:
    """Return what Adam and AdaBelief hold after each of some gradients."""
    places = [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2)]
    adam = torch.optim.Adam(places[:1], betas=betas)
    belief = AdaBelief(places[1:], betas=betas)
    rows = []
    for step, gradient in enumerate(gradients, start=1):
        for place, optimizer in zip(places, (adam, belief), strict=True):
            place.grad = torch.tensor(gradient, dtype=torch.float64)
            optimizer.step()
        theirs, ours = adam.state[places[0]], belief.state[places[1]]
        corrections = [1 - beta**step for beta in betas]
        m, v, s = theirs["exp_avg"], theirs["exp_avg_sq"], ours["exp_avg_sq"]
        rows.append(
            Step(
                *(step, gradient, m.item() / corrections[0]),
                *(v.item() / corrections[1], s.item() / corrections[1]),
            )
        )
    return rows


class Region(NamedTuple):
    """A stretch of a curve, and the steps that are taken there, in units of lr."""

    name: str
    gradient: float  # its mean
    swing: float  # between one step and the next
    ideal: str  # step
    sgd: float  # without a factor 10 that torch's momentum has
    adam: float
    belief: float


def regions(steps: int = 200) -> list[Region]:
    """Return the three regions of the page's figure: flat, narrow, and a steep slope."""
    return [
        _region("1: small gradient, small curvature", 0.01, 1e-4, steps, "large"),
        _region("2: large gradient, large curvature", 0.0, 2.0, steps, "small"),
        _region("3: large gradient, small curvature", 1.0, 1e-2, steps, "large"),
    ]


def _region(name: str, gradient: float, swing: float, steps: int, ideal: str) -> Region:
    gradients = [gradient + swing * (step % 2 - 0.5) for step in range(steps)]
    last = trace(gradients, (0.9, 0.999))[-1]
    moved = abs(last.m)
    return Region(name, gradient, swing, ideal, moved, moved / last.v**0.5, moved / last.s**0.5)
