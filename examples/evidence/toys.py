"""The functions of two variables in the videos of AdaBelief's page, from the same starts.

Source: the videos of https://juntang-zhuang.github.io/adabelief/; what is written beside each case
was read off them, every tenth frame. They show one step a frame at lr 1e-2; Beale's function is
compressed there by log(1 + f), and Rosenbrock's has the factor 1 in place of 100.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from examples.evidence.optimizers import build
from examples.evidence.study import Cell, Contender, Points, Study

NEAR = 0.15  # of the minimum: a dot of the videos has reached it
STEPS = 2000
STAY = 100  # steps near the minimum end a run


def valley(x: Tensor, y: Tensor) -> Tensor:
    """A funnel with edges along both axes."""
    return x.abs() + y.abs()


def flat_valley(x: Tensor, y: Tensor) -> Tensor:
    """Ten times as steep along y."""
    return x.abs() / 10 + y.abs()


def turned_valley(x: Tensor, y: Tensor) -> Tensor:
    """Ten times as steep across a diagonal as along it."""
    return (x - y).abs() + (x + y).abs() / 10


def turned_bowl(x: Tensor, y: Tensor) -> Tensor:
    """The same with squares."""
    return (x + y) ** 2 + (x - y) ** 2 / 10


def beale(x: Tensor, y: Tensor) -> Tensor:
    """Beale's function, compressed."""
    terms = (1.5 - x + x * y, 2.25 - x + x * y**2, 2.625 - x + x * y**3)
    return torch.log1p(sum(term**2 for term in terms))


def rosenbrock(x: Tensor, y: Tensor) -> Tensor:
    """Rosenbrock's function with the factor 1."""
    return (1 - x) ** 2 + (y - x**2) ** 2


def mccormick(x: Tensor, y: Tensor) -> Tensor:
    """McCormick's function."""
    return torch.sin(x + y) + (x - y) ** 2 - 1.5 * x + 2.5 * y + 1


class Seen(NamedTuple):
    """In a video: the frame at which a dot is near the minimum, or where it is at the end."""

    frame: int | None = None
    end: tuple[float, float] | None = None


@dataclass(frozen=True)
class Case:
    """A function with a start.

    Attributes:
        name: Of the function and, where there are two, of the start.
        function: Of x and y.
        start: Of all optimizers.
        minimum: Where the function is least.
        belief: What the video shows of AdaBelief.
        adam: And of Adam.
        frames: Of the video, where something is said of its end.
    """

    name: str
    function: Callable[[Tensor, Tensor], Tensor]
    start: tuple[float, float]
    minimum: tuple[float, float]
    belief: Seen
    adam: Seen
    frames: int = 500


_BEALE, _ROSENBROCK, _MCCORMICK = (3.0, 0.5), (1.0, 1.0), (-0.547, -1.547)
CASES = (
    Case("valley, near an edge", valley, (2.5, 0.1), (0, 0), Seen(80), Seen(240)),
    Case("valley, on a diagonal", valley, (2.5, -2.5), (0, 0), Seen(90), Seen(240)),
    Case("flat valley, from above", flat_valley, (0.5, 1.5), (0, 0), Seen(40), Seen(140)),
    Case("flat valley, near an edge", flat_valley, (2.5, 0.1), (0, 0), Seen(80), Seen(240)),
    Case("turned valley", turned_valley, (2.5, 0.1), (0, 0), Seen(1110), Seen(1320)),
    Case("turned bowl", turned_bowl, (2.5, 0.1), (0, 0), Seen(440), Seen(end=(0.59, -0.57))),
    Case("log Beale, right", beale, (2.5, -2.5), _BEALE, Seen(240), Seen(end=(2.64, 0.39))),
    Case("log Beale, left", beale, (-2.5, -2.5), _BEALE, Seen(190), Seen(end=(2.0, 0.1))),
    Case("Rosenbrock, right", rosenbrock, (2.5, -1.0), _ROSENBROCK, Seen(160), Seen(430)),
    Case(
        *("Rosenbrock, left", rosenbrock, (-2.5, -2.5), _ROSENBROCK),
        *(Seen(1360), Seen(end=(0.51, 0.18)), 1500),
    ),
    Case("McCormick, above", mccormick, (0.0, 2.0), _MCCORMICK, Seen(310), Seen(end=(0.99, 0.0))),
    Case(
        *("McCormick, right", mccormick, (1.8, -1.8), _MCCORMICK),
        *(Seen(160), Seen(end=(0.09, -1.21)), 250),
    ),
)


@dataclass(frozen=True)
class Descend:
    """A case by name, the steps between points (0 for the last point alone), and the most steps."""

    case: str
    every: int
    steps: int = STEPS


def descend(work: Descend, contender: Contender, lr: float, seed: int) -> Points:
    """Go down a function in float64; there is nothing random in it.

    Returns:
        Points with `near`, the first step near the minimum, and `settled`, the first of those after
        which it stayed there. Both are nan until then.
    """
    case = next(each for each in CASES if each.name == work.case)
    place = torch.tensor(case.start, dtype=torch.float64, requires_grad=True)
    optimizer = build(contender, [place], lr)
    near = settled = math.nan
    points: Points = []
    for step in range(1, work.steps + 1):
        optimizer.zero_grad()
        case.function(place[0], place[1]).backward()
        optimizer.step()
        x, y = place.tolist()
        close = math.dist((x, y), case.minimum) <= NEAR
        near = step if close and math.isnan(near) else near
        if not close:
            settled = math.nan
        elif math.isnan(settled):
            settled = step
        ends = step == work.steps or step >= settled + STAY or not math.isfinite(x + y)
        if ends or (work.every and step % work.every == 0):
            points.append({"step": step, "x": x, "y": y, "near": near, "settled": settled})
        if ends:
            break
    return points


_MOMENTUM = {"momentum": 0.9}
HEAVY, AVERAGED = "SGD, heavy ball", "SGD, averaged gradient"
_RULES: dict[str, tuple[str, dict[str, float]]] = {
    HEAVY: ("SGD", _MOMENTUM),
    AVERAGED: ("SGD", {**_MOMENTUM, "dampening": 0.9}),
    "Adam": ("Adam", {}),
    "AdaBelief": ("AdaBelief", {}),
}
_GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


def _cells(lrs: tuple[float, ...], every: int) -> tuple[Cell, ...]:
    return tuple(
        Cell(case.name, Contender(name, rule, lrs, options), Descend(case.name, every))
        for case in CASES
        for name, (rule, options) in _RULES.items()
    )


TOYS = Study(
    name="toys",
    question="Is AdaBelief first on the page's functions, at the videos' learning rate?",
    train=descend,
    metrics=("x", "y", "near", "settled"),
    score="settled",
    maximize=False,
    minutes=0.5,
    cells=_cells((1e-2,), 10),
    seeds=1,
    quick={"steps": 20},
)
TUNED_TOYS = Study(
    name="toys-tuned",
    question="And where every optimizer has the best of six learning rates?",
    train=descend,
    metrics=("x", "y", "near", "settled"),
    score="settled",
    maximize=False,
    minutes=1,
    cells=_cells(_GRID, 0),
    seeds=1,
    quick={"steps": 20},
)
