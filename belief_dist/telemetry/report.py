"""A page about a run, from its records: one file of HTML that needs nothing else."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from belief_dist.checkpoint.atomic_file import atomic_file
from belief_dist.telemetry.records import Records, parse_records

RECORDS = "metrics.jsonl"
PAGE = "report.html"
_CHECKPOINT = re.compile(r"step-(\d{8,})")

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1180px; padding: 0 1em;
       color: #222; background: #fff }
h1 { font-size: 1.4em; margin-bottom: 0.2em } h2 { font-size: 1.1em }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); gap: 1em }
figure { margin: 0 } svg { width: 100%; height: auto }
table { border-collapse: collapse } td, th { padding: 0.15em 1em 0.15em 0; text-align: left }
td:last-child { font-variant-numeric: tabular-nums } .quiet { color: #666 }
"""


class Plot(NamedTuple):
    """One picture: some of the columns of the records, over the steps."""

    title: str
    columns: str  # a pattern that their whole names have; the last part of a name is its label
    is_log: bool = False
    is_share: bool = False  # from 0 to 1


_GROUP = r"/group\d+"
PLOTS = (
    Plot("Loss", r".*loss"),
    Plot("Learning rate", rf"lr{_GROUP}"),
    Plot("Norm of the gradient, before clipping", r"l2_norm/grad/global", True),
    Plot("Update to weight: RMS of a step over that of weights", f"update_to_weight{_GROUP}", True),
    Plot("Signal: mean of |m| / sqrt(s)", rf"belief/signal{_GROUP}"),
    Plot("Surprise: mean of (g - m)² / s", rf"belief/surprise{_GROUP}"),
    Plot("Share of weights where eps dominates s", rf"belief/eps_share{_GROUP}", is_share=True),
    Plot("Seconds per step", r"time/seconds_per_step"),
)


class Event(NamedTuple):
    """Something that happened at a step."""

    step: int
    kind: str  # "skip", "loss", "restart" or "checkpoint"
    what: str


def write_report(run: Path, out: Path | None = None) -> tuple[Path, list[Event]]:
    """Draw the records of a run, which may still go on; return the page, and what has happened.

    Args:
        run: The folder of the run, whose metrics.jsonl is read, or a file of records.
        out: The page; without it report.html beside the records.

    Raises:
        ValueError: There are no records, or matplotlib is missing.
        OSError: They cannot be read, or the page cannot be written.
    """
    path = run if run.is_file() else run / RECORDS
    records = parse_records(path) if path.is_file() else Records([], [])
    if not records.rows:
        if run.is_file():
            raise ValueError(f"{run} has no records, as StepMonitor writes them.")
        raise ValueError(
            f"{run} has no records to report: StepMonitor(optimizer, {str(run / RECORDS)!r}) "
            f"writes them."
        )
    events = find_events(records, path.parent)
    page = out or path.parent / PAGE
    text = _page(path.parent.resolve().name, records.rows, events)
    with atomic_file(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return page, events


def find_events(records: Records, folder: Path) -> list[Event]:
    """Return what happened in a run, by step: skipped steps, losses, restarts, checkpoints.

    Args:
        records: Of the run.
        folder: Where its checkpoints are.
    """
    events = []
    before = 0
    for row in records.rows:
        skipped = row.get("skipped_steps", before)
        if isinstance(skipped, int) and skipped > before:
            why = f": {row['why_skipped']}" if row.get("why_skipped") else ""
            what = f"{skipped - before} steps skipped since the record before{why}"
            events.append(Event(row["step"], "skip", what))
        before = skipped if isinstance(skipped, int) else before
        if "loss" in row and row["loss"] is None:
            events.append(Event(row["step"], "loss", "the loss is not finite"))
    events += [
        Event(step, "restart", "continued from an earlier step: this is its first record")
        for step in records.restarts
    ]
    for path in folder.iterdir():
        match = _CHECKPOINT.fullmatch(path.name)
        if match and path.is_dir():
            events.append(Event(int(match[1]), "checkpoint", f"checkpoint {path.name}"))
    return sorted(events)


def _page(name: str, rows: Sequence[dict[str, Any]], events: Sequence[Event]) -> str:
    last = rows[-1]
    title = f"{name}: step {last['step']}"
    pictures = [svg for plot in PLOTS if (svg := _draw(plot, rows, events))]
    figures = "\n".join(f"<figure>{svg}</figure>" for svg in pictures)
    happened = _table([(str(event.step), event.what) for event in events])
    latest = _table([(key, _shown(value)) for key, value in last.items()])
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<style>{_STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p class="quiet">{len(rows)} records, of steps {rows[0]["step"]} to {last["step"]}; drawn at
{datetime.now():%Y-%m-%d %H:%M:%S}. Dotted lines are checkpoints, red ones are skipped steps.</p>
<div class="plots">
{figures}
</div>
<h2>Events</h2>
{happened or "<p>None.</p>"}
<details><summary>The last record</summary>
{latest}
</details>
</body></html>
"""


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>\n" for a, b in rows)
    return f"<table>\n{cells}</table>" if cells else ""


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _draw(plot: Plot, rows: Sequence[dict[str, Any]], events: Sequence[Event]) -> str:
    """Return a picture as SVG; nothing if no record has such a column."""
    pattern = re.compile(plot.columns)
    columns = sorted({key for row in rows for key in row if pattern.fullmatch(key)})
    lines = [(column, *_points(column, rows)) for column in columns]
    lines = [line for line in lines if line[1]]
    if not lines:
        return ""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "a report needs matplotlib, which is not installed: pip install 'belief-dist[report]'."
        ) from None
    # Text stays text, in the reader's font, and ids of one picture are not those of another.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": plot.title}):
        figure = Figure(figsize=(6.2, 3.3), layout="constrained")
        axes = figure.add_subplot()
        marker = "o" if len(rows) == 1 else None
        for column, steps, values in lines:
            axes.plot(steps, values, marker=marker, lw=1.1, label=column.rpartition("/")[2])
        for event in events:
            if event.kind == "checkpoint":
                axes.axvline(event.step, ls=":", lw=0.8, c="grey")
            elif event.kind == "skip":
                axes.axvline(event.step, lw=0.8, c="tab:red", alpha=0.5)
        if plot.is_log and not any(value <= 0 for _, _, values in lines for value in values):
            axes.set_yscale("log")
        if plot.is_share:
            axes.set_ylim(-0.03, 1.03)
        axes.set_title(plot.title, fontsize=10, loc="left")
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        if len(lines) > 1:
            axes.legend(fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg")
    # Without the head of an XML file, and who made it when.
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    return text[text.index("<svg") :]


def _points(column: str, rows: Sequence[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """Return the steps and values of a column, with gaps where numbers are not finite."""
    steps, values = [], []
    for row in rows:
        value = row.get(column, "")
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            steps.append(row["step"])
            values.append(math.nan if value is None else float(value))
    return (steps, values) if any(map(math.isfinite, values)) else ([], [])
