"""Runs every section in a process of its own, within limits, and collects its rows.

A case that raises is a row. One that ends its process, or writes nothing for too long, is a row
too, and a new process goes on behind it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.worker import GPU_LOST

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]
_POLL = 0.1  # seconds
_START = 60.0  # seconds that imports may take
_LOG_BYTES = 2000  # of a process that died, in its row
_MOST_STARTS = 8  # of one section
_LEAST = 10.0  # seconds, without which a section is not begun


class Section(NamedTuple):
    """Some cases.

    Attributes:
        module: Has `cases(device, size)`.
        title: Its heading.
        seconds: That all of it may take.
        case_seconds: That a case may take.
        about: What its tables mean, in a sentence or two.
    """

    name: str
    title: str
    module: str
    seconds: float
    case_seconds: float
    about: str = ""


class Ran(NamedTuple):
    """What came of a section."""

    section: Section
    rows: list[Row]
    seconds: float
    note: str = ""

    @property
    def failed(self) -> bool:
        bad = ("differs", "failed")
        return any(row["status"] in bad and row["counts"] for row in self.rows)


def run_section(
    section: Section,
    device: str,
    size: str,
    folder: Path,
    seconds: float,
    tell: Callable[[Row], None],
) -> Ran:
    """Run a section for at most `seconds`, and tell each row as it comes.

    Args:
        section: To run.
        device: "cuda" or "cpu".
        size: A key of `cases.SIZES`.
        folder: Where its process writes rows and output.
        seconds: That are left for it.
        tell: Called with each row.
    """
    begin = time.monotonic()
    until = begin + min(seconds, section.seconds)
    rows: list[Row] = []
    done: list[str] = []
    note = ""
    for start in range(_MOST_STARTS):
        log = folder / f"{section.name}.{start}.log"
        lines, reason = _run_worker(section, device, size, log, done, until, tell)
        rows += [line for line in lines if "status" in line]
        if reason is None:
            break
        begun = [line for line in lines if "begin" in line]
        done += [line["begin"] for line in begun]
        words = ": ".join(filter(None, [reason, _last_words(log)]))
        # A case without a row is the one that has ended the process.
        last = lines[-1] if lines else {"begin": section.name, "table": section.title}
        if "begin" in last:
            rows.append(_failed(last["table"], last["begin"], words, last.get("counts", True)))
            tell(rows[-1])
        if time.monotonic() >= until:
            note = "The section ran out of time; what follows the last row was not run."
            break
        if not begun:  # another start would end in the same way
            break
    return Ran(section, rows, time.monotonic() - begin, note)


def _failed(table: str, name: str, note: str, counts: bool = True) -> Row:
    return {"table": table, "name": name, "status": "failed", "note": note, "counts": counts}


def _run_worker(
    section: Section,
    device: str,
    size: str,
    log: Path,
    done: Sequence[str],
    until: float,
    tell: Callable[[Row], None],
) -> tuple[list[Row], str | None]:
    """Return what a process wrote, and why it has not come to its end."""
    file = log.with_suffix(".jsonl")
    file.write_text("")
    command = [sys.executable, "-m", "benchmarks.gpu.worker", section.module, device, size, file]
    lines: list[Row] = []
    with log.open("w") as output:
        process = subprocess.Popen(
            [*map(str, command), *done],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        reason = "ended early"
        changed = time.monotonic()
        try:
            while True:
                code = process.poll()  # before reading: nothing is written after it
                fresh = _read(file)[len(lines) :]
                lines += fresh
                for line in fresh:
                    changed = time.monotonic()
                    if "status" in line:
                        tell(line)
                if code is not None:
                    break
                now = time.monotonic()
                patience = section.case_seconds if lines else max(_START, section.case_seconds)
                if now > until or now > changed + patience:
                    reason = "ran out of time"
                    break
                time.sleep(_POLL)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and the ranks that it has started
            process.wait()
    if lines and "end" in lines[-1]:
        return lines, None
    return lines, _reason(code) if code is not None else reason


def _read(file: Path) -> list[Row]:
    text = file.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _reason(code: int) -> str:
    if code == GPU_LOST:
        return "CUDA was unusable afterwards"
    if code < 0:
        return f"died by {signal.Signals(-code).name}"
    return f"ended with code {code}"


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace")[-_LOG_BYTES:].strip().splitlines()
    return lines[-1][:300] if lines else ""


def run_sections(
    sections: Sequence[Section],
    device: str,
    size: str,
    folder: Path,
    seconds: float,
    tell: Callable[[str], None],
    save: Callable[[list[Ran]], None],
) -> list[Ran]:
    """Run sections one after the other within `seconds`; `save` what is there after each.

    A section that no time is left for has no rows, and a note.
    """
    until = time.monotonic() + seconds
    found: list[Ran] = []
    for section in sections:
        left = until - time.monotonic()
        if left < _LEAST:
            found.append(Ran(section, [], 0.0, "Not run: no time was left."))
        else:
            tell(f"\n{section.title}")
            ran = run_section(
                section, device, size, folder, left, lambda row: tell("  " + one_line(row))
            )
            found.append(ran)
        save(found)
    return found


def one_line(row: Row) -> str:
    hidden = ("table", "name", "status", "counts", "seconds")
    figures = [f"{key} {text(value)}" for key, value in row.items() if key not in hidden]
    return f"{row['status']:7} {row['name']}: {', '.join(figures)}"


def text(value: Any) -> str:
    """Return a figure as tables show it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
