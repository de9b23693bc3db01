"""Checkpoints of a run as folders that are there as a whole, or not at all.

::

    run/latest                 the name of the newest, moved there last
    run/step-00000200/         complete: it got this name after all of it was on the disk
    run/.saving-step-00000300  being written, or left by a process that was killed

Everything here runs on one rank.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from belief_dist.checkpoint.checksummed_files import MANIFEST

LATEST = "latest"
_SAVING = ".saving-"
_REPLACED = ".replaced-"


def name_of(step: int) -> str:
    """Return the name of a step's folder."""
    return f"step-{step:08d}"


def begin(run: Path, step: int) -> Path:
    """Return a new, empty folder to write into; what killed processes have left is removed."""
    run.mkdir(parents=True, exist_ok=True)
    for left in run.iterdir():
        if left.name.startswith((_SAVING, _REPLACED)) and left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
    folder = run / f"{_SAVING}{name_of(step)}-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    return folder


def publish(written: Path, step: int) -> Path:
    """Give a written folder its name, and then move the pointer `latest` to it.

    A folder of this name is replaced; until then it is complete.
    """
    run = written.parent
    final = run / name_of(step)
    _sync(written)
    old = None
    if final.exists():
        old = run / f"{_REPLACED}{final.name}-{uuid.uuid4().hex[:8]}"
        os.rename(final, old)
    os.rename(written, final)
    _sync(run)
    pointer = run / f"{_SAVING}{LATEST}"
    with open(pointer, "w") as file:
        file.write(final.name + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(pointer, run / LATEST)
    _sync(run)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
    return final


def retain(run: Path, keep: int) -> None:
    """Remove all but the `keep` checkpoints that were completed last, and never the newest."""
    found = sorted(complete(run), key=lambda path: (path / MANIFEST).stat().st_mtime_ns)
    newest = latest(run)
    for path in found[: max(0, len(found) - keep)]:
        if path != newest:
            # Renamed first: what is half removed must not look complete.
            gone = run / f"{_REPLACED}{path.name}-{uuid.uuid4().hex[:8]}"
            os.rename(path, gone)
            shutil.rmtree(gone, ignore_errors=True)


def complete(run: Path) -> Iterator[Path]:
    """Yield the complete checkpoints, by step."""
    for path in sorted(run.glob("step-*")):
        if (path / MANIFEST).exists():
            yield path


def latest(run: Path) -> Path | None:
    """Return the newest complete checkpoint, or None if there is none."""
    try:
        path = run / (run / LATEST).read_text().strip()
        if path.parent == run and (path / MANIFEST).exists():
            return path
    except OSError:
        pass
    # A process was killed between giving a name and moving the pointer.
    found = list(complete(run))
    return found[-1] if found else None


def find(folder: Path, step: int | None) -> Path:
    """Return the checkpoint to load: of a run's folder, or the folder itself if it is one.

    Raises:
        ValueError: There is none.
    """
    if (folder / MANIFEST).exists() and step is None:
        return folder
    there = [path.name for path in complete(folder)] if folder.is_dir() else []
    if step is not None:
        path = folder / name_of(step)
        if path.name not in there:
            raise ValueError(f"{folder} has no checkpoint of step {step}; it has {there}.")
        return path
    found = latest(folder) if folder.is_dir() else None
    if found is None:
        raise ValueError(f"there is no checkpoint in {folder}.")
    return found


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
