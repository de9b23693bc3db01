"""What is measured about smaller states: tables, for terminals and documents, and pictures."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.accuracy import Case, Errors
from benchmarks.console import console
from benchmarks.report import machine
from benchmarks.smallstates import Trained


@dataclass
class Sheet:
    """A table that has not been drawn yet."""

    title: str
    settings: dict[str, Any]
    columns: list[str]
    rows: list[list[str]]

    def show(self, console: Console) -> None:
        """Print it."""
        table = Table("", box=SIMPLE_HEAD)
        for column in self.columns:
            table.add_column(column.replace(" ", "\n", 1), justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        console.print(f"\n[bold]{self.title}[/bold]: {self._settings()}")
        console.print(table)

    def markdown(self) -> str:
        """Return it as Markdown."""
        lines = [f"{self.title[0].upper()}{self.title[1:]} ({self._settings()}):", ""]
        lines += ["| | " + " | ".join(self.columns) + " |", "|---|" + "---:|" * len(self.columns)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join(lines)

    def _settings(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.settings.items())


def tell_sheets(sheets: list[Sheet], found: dict[str, Any], json: Path | None) -> None:
    """Print tables, and write what was found to a file if there is one."""
    out = console()
    for sheet in sheets:
        sheet.show(out)
    if json is not None:
        content = {"machine": machine(), **found}
        json.write_text(json_module.dumps(content, indent=2, default=asdict) + "\n")


def write_markdown(path: Path, sheets: list[Sheet]) -> None:
    """Write tables as Markdown."""
    path.write_text("\n\n".join(sheet.markdown() for sheet in sheets) + "\n")


def accuracy_sheet(case: Case) -> Sheet:
    """Return the relative errors of all modes."""
    rows = []
    for name, errors in case.rows.items():
        u, m, s = errors.update, errors.m, errors.s
        numbers = (u.median, u.p90, u.p99, u.max, m.median, m.p90, s.median, s.p90)
        rows.append([name, *(f"{number:.1e}" for number in numbers), f"{errors.way:.3f}"])
    columns = ["update median", "update 90 %", "update 99 %", "update max"]
    columns += ["m median", "m 90 %", "s median", "s 90 %", "way median"]
    return Sheet(case.title, case.settings, columns, rows)


def overview(cases: Sequence[Case]) -> list[Sheet]:
    """Return one table for each eps: errors of the update, with a column for each case."""
    sheets = []
    for eps in dict.fromkeys(case.settings["eps"] for case in cases):
        own = [case for case in cases if case.settings["eps"] == eps]
        rows = [[name, *(_short(case.rows[name]) for case in own)] for name in own[0].rows]
        title = "relative error of the update: median / 90 % (median way)"
        sheets.append(Sheet(title, {"eps": eps}, [case.title for case in own], rows))
    return sheets


def _short(errors: Errors) -> str:
    return f"{errors.update.median:.2g} / {errors.update.p90:.2g} ({errors.way:.3f})"


def training_sheet(trained: Trained) -> Sheet:
    """Return the held-out losses of all modes and seeds."""
    rows = []
    for name, run in trained.modes.items():
        row = [name, *(f"{loss:.4f}" for loss in run.losses), f"{run.mean:.4f}"]
        row += [f"{run.range:.4f}", f"{run.deviation:.4f}"]
        baseline = trained.baseline(name)
        if baseline is None or baseline is run:
            row += ["-", "-"]
        else:
            apart = run.mean - baseline.mean
            row += [f"{apart:+.4f}", "yes" if abs(apart) <= baseline.range else "no"]
        rows.append(row)
    columns = [f"seed {seed}" for seed in trained.seeds]
    columns += ["mean", "max - min", "std", "mean - float32's", "within its max - min"]
    return Sheet("held-out loss, nats per byte", trained.settings, columns, rows)


@contextmanager
def _picture(path: Path, panels: int, columns: int) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = -(-panels // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(5 * columns, 3.6 * lines), squeeze=False, layout="constrained"
    )
    for panel in axes.flat[panels:]:
        panel.remove()
    yield axes.flat[:panels]
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def draw_accuracy(cases: Sequence[Case], path: Path) -> None:
    """Draw one panel for each case: medians, with what lies between them and 90 % of elements."""
    with _picture(path, len(cases), 3) as panels:
        for panel, case in zip(panels, cases, strict=True):
            for name, errors in case.rows.items():
                bins = [10.0 ** (exponent + 0.5) for exponent in errors.by_scale]
                median = [spread.median for spread in errors.by_scale.values()]
                most = [spread.p90 for spread in errors.by_scale.values()]
                dashes = ":" if name.startswith("control") else "-"
                (line,) = panel.plot(bins, median, dashes, marker=".", label=name)
                panel.fill_between(bins, median, most, alpha=0.12, color=line.get_color())
            panel.set(xscale="log", yscale="log", xlim=(1e-12, 1e3), ylim=(1e-7, 1e2))
            panel.set_title(f"{case.title}, eps {case.settings['eps']:g}", fontsize=10)
            panel.set_xlabel("size of the gradients of an element", fontsize=8)
            panel.set_ylabel("relative error of the update", fontsize=8)
        panels[0].legend(fontsize=6, loc="lower left")


def draw_training(trained: Trained, path: Path) -> None:
    """Draw held-out losses, and how far each mode is from float32 beside the range of its seeds."""
    dtypes = [dtype for dtype in ("float32", "bfloat16") if trained.of(dtype)]
    with _picture(path, 2 * len(dtypes), 2) as panels:
        for row, dtype in enumerate(dtypes):
            losses, apart = panels[2 * row : 2 * row + 2]
            modes = trained.of(dtype)
            baseline = next(iter(modes.values()))
            level = baseline.curve()
            low, high = baseline.band()
            for name, run in modes.items():
                losses.plot(trained.evaluated, run.curve(), label=name)
                differences = [a - b for a, b in zip(run.curve(), level, strict=True)]
                apart.plot(trained.evaluated, differences, label=name)
            apart.fill_between(
                trained.evaluated,
                [a - b for a, b in zip(low, level, strict=True)],
                [a - b for a, b in zip(high, level, strict=True)],
                color="grey",
                alpha=0.2,
                label="range of the first one's seeds",
            )
            losses.set(ylabel="held-out loss", title=f"{dtype} model, mean of seeds")
            apart.set(ylabel="difference of means to the first one")
            for panel in (losses, apart):
                panel.set_xlabel("step")
                panel.legend(fontsize=7)
