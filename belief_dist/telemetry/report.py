"""A page about a run, from its records: one file of HTML that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from belief_dist.checkpoint.atomic_file import atomic_file
from belief_dist.telemetry.drawings import parameters_of, pictures
from belief_dist.telemetry.events import Event, find_events
from belief_dist.telemetry.records import Records, parse_records

RECORDS = "metrics.jsonl"
PAGE = "report.html"
# Of each parameter in the last record: columns of the table, by their heads.
_OF_PARAMETERS = {
    "update / weight": "update_to_weight",
    "signal: 5 %": "belief/signal_p05",
    "median": "belief/signal_p50",
    "95 %": "belief/signal_p95",
    "surprise: 5 %": "belief/surprise_p05",
    "median ": "belief/surprise_p50",
    "95 % ": "belief/surprise_p95",
    "eps share": "belief/eps_share",
    "norm of weights": "l2_norm/param",
}

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1180px; padding: 0 1em;
       color: #222; background: #fff }
h1 { font-size: 1.4em; margin-bottom: 0.2em } h2 { font-size: 1.1em }
.plots { display: grid; gap: 1em;
         grid-template-columns: repeat(auto-fill, minmax(min(420px, 100%), 1fr)) }
figure { margin: 0 } svg { width: 100%; height: auto }
table { border-collapse: collapse } td, th { padding: 0.15em 1em 0.15em 0; text-align: left }
td + td { font-variant-numeric: tabular-nums } .quiet { color: #666 }
.numbers td + td, .numbers th + th { text-align: right } .scroll { overflow-x: auto }
tr + tr { border-top: 1px solid #eee } summary { cursor: pointer; margin: 0.6em 0 }
"""


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
            f"writes them; examples/train_gpt.py does with --monitor_every 10."
        )
    events = find_events(records, path.parent)
    page = out or path.parent / PAGE
    text = _page(path.parent.resolve().name, records.rows, events)
    with atomic_file(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return page, events


def _page(name: str, rows: Sequence[dict[str, Any]], events: Sequence[Event]) -> str:
    last = rows[-1]
    title = f"{name}: step {last['step']}"
    figures = "\n".join(f"<figure>{svg}</figure>" for svg in pictures(rows, events))
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
{_of_parameters(rows)}
<details><summary>The last record</summary>
{latest}
</details>
</body></html>
"""


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>\n" for a, b in rows)
    return f"<table>\n{cells}</table>" if cells else ""


def _of_parameters(rows: Sequence[dict[str, Any]]) -> str:
    """Return what the newest record with any tells of each parameter; the fastest ones first."""
    first = next(iter(_OF_PARAMETERS.values()))
    row = next((row for row in reversed(rows) if parameters_of([row], first)), None)
    if row is None:
        return ""
    columns = _OF_PARAMETERS.values()
    names = parameters_of([row], first)
    names.sort(key=lambda name: -(row.get(f"{first}/{name}") or 0.0))
    head = "".join(f"<th>{escape(each)}</th>" for each in ("parameter", *_OF_PARAMETERS))
    lines = []
    for name in names:
        values = (row.get(f"{column}/{name}") for column in columns)
        cells = ["-" if value is None else f"{value:.3g}" for value in values]
        lines.append("".join(f"<td>{escape(each)}</td>" for each in (name, *cells)))
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"""<h2>Parameters in step {row["step"]}, those that move most first</h2>
<div class="scroll"><table class="numbers"><tr>{head}</tr>
{body}
</table></div>"""


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
