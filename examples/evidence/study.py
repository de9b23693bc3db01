"""Experiments as data: what is compared, how it is tuned, and which runs that takes.

Every contender gets the same number of learning rates. Each is tried once, with a seed of its own,
on data held back for that; the best one then trains with the seeds that are reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

TUNING_SEED = 1000  # of no reported run

Point = dict[str, float]  # what was measured at a step
Points = list[Point]  # of one run; the last one counts


@dataclass(frozen=True)
class Contender:
    """An optimizer with its settings.

    Attributes:
        name: As figures show it.
        rule: Which optimizer, a key of `optimizers.RULES`.
        lrs: The learning rates that are tried; a single one is taken as it is.
        options: Of the optimizer, besides lr.
    """

    name: str
    rule: str
    lrs: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One contender at one piece of work, which is a dataclass that the study's `train` knows."""

    setting: str
    contender: Contender
    work: Any


class Run(NamedTuple):
    """What identifies a training: it is done once."""

    setting: str
    contender: str
    lr: float
    seed: int

    @property
    def tunes(self) -> bool:
        """Whether it only helps to choose the learning rate."""
        return self.seed == TUNING_SEED


Train = Callable[[Any, Contender, float, int], Points]


@dataclass(frozen=True)
class Study:
    """An experiment.

    Attributes:
        name: What the command line calls it.
        question: That it answers.
        train: Trains a cell's work with its contender, a learning rate and a seed.
        metrics: Names of what is measured.
        score: The metric, at the last point, by which learning rates are chosen.
        maximize: Whether more of it is better.
        minutes: Of one core, for all runs.
        cells: What is compared.
        seeds: How many are reported: 0, 1, ...
        tuning: Fields of the work that differ in runs that tune.
        quick: Fields of the work that make it a matter of a moment, for tests.
    """

    name: str
    question: str
    train: Train
    metrics: tuple[str, ...]
    score: str
    maximize: bool
    minutes: float
    cells: tuple[Cell, ...]
    seeds: int
    tuning: Mapping[str, Any] = field(default_factory=dict)
    quick: Mapping[str, Any] = field(default_factory=dict)

    def shortened(self) -> Study:
        """Return the same study with little work, one learning rate and one seed."""
        cells = tuple(
            replace(
                cell,
                work=replace(cell.work, **self.quick),
                contender=replace(cell.contender, lrs=cell.contender.lrs[:1]),
            )
            for cell in self.cells
        )
        return replace(self, cells=cells, seeds=1)

    def cell(self, run: Run) -> Cell:
        """Return where a run belongs."""
        key = (run.setting, run.contender)
        return next(c for c in self.cells if (c.setting, c.contender.name) == key)

    def execute(self, run: Run) -> Points:
        """Train."""
        cell = self.cell(run)
        work = replace(cell.work, **self.tuning) if run.tunes else cell.work
        return self.train(work, cell.contender, run.lr, run.seed)

    def runs(self, finished: Mapping[Run, Points]) -> Iterator[Run]:
        """Give all runs that are known by now, seed by seed: those that tune, then the others."""
        for cell in self.cells:
            yield from self._tuning_runs(cell)
        for seed in range(self.seeds):
            for cell in self.cells:
                lr = self.best_lr(cell, finished)
                if lr is not None:
                    yield Run(cell.setting, cell.contender.name, lr, seed)

    @property
    def count(self) -> int:
        """Return the number of all runs."""
        return sum(len(list(self._tuning_runs(cell))) + self.seeds for cell in self.cells)

    def best_lr(self, cell: Cell, finished: Mapping[Run, Points]) -> float | None:
        """Return the learning rate to report, None before all of them were tried."""
        if len(cell.contender.lrs) == 1:
            return cell.contender.lrs[0]
        tried = list(self._tuning_runs(cell))
        if any(run not in finished for run in tried):
            return None
        return max(tried, key=lambda run: self._merit(finished[run])).lr

    def _merit(self, points: Sequence[Point]) -> float:
        score = points[-1][self.score]
        if not math.isfinite(score):
            return -math.inf
        return score if self.maximize else -score

    @staticmethod
    def _tuning_runs(cell: Cell) -> Iterator[Run]:
        if len(cell.contender.lrs) > 1:
            for lr in cell.contender.lrs:
                yield Run(cell.setting, cell.contender.name, lr, TUNING_SEED)
