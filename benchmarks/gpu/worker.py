"""A process of one section: runs its cases and writes each row when it is there.

`python -m benchmarks.gpu.worker MODULE DEVICE SIZE FILE [NAME...]`; cases with these names are left
out. FILE gets JSON lines: {"begin": name} before a case, then its rows, at last {"end": true}.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.cases import SAME, SIZES, Case, describe, is_installed, rows_of

GPU_LOST = 70  # the exit code after an error that leaves CUDA unusable


def _write(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def run_case(case: Case) -> list[dict[str, Any]]:
    """Return the rows of a case, each with "table", "name" and "status"."""
    place = {"table": case.table, "name": case.name}
    missing = [name for name in case.packages if not is_installed(name)]
    if missing:
        note = f"{', '.join(missing)} not installed"
        return [{**place, "status": "missing", "note": note, "counts": False}]
    begin = time.perf_counter()
    rows: list[dict[str, Any]] = []
    try:
        for row in rows_of(case):
            status = "differs" if row.get(SAME) is False else row.pop("status", "ok")
            counts = case.counts or status == "differs"
            rows.append({**place, "status": status, "counts": counts, **row})
    except Exception as error:
        traceback.print_exc()
        note = describe(error)
        rows.append({**place, "status": "failed", "note": note, "counts": case.counts})
    rows[-1]["seconds"] = round(time.perf_counter() - begin, 2)
    return rows


def clean(device: str) -> None:
    """Free what the last case held; end the process if its error has left CUDA unusable."""
    gc.collect()
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(GPU_LOST)


def main(module: str, device: str, size: str, file: str, *done: str) -> None:
    path = Path(file)
    if device == "cpu":
        torch.set_num_threads(1)  # a rehearsal, beside other tests
    for case in importlib.import_module(module).cases(device, SIZES[size]):
        if case.name in done:
            continue
        _write(path, {"begin": case.name, "table": case.table, "counts": case.counts})
        for row in run_case(case):
            _write(path, row)
        clean(device)
    _write(path, {"end": True})
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of process groups may abort an orderly end


if __name__ == "__main__":
    main(*sys.argv[1:])
