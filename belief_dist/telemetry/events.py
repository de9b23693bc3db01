"""What happened in a run, by step: from its records, and from the checkpoints beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from belief_dist.telemetry.records import Records

_CHECKPOINT = re.compile(r"step-(\d{8,})")
# Steps that were not taken: for a spike, to make copies equal again, or else.
SKIPS = ("spike", "repair", "skip")


class Event(NamedTuple):
    """Something that happened at a step."""

    step: int
    kind: str  # one of SKIPS, "loss", "restart" or "checkpoint"
    what: str


def find_events(records: Records, folder: Path) -> list[Event]:
    """Return what happened in a run, by step: skipped steps, losses, restarts, checkpoints.

    Args:
        records: Of the run.
        folder: Where its checkpoints are.
    """
    events = list(_skips(records))
    for row in records.rows:
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


def _skips(records: Records) -> Iterator[Event]:
    before = 0
    for row in records.rows:
        skipped = row.get("skipped_steps", before)
        if not isinstance(skipped, int):
            continue
        skips = row.get("skips")
        told = [each for each in skips if _is_told(each)] if isinstance(skips, list) else []
        for each in told:
            kind = each["kind"] if each["kind"] in SKIPS else "skip"
            yield Event(each["step"], kind, f"step skipped: {each['why']}")
        rest = skipped - before - len(told)  # of a run without a monitor, or a sink without them
        if rest > 0:
            why = f": {row['why_skipped']}" if row.get("why_skipped") else ""
            what = f"{rest} steps skipped since the record before{why}"
            yield Event(row["step"], "skip", what)
        before = skipped


def _is_told(each: Any) -> bool:
    kinds = {"step": int, "kind": str, "why": str}
    return isinstance(each, dict) and all(isinstance(each.get(k), t) for k, t in kinds.items())
