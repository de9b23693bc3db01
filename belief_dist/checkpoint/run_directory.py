"""The run directory: every checkpoint in it is complete, or has a temporary name.

::

    run/latest                 the name of the newest checkpoint, replaced last
    run/step-00000200/         complete: renamed to this when all of it was on the disk
    run/.saving-step-00000300  being written, or left over from a killed process

All functions here are called by one rank only.
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


def directory_name(step: int) -> str:
    """Return the name of a step's checkpoint directory."""
    return f"step-{step:08d}"


def begin(run: Path, step: int) -> Path:
    """Return a new, empty directory to write to; leftovers of killed processes are removed."""
    run.mkdir(parents=True, exist_ok=True)
    for left in run.iterdir():
        if left.name.startswith((_SAVING, _REPLACED)) and left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
    temporary = run / f"{_SAVING}{directory_name(step)}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    return temporary


def publish(written: Path, step: int) -> Path:
    """Rename a written checkpoint to its final name, then point `latest` to it.

    An older checkpoint of this step is moved away just before, and removed at the end.
    """
    run = written.parent
    final = run / directory_name(step)
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
    """Keep the `keep` checkpoints that were completed last, and always the one `latest` names."""
    found = sorted(complete(run), key=lambda path: (path / MANIFEST).stat().st_mtime_ns)
    newest = latest(run)
    for path in found[: max(0, len(found) - keep)]:
        if path != newest:
            # Renamed first, so that a partly removed checkpoint never looks complete.
            removed = run / f"{_REPLACED}{path.name}-{uuid.uuid4().hex[:8]}"
            os.rename(path, removed)
            shutil.rmtree(removed, ignore_errors=True)


def complete(run: Path) -> Iterator[Path]:
    """Yield the complete checkpoints, in the order of their steps."""
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
    # Without a valid pointer (a process was killed before it wrote one), take the last step.
    found = list(complete(run))
    return found[-1] if found else None


def find(path: Path, step: int | None) -> Path:
    """Return the checkpoint to load: one of a run, or `path` itself if it is a checkpoint.

    Raises:
        ValueError: There is no such checkpoint.
    """
    if (path / MANIFEST).exists() and step is None:
        return path
    names = [found.name for found in complete(path)] if path.is_dir() else []
    if step is not None:
        name = directory_name(step)
        if name not in names:
            raise ValueError(f"{path} has no checkpoint of step {step}; it has {names}.")
        return path / name
    newest = latest(path) if path.is_dir() else None
    if newest is None:
        raise ValueError(f"there is no checkpoint in {path}.")
    return newest


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
