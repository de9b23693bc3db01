"""Commands about the files of a training: check, migrate, report."""

from __future__ import annotations

from pathlib import Path

from belief_dist.commands.output import print_json
from belief_dist.deepspeed_config import Report, check_config, read_config
from belief_dist.deepspeed_launcher_files import (
    FileReport,
    check_environment,
    check_hostfile,
    kind_of,
    read_lines,
)
from belief_dist.deepspeed_schema import schema
from belief_dist.migrate import migrate as migrate_file
from belief_dist.telemetry.report import write_report


def check(*, path: Path | None, as_schema: bool, hf: bool, accelerate: bool, as_json: bool) -> int:
    """Find mistakes in a configuration, and return 1 if there are any."""
    if as_schema:
        print_json(schema())
        return 0
    if path is None:
        raise ValueError("check needs a file, or --schema.")
    report: Report | FileReport
    kind = kind_of(path)
    if kind == "configuration":
        report = check_config(read_config(path), replaces_auto=hf or accelerate)
    else:
        check_lines = check_hostfile if kind == "hostfile" else check_environment
        report = check_lines(read_lines(path))
    if as_json:
        findings = [finding._asdict() for finding in report.findings]
        print_json({"findings": findings, "corrected": report.corrected})
        return 1 if report.findings else 0
    for finding in report.findings:
        print(f"{finding.path}: {finding.sentence}")
    if not report.findings:
        print(f"{path}: no mistakes were found")
    elif report.corrected != report.given:
        print(f"\n{report.diff()}", end="")
    return 1 if report.findings else 0


def migrate(*, path: Path, as_json: bool) -> int:
    """Show how a file takes AdaBelief, and return 1 if there is nothing to replace."""
    found = migrate_file(path)
    diff = found.diff()
    if as_json:
        print_json({"notes": [note._asdict() for note in found.notes], "diff": diff})
        return 0 if diff else 1
    for note in found.notes:
        place = f"{path}:{note.line}" if note.line else path
        print(f"{place}: {note.text}")
    if diff:
        print(f"\n{diff}", end="")
    else:
        print(f"{path}: no Adam, AdamW or adabelief-pytorch to replace")
    return 0 if diff else 1


def report(*, run: Path, out: Path | None, as_json: bool) -> int:
    """Draw what a run has logged, and tell where."""
    page, events = write_report(run, out)
    if as_json:
        print_json({"page": str(page), "events": [event._asdict() for event in events]})
    else:
        print(page)
    return 0
