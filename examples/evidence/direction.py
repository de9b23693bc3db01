"""Where updates point when gradients are noisy, beside the formula of AdaBelief's page.

Gradients are mu + sigma * noise, elementwise. The page says that Adam moves along
mu / sqrt(mu^2 + sigma^2), which is sign(mu) where there is little noise, and AdaBelief along
mu / sigma, which is mu itself where all elements have the same noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.evidence.optimizers import build
from examples.evidence.study import Cell, Contender, Points, Study


@dataclass(frozen=True)
class Drift:
    """Noisy gradients.

    Attributes:
        noise: sigma, over the root mean square of mu.
        spread: "equal" for one sigma, "unequal" for elements between a tenth and ten times that.
        steps: Of the optimizer; updates are averaged over the last third, after the start, when m
            was far from the gradient, has been forgotten by s.
        elements: That move independently.
    """

    noise: float
    spread: Literal["equal", "unequal"]
    steps: int = 12_000
    elements: int = 256


def drift(work: Drift, contender: Contender, lr: float, seed: int) -> Points:
    """Return one point: cosines of the mean update with gradient, sign and the page's formula.

    `predicted_gradient` and `predicted_sign` are the formula's own cosines.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, work.elements, generator=generator, dtype=torch.float64)
    mu = draw[0] * draw[1].exp()  # of very different sizes, as in networks
    mu /= mu.square().mean().sqrt()
    sigma = torch.full_like(mu, work.noise)
    if work.spread == "unequal":
        sigma *= 10 ** (2 * torch.rand(work.elements, generator=generator, dtype=torch.float64) - 1)
    place = torch.zeros(work.elements, dtype=torch.float64, requires_grad=True)
    optimizer = build(contender, [place], lr)
    first = work.steps * 2 // 3
    for step in range(1, work.steps + 1):
        noise = torch.randn(work.elements, generator=generator, dtype=torch.float64)
        place.grad = mu + sigma * noise
        optimizer.step()
        if step == first:
            start = place.detach().clone()
    update = start - place.detach()
    adapts = contender.rule == "AdaBelief"
    formula = mu / sigma if adapts else mu / (mu.square() + sigma.square()).sqrt()
    return [
        {
            "step": work.steps,
            "gradient": cosine(update, mu),
            "sign": cosine(update, mu.sign()),
            "formula": cosine(update, formula),
            "predicted_gradient": cosine(formula, mu),
            "predicted_sign": cosine(formula, mu.sign()),
        }
    ]


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of the angle between two vectors."""
    return F.cosine_similarity(a, b, dim=0).item()


LEVELS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
DIRECTION = Study(
    name="direction",
    question="Do updates follow the gradient, where Adam's follow its sign?",
    train=drift,
    metrics=("gradient", "sign", "formula", "predicted_gradient", "predicted_sign"),
    score="formula",
    maximize=True,
    minutes=2,
    cells=tuple(
        Cell(f"{spread}, noise {level:g}", Contender(rule, rule, (1e-3,)), Drift(level, spread))
        for spread in ("equal", "unequal")
        for level in LEVELS
        for rule in ("Adam", "AdaBelief")
    ),
    seeds=5,
    quick={"steps": 30},
)
