"""Records of a run: a line of JSON for each logged step, which a kill tears at worst at its end."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class JsonLines:
    """A sink that appends a line of JSON for each record, at once and in one write.

    A record that was written survives the end of the process, however it comes; one that was being
    written may be half there, and `read_records` leaves it out. Numbers that are not finite become
    null, as JSON has none. The file and its folder are made by the first record.

    Args:
        path: Of the file, whose name best ends in .jsonl. One that is there is continued.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """See the class."""
        self.path = Path(path)
        self._descriptor: int | None = None

    def __call__(self, step: int, values: Mapping[str, Any]) -> None:
        """Append the record of a step.

        Args:
            step: Its number.
            values: Numbers and texts by name.

        Raises:
            OSError: It cannot be written.
        """
        record = {"step": step, **{key: _plain(value) for key, value in values.items()}}
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        if self._descriptor is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            size = os.fstat(self._descriptor).st_size
            if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line  # a killed process has left half a line
        while line:
            line = line[os.write(self._descriptor, line) :]

    def close(self) -> None:
        """Close the file; another record opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        """Close the file."""
        self.close()


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Records(NamedTuple):
    """What a file of records tells."""

    rows: list[dict[str, Any]]  # in the order of their steps, which are all different
    restarts: list[int]  # steps with which a run went on from an older state than it had reached


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the records of a file in the order of their steps, also while it is being written.

    Lines that are torn or something else are left out. Where steps go back, the run was continued
    from a checkpoint: what it had written of steps from there on is left out, too.

    Raises:
        OSError: The file cannot be read.
    """
    return parse_records(path).rows


def parse_records(path: str | os.PathLike[str]) -> Records:
    """Do as `read_records`, and also tell where a run was continued.

    Raises:
        OSError: The file cannot be read.
    """
    rows: list[dict[str, Any]] = []
    restarts: list[int] = []
    for line in Path(path).read_bytes().splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        step = row.get("step") if isinstance(row, dict) else None
        if not isinstance(step, int) or isinstance(step, bool):
            continue
        if rows and step <= rows[-1]["step"]:
            restarts.append(step)
            while rows and step <= rows[-1]["step"]:
                rows.pop()
        rows.append(row)
    return Records(rows, restarts)
