"""Rows as JSON and as Markdown, with the machine that they come from."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.runner import ROOT, Ran, Row, text

# What some rows need besides torch: what they are for, by package.
OPTIONAL = {
    "deepspeed": "DeepSpeed's ZeRO and its FusedAdam",
    "flashoptim": "FlashAdamW",
    "torchao": "AdamW8bit",
    "bitsandbytes": "Adam8bit",
    "transformers": "the Trainer",
    "accelerate": "the Trainer",
    "lightning": "DeepSpeedStrategy",
}
_HIDDEN = ("table", "name", "status", "counts", "seconds", "note")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else None


def describe_machine(device: str, commit: str | None) -> dict[str, Any]:
    """Return what the figures depend on.

    Args:
        device: "cuda" or "cpu".
        commit: Of the repository, where git cannot tell it.
    """
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    about = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit or _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "card": platform.machine(),
        "driver": driver if device == "cuda" else None,
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "NCCL": None,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
    }
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        gib = card.total_memory / 2**30
        about["card"] = f"{card.name}, {card.multi_processor_count} SMs, {gib:.0f} GiB"
        about["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return about


def packages() -> dict[str, str | None]:
    """Return the version of each optional package, None where it is missing."""
    return {name: _version(name) for name in OPTIONAL}


def write(folder: Path, about: dict[str, Any], found: Sequence[Ran]) -> None:
    """Write gpu.json and gpu.md."""
    present = packages()
    content = {
        "machine": about,
        "packages": present,
        "sections": [
            {
                "name": ran.section.name,
                "seconds": round(ran.seconds, 1),
                "failed": ran.failed,
                "note": ran.note,
                "rows": ran.rows,
            }
            for ran in found
        ],
    }
    (folder / "gpu.json").write_text(json.dumps(content, indent=2) + "\n")
    (folder / "gpu.md").write_text(markdown(about, present, found))


def markdown(about: dict[str, Any], present: dict[str, str | None], found: Sequence[Ran]) -> str:
    """Return all tables, and the machine and packages before them."""
    parts = ["# On one GPU", _table(["", ""], [[key, text(value)] for key, value in about.items()])]
    rows = [[name, version or "missing", OPTIONAL[name]] for name, version in present.items()]
    parts += ["## Optional packages", _table(["package", "version", "for"], rows)]
    for ran in found:
        parts.append(f"## {ran.section.title}")
        parts += [ran.section.about] * bool(ran.section.about)
        for name in dict.fromkeys(row["table"] for row in ran.rows):
            rows = [row for row in ran.rows if row["table"] == name]
            parts.append(f"### {name}\n\n{table_of(rows)}")
        parts += [ran.note] * bool(ran.note)
        parts.append(f"{ran.seconds:.0f} s, imports included.")
    return "\n\n".join(parts) + "\n"


def table_of(rows: Sequence[Row]) -> str:
    """Return rows of one table; a column says what became of them unless all are well."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in _HIDDEN))
    outcome = any(row["status"] != "ok" or "note" in row for row in rows)
    lines = []
    for row in rows:
        cells = [text(row.get(key)) for key in columns]
        if outcome:
            note = row.get("note", "")
            cells.append(row["status"] + (f": {note}" if note else ""))
        lines.append([row["name"], *cells])
    return _table(["", *columns, *["outcome"] * outcome], lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return (
            "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
        )

    return "\n".join([line(head), "|---" * len(head) + "|", *map(line, rows)])
