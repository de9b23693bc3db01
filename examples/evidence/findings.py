"""What the recorded runs of a study say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from examples.evidence.catalog import STUDIES
from examples.evidence.estimates import Comparison, Interval, compare, interval
from examples.evidence.store import Store
from examples.evidence.study import Cell, Point, Points, Run, Study

Pick = Callable[[Points, str], float]  # one number of a run


def last(points: Points, metric: str) -> float:
    """Return what was measured at the end."""
    return points[-1][metric]


def highest(points: Points, metric: str) -> float:
    """Return the largest of all that was measured."""
    return max(point[metric] for point in points)


def first(points: Points, metric: str) -> float:
    """Return what was measured first."""
    return points[0][metric]


@dataclass
class Findings:
    """A study with its recorded runs."""

    study: Study
    store: Store
    cells: dict[tuple[str, str], Cell] = field(init=False)

    def __post_init__(self) -> None:
        self.cells = {(cell.setting, cell.contender.name): cell for cell in self.study.cells}

    @property
    def settings(self) -> list[str]:
        """Return the settings of which anything is recorded."""
        names = dict.fromkeys(cell.setting for cell in self.study.cells)
        return [name for name in names if self.contenders(name)]

    @property
    def missing(self) -> int:
        """Return the number of runs that were not done."""
        return self.study.count - len(self.store)

    def contenders(self, setting: str) -> list[str]:
        """Return who has a reported run in a setting."""
        return [name for where, name in self.cells if where == setting and self.runs(setting, name)]

    def lr(self, setting: str, contender: str) -> float:
        """Return the learning rate of the reported runs."""
        return next(iter(self.runs(setting, contender).values())).lr

    def runs(self, setting: str, contender: str) -> dict[int, Run]:
        """Return the reported runs by seed, none before the learning rate is known."""
        lr = self.study.best_lr(self.cells[setting, contender], self.store)
        if lr is None:
            return {}
        runs = (Run(setting, contender, lr, seed) for seed in range(self.study.seeds))
        return {run.seed: run for run in runs if run in self.store}

    def values(
        self, setting: str, contender: str, metric: str, pick: Pick = last
    ) -> dict[int, float]:
        """Return a number of every reported run by seed."""
        runs = self.runs(setting, contender)
        return {seed: pick(self.store[run], metric) for seed, run in runs.items()}

    def interval(self, setting: str, contender: str, metric: str, pick: Pick = last) -> Interval:
        """Return the mean of `values`."""
        return interval(list(self.values(setting, contender, metric, pick).values()))

    def compare(
        self,
        setting: str,
        ours: str,
        theirs: str,
        metric: str,
        change: Callable[[float], float] = float,
        pick: Pick = last,
    ) -> Comparison | None:
        """Compare two contenders by the seeds that both have, None without any."""
        mine = self.values(setting, ours, metric, pick)
        other = self.values(setting, theirs, metric, pick)
        seeds = sorted(mine.keys() & other.keys())
        if not seeds:
            return None
        return compare([change(mine[s]) for s in seeds], [change(other[s]) for s in seeds])

    def curve(self, setting: str, contender: str, metric: str) -> dict[float, Interval]:
        """Return the mean of every point by its step."""
        points: dict[float, list[Point]] = {}
        for run in self.runs(setting, contender).values():
            for point in self.store[run]:
                points.setdefault(point["step"], []).append(point)
        return {step: interval([p[metric] for p in some]) for step, some in points.items()}


def store_of(study: Study, folder: Path) -> Store:
    """Return what a study has found so far."""
    return Store(folder / f"{study.name}.csv", study.metrics)


def load(folder: Path) -> dict[str, Findings]:
    """Return what all studies have found."""
    return {name: Findings(study, store_of(study, folder)) for name, study in STUDIES.items()}
