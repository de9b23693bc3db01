"""Finished runs, one CSV file for each study: a row for every point, those of a run together.

The last row of a run says how long it took, and where. Rows without one are what was left of a run
when its process ended; they are dropped, and the run is done again.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from examples.evidence.study import Points, Run

_KEY = ["setting", "contender", "lr", "seed"]
_END = ["seconds", "machine"]


class Store(Mapping[Run, Points]):
    """The runs of one study that have finished; grows by `add`.

    Args:
        path: Of the CSV file, which need not exist.
        metrics: Names of what is measured.

    Raises:
        ValueError: The file measures something else.
    """

    def __init__(self, path: Path, metrics: tuple[str, ...]) -> None:
        self._path = path
        self._measured = ["step", *metrics]
        self._columns = [*_KEY, *self._measured, *_END]
        self._runs: dict[Run, Points] = {}
        self.seconds: dict[Run, float] = {}
        self.machines: list[str] = []
        if path.exists():
            self._read()

    def __getitem__(self, run: Run) -> Points:
        return self._runs[run]

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs)

    def __len__(self) -> int:
        return len(self._runs)

    def add(self, run: Run, points: Points, seconds: float, machine: str) -> None:
        """Write a run to the file, for good."""
        if not self._path.exists():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._append([self._columns])
        rows = []
        for point in points:
            end = [f"{seconds:.1f}", machine] if point is points[-1] else ["", ""]
            measured = [f"{point[name]:.6g}" for name in self._measured]
            rows.append([run.setting, run.contender, f"{run.lr:g}", str(run.seed), *measured, *end])
        self._append(rows)
        self._keep(run, points, seconds, machine)

    def _append(self, rows: list[list[str]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        with self._path.open("a") as file:
            file.write(text.getvalue())  # all at once
            file.flush()
            os.fsync(file.fileno())

    def _keep(self, run: Run, points: Points, seconds: float, machine: str) -> None:
        self._runs[run] = points
        self.seconds[run] = seconds
        if machine not in self.machines:
            self.machines.append(machine)

    def _read(self) -> None:
        lines = self._path.read_text().splitlines(keepends=True)
        whole = 1  # lines, up to the end of a run
        if next(csv.reader(lines)) != self._columns:
            raise ValueError(f"{self._path} has other columns than {', '.join(self._columns)}.")
        points: Points = []
        for number, row in enumerate(csv.DictReader(lines), start=2):
            if None in row.values() or not lines[number - 1].endswith("\n"):
                break
            points.append(
                {name: float(row[name]) for name in self._columns[len(_KEY) : -len(_END)]}
            )
            if row["seconds"]:
                run = Run(row["setting"], row["contender"], float(row["lr"]), int(row["seed"]))
                self._keep(run, points, float(row["seconds"]), row["machine"])
                points, whole = [], number
        if whole < len(lines):
            self._path.write_text("".join(lines[:whole]))
