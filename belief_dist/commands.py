"""What each command of `belief-dist` does, after `_belief_dist_cli` has read the command line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from _belief_dist_cli import fail
from belief_dist.bench import draw_bench, measure
from belief_dist.checkpoint import CheckpointError, verify
from belief_dist.checkpoint.checksummed_files import read_manifest
from belief_dist.checkpoint.formats import convert
from belief_dist.checkpoint.loading import read_metadata
from belief_dist.checkpoint.run_directory import find
from belief_dist.deepspeed_config import Report, check_config, read_config
from belief_dist.deepspeed_launcher_files import (
    FileReport,
    check_environment,
    check_hostfile,
    kind_of,
    read_lines,
)
from belief_dist.deepspeed_schema import schema
from belief_dist.doctor import examine_ranks
from belief_dist.memory_plan import (
    Row,
    plan,
    python_line,
    shapes_of,
    shapes_of_count,
    suggestion,
)
from belief_dist.migrate import migrate
from belief_dist.options import CLIPPING_NAMES, OPTION_NAMES, is_first_rank
from belief_dist.plan_picture import draw_plan
from belief_dist.telemetry.report import write_report


def run(args: argparse.Namespace) -> int:
    """Run the command `args.action`, and return its exit status: 0, 1, or 2 after an error."""
    try:
        status = ACTIONS[args.action](args)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough; Python would complain at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except (CheckpointError, ValueError, OSError) as error:
        return fail("belief-dist", str(error))
    except Exception as error:
        # Files of others can be wrong in more ways than are told apart.
        return fail(
            "belief-dist",
            f"{args.action} fails, because what it reads is damaged or of another kind: "
            f"{type(error).__name__}: {error}",
        )
    return status


def _doctor(args: argparse.Namespace) -> int:
    checks = examine_ranks()
    to_do = [each for each in checks if each.advice]
    if is_first_rank():
        if args.json:
            print(json.dumps([each._asdict() for each in checks], indent=2))
        else:
            _table(("what", "found"), [(each.topic, each.found) for each in checks])
            for each in to_do:
                print(f"{each.topic}: {each.advice}")
            if not to_do:
                print("All is well.")
    return 1 if to_do else 0


def _plan(args: argparse.Namespace) -> int:
    if args.ranks < 1:
        raise ValueError(f"--ranks must be 1 or more, got {args.ranks}.")
    if args.memory is not None and not args.memory > 0:
        raise ValueError(f"--memory must be more than 0 GiB, got {args.memory:g}.")
    if args.link is not None and not args.link > 0:
        raise ValueError(f"--link must be more than 0 GB/s, got {args.link:g}.")
    try:
        count = float(args.model)
    except ValueError:
        shapes = shapes_of(args.model)
    else:
        if not 1 <= count <= 1e15:
            raise ValueError(f"a model has 1 to 1e15 parameters, got {args.model}.")
        shapes = shapes_of_count(int(count))
    memory = None if args.memory is None else args.memory * 2**30
    keeps = None if args.averages is None else {"ema_decay": 0.999, "ema_dtype": args.averages}
    rows = plan(shapes, args.ranks, memory, keeps)
    best = suggestion(rows, memory)
    if args.picture is not None:
        draw_plan(args.picture, shapes, args.ranks, memory, keeps)
    link = None if args.link is None else args.link * 1e9
    if args.json:
        content = [
            {"way": row.way.name, "bytes": row.held, "bytes on the host": row.on_host}
            | {"bytes sent": row.sent}
            | ({} if link is None else {"seconds to send": row.sent / link})
            | ({} if memory is None else {"fits": row.held <= memory, "largest": row.largest})
            for row in rows
        ]
        print(json.dumps({"ways": content, "suggestion": best and python_line(best.way)}, indent=2))
        return int(best is None)
    columns: dict[str, Callable[[Row], str]] = {
        "way to train": lambda row: row.way.name,
        "GiB": lambda row: f"{row.held / 2**30:.2f}",
        "on host": lambda row: f"{row.on_host / 2**30:.2f}",
        "GB sent": lambda row: f"{row.sent / 1e9:.2f}",
    }
    if link is not None:
        columns["which takes"] = lambda row: f"{1e3 * row.sent / link:.0f} ms"
    if memory is not None:
        columns["fits"] = lambda row: "yes" if row.held <= memory else "no"
        columns["largest model"] = lambda row: f"{row.largest / 1e9:.3g}e9"
    _table(list(columns), [[show(row) for show in columns.values()] for row in rows])
    if best is None:
        print("None of ours fits: take more ranks, or AdaBelief under ZeRO-3 or FSDP2.")
        return 1
    print(f"The fastest of ours that fits:\n    {python_line(best.way)}")
    return 0


def _bench(args: argparse.Namespace) -> int:
    if not 1 <= args.elements <= 1e12:
        raise ValueError(f"--elements must be 1 to 1e12, got {args.elements:g}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = measure(int(args.elements), device)
    if args.picture is not None:
        draw_bench(args.picture, found)
    if args.json:
        updates = [each._asdict() for each in found.updates]
        print(json.dumps({**found._asdict(), "updates": updates}, indent=2))
        return 0
    print(f"{found.device}: memory is read and written at {found.memory / 1e9:.1f} GB/s")
    _table(
        ("update", "bytes", "ns", "of memory's speed"),
        [
            (each.form, f"{each.per_param:.1f}", f"{each.seconds * 1e9:.3f}", f"{each.share:.2f}")
            for each in found.updates
        ],
    )
    print("Bytes and ns are for each parameter that a rank owns.")
    return 0


def _check(args: argparse.Namespace) -> int:
    if args.schema:
        print(json.dumps(schema(), indent=2))
        return 0
    if args.path is None:
        raise ValueError("check needs a file, or --schema.")
    report: Report | FileReport
    kind = kind_of(args.path)
    if kind == "configuration":
        report = check_config(read_config(args.path), replaces_auto=args.hf or args.accelerate)
    else:
        check = check_hostfile if kind == "hostfile" else check_environment
        report = check(read_lines(args.path))
    if args.json:
        content = {
            "findings": [finding._asdict() for finding in report.findings],
            "corrected": report.corrected,
        }
        print(json.dumps(content, indent=2))
        return 1 if report.findings else 0
    for finding in report.findings:
        print(f"{finding.path}: {finding.sentence}")
    if not report.findings:
        print(f"{args.path}: nothing was found")
    elif report.corrected != report.given:
        print(f"\n{report.diff()}", end="")
    return 1 if report.findings else 0


def _migrate(args: argparse.Namespace) -> int:
    found = migrate(args.path)
    diff = found.diff()
    if args.json:
        content = {"notes": [note._asdict() for note in found.notes], "diff": diff}
        print(json.dumps(content, indent=2))
        return 0 if diff else 1
    for note in found.notes:
        place = f"{args.path}:{note.line}" if note.line else args.path
        print(f"{place}: {note.text}")
    if diff:
        print(f"\n{diff}", end="")
    else:
        print(f"{args.path}: no Adam, AdamW or adabelief-pytorch to replace")
    return 0 if diff else 1


def _report(args: argparse.Namespace) -> int:
    print(write_report(args.run, args.out))
    return 0


def _read(args: argparse.Namespace, path: Path, **more: Any) -> Any:
    return convert.read(
        path,
        weights=args.weights,
        names=_names(args.names) if args.names else None,
        options=_options(args.options),
        step=args.step,
        trust=args.trust,
        **more,
    )


def _names(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"--names needs a file with names, and {path} is no file.")
    try:
        return path.read_text().split()
    except UnicodeDecodeError:
        raise ValueError(f"--names needs a text file with names, which {path} is not.") from None


def _options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict):
        raise ValueError(
            f"--options must be a JSON object such as '{{\"rectify\": true}}', got {text!r:.80}."
        )
    unknown = sorted(options.keys() - {*OPTION_NAMES, *CLIPPING_NAMES})
    if unknown:
        raise ValueError(
            f"--options has no {unknown[0]!r:.80}; there are {', '.join(OPTION_NAMES)}."
        )
    return options


def _inspect(args: argparse.Namespace) -> int:
    path = find(args.path, args.step)
    step, checksums = read_manifest(path)
    dcp_metadata, metadata, extra = read_metadata(path)
    nbytes = sum(checksum.nbytes for checksum in checksums.values())
    print(f"{path}: step {step}, {len(checksums)} files, {nbytes / 1e6:.1f} MB")
    ranks = metadata.get("ranks", 1)
    print(f"saved by {ranks} {'rank' if ranks == 1 else 'ranks'}; extra: {sorted(extra)}")
    for number, group in enumerate(metadata.get("groups", [])):
        options = ", ".join(f"{key}={value}" for key, value in group["options"].items())
        print(f"param group {number}: {len(group['params'])} parameters, {options}")
    rows = []
    for key, entry in dcp_metadata.state_dict_metadata.items():
        size = getattr(entry, "size", None)
        if size is not None:
            properties = entry.properties  # type: ignore[union-attr]
            name = str(properties.dtype).removeprefix("torch.")
            rows.append((key, "x".join(map(str, size)) or "scalar", name))
    _table(("tensor", "shape", "dtype"), rows)
    return 0


def _verify(args: argparse.Namespace) -> int:
    path = verify(args.path, step=args.step)
    print(f"{path}: every file is as it was written")
    return 0


def _diff(args: argparse.Namespace) -> int:
    found = convert.differences(_read(args, args.source), _read(args, args.target))
    for sentence in found:
        print(sentence)
    if not found:
        print("no difference in any bit")
    return 1 if found else 0


def _convert(args: argparse.Namespace) -> int:
    full = _read(args, args.source, from_adam=args.from_adam, eps=args.eps)
    written = convert.write(
        full, args.target, args.to, template=args.template, averages=args.averages
    )
    print(f"{written}: {len(full.names)} optimized parameters, step {full.step}")
    return 0


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    plain = not sys.stdout.isatty()  # a pipe has no width, and its reader wants whole names
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        plain = True
    if plain:
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        for row in (head, *rows):
            padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print("  ".join(padded).rstrip())
        return
    table = Table(*head)
    for column, cells in zip(table.columns, zip(*rows, strict=True), strict=False):
        # Numbers stay whole; on a narrow terminal names and sentences take more lines.
        column.no_wrap = max(map(len, cells)) <= 12
    for row in rows:
        table.add_row(*row)
    Console().print(table)


ACTIONS: dict[str, Callable[[argparse.Namespace], int]] = {
    "inspect": _inspect,
    "verify": _verify,
    "diff": _diff,
    "convert": _convert,
    "doctor": _doctor,
    "plan": _plan,
    "bench": _bench,
    "check": _check,
    "migrate": _migrate,
    "report": _report,
}
