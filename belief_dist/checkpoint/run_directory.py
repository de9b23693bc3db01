"""The run directory: every checkpoint in it is complete, or has a temporary name.

::

    run/latest                 the name of the newest checkpoint, replaced last
    run/step-00000200/         complete: renamed to this when all of it was on the disk
    run/.saving-step-00000300  being written, or left over from a killed process; beside it a file
                               NAME.lock, which is locked while somebody writes
    run/.replaced-step-...     the former checkpoint of a step that is saved again: complete, and
                               the one that counts until the new one has its name
    run/.removed-step-...      being removed

All functions here are called by one rank only.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from belief_dist.checkpoint.checksummed_files import MANIFEST, parse_manifest

LATEST = "latest"
_SAVING = ".saving-"
_REPLACED = ".replaced-"
_REMOVED = ".removed-"
_NAME = re.compile(r"(\.replaced-)?step-(?P<step>\d{8,})(?(1)-[0-9a-f]{8})")


def directory_name(step: int) -> str:
    """Return the name of a step's checkpoint directory."""
    return f"step-{step:08d}"


def begin(run: Path, step: int) -> Path:
    """Return a new, empty directory to write to; leftovers of killed processes are removed.

    What another process is writing at this moment, such as a second job that was started in the
    same folder by mistake, stays. `publish` or `give_up` must follow.
    """
    run.mkdir(parents=True, exist_ok=True)
    needed = set(complete(run))
    for left in run.iterdir():
        is_left = left.name.startswith((_SAVING, _REPLACED, _REMOVED))
        if is_left and left.is_dir() and left not in needed and not _is_written(left):
            shutil.rmtree(left, ignore_errors=True)
            _lock_of(left).unlink(missing_ok=True)
    temporary = run / f"{_SAVING}{directory_name(step)}-{uuid.uuid4().hex[:8]}"
    # Locked before there is a directory: nobody finds one without a lock.
    _locks[temporary] = file = _lock_of(temporary).open("w")
    with suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    temporary.mkdir()
    return temporary


def bytes_written(run: Path, step: int) -> int:
    """Return how much has been written of a step's checkpoint that is not complete, by all ranks.

    Unlike the rest, any rank may call it.
    """
    total = 0
    with suppress(OSError):  # it is renamed, or removed, at any moment
        for folder in run.glob(f"{_SAVING}{directory_name(step)}-*"):
            if folder.is_dir():
                total += sum(1 + file.stat().st_size for file in folder.iterdir())
    return total


def give_up(temporary: Path) -> None:
    """Remove what was written to a directory from `begin`."""
    shutil.rmtree(temporary, ignore_errors=True)
    _unlock(temporary)


# Of the directories that this process writes to. The system releases them when it dies.
_locks: dict[Path, TextIO] = {}


def _lock_of(temporary: Path) -> Path:
    return temporary.with_name(f"{temporary.name}.lock")


def _unlock(temporary: Path) -> None:
    file = _locks.pop(temporary, None)
    _lock_of(temporary).unlink(missing_ok=True)
    if file is not None:
        file.close()


def _is_written(temporary: Path) -> bool:
    """Return whether a living process, this one or another, writes there."""
    try:
        with _lock_of(temporary).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is no lock, or none can be taken on this file system
        return False
    return False


def publish(written: Path, step: int) -> Path:
    """Rename a written checkpoint to its final name, then point `latest` to it.

    An older checkpoint of this step is moved away just before, and removed at the end. If the
    process is killed in between, `complete` finds it under its other name.
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
    _unlock(written)
    pointer = run / f"{_SAVING}{LATEST}-{uuid.uuid4().hex[:8]}"
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
    """Keep the `keep` checkpoints that were saved last, and always the one `latest` names."""
    found = sorted(complete(run), key=_serial)
    newest = latest(run)
    for path in found[: max(0, len(found) - keep)]:
        if path != newest:
            # Renamed first, so that a partly removed checkpoint never looks complete.
            removed = run / f"{_REMOVED}{path.name}-{uuid.uuid4().hex[:8]}"
            os.rename(path, removed)
            shutil.rmtree(removed, ignore_errors=True)


def next_serial(run: Path) -> int:
    """Return the number of the next save: clocks that jump, and copies, do not change the order."""
    return 1 + max((_serial(path)[0] for path in complete(run)), default=0)


def _serial(path: Path) -> tuple[int, int]:
    """Return in which order a checkpoint was saved; before there were numbers, by its time."""
    manifest = path / MANIFEST
    try:
        number = parse_manifest(manifest.read_text()).get("serial", 0)
    except (OSError, ValueError, RecursionError):
        number = 0
    return (number if type(number) is int else 0), manifest.stat().st_mtime_ns


def complete(run: Path) -> Iterator[Path]:
    """Yield the complete checkpoints, in the order of their steps."""
    found: dict[int, Path] = {}
    for path in sorted(run.iterdir()) if run.is_dir() else ():
        # A replaced one has a name of its own only until its successor has the right one.
        step = _NAME.fullmatch(path.name)
        if step is not None and (path / MANIFEST).exists():
            number = int(step["step"])
            if number not in found or not path.name.startswith("."):
                found[number] = path
    for _, path in sorted(found.items()):
        yield path


def latest(run: Path) -> Path | None:
    """Return the newest complete checkpoint, or None if there is none."""
    by_step = {_step(path): path for path in complete(run)}
    try:
        named = _NAME.fullmatch((run / LATEST).read_text().strip())
        if named is not None and int(named["step"]) in by_step:
            return by_step[int(named["step"])]
    except (OSError, UnicodeDecodeError):
        pass
    # Without a valid pointer (a process was killed before it wrote one), take the last step.
    return by_step[max(by_step)] if by_step else None


def find(path: Path, step: int | None) -> Path:
    """Return the checkpoint to load: one of a run, or `path` itself if it is a checkpoint.

    Raises:
        ValueError: There is no such checkpoint.
    """
    if (path / MANIFEST).exists() and step is None:
        return path
    known = {_step(found): found for found in complete(path)}
    if step is not None:
        if step not in known:
            raise ValueError(f"{path} has no checkpoint of step {step}; it has {list(known)}.")
        return known[step]
    newest = latest(path) if path.is_dir() else None
    if newest is None:
        folders = sorted(each for each in path.iterdir() if each.is_dir()) if path.is_dir() else []
        inside = [each for each in folders if latest(each) is not None]
        hint = f" itself; there is one in {inside[-1]}" if inside else ""
        raise ValueError(f"there is no checkpoint in {path}{hint}.")
    return newest


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match["step"])


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
