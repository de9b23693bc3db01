"""One process of a job: its place among the others, its device, and the folder of the run."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from belief_dist.distributed import init

# A file of this name in the folder of a run ends the run, saved, after the step under way.
STOP = "stop"


@contextmanager
def process_group(timeout: timedelta) -> Iterator[torch.device]:
    """Join the ranks of any launcher; without one be the only rank.

    Args:
        timeout: After which a missing rank ends the job.

    Yields:
        The device of this rank.
    """
    device = init(timeout=timeout).device
    try:
        yield device
        dist.barrier()  # nobody leaves while another still talks to it
    finally:
        dist.destroy_process_group()


def run_folder(out: Path | None, resume: Path | None, fixed: Path | None) -> Path:
    """Return the folder of this run, the same on all ranks.

    Args:
        out: To start in; None is a new folder under runs/.
        resume: Whose run continues.
        fixed: Where the run starts, or continues if it has a checkpoint.

    Raises:
        ValueError: There is no run to resume, or another one is in the way.
    """
    found: list[Path | ValueError | None] = [None]
    if dist.get_rank() == 0:
        try:
            found = [_run_folder(out, resume, fixed)]
        except ValueError as error:
            found = [error]
    dist.broadcast_object_list(found)
    if isinstance(found[0], ValueError):
        raise found[0]
    assert found[0] is not None
    return found[0]


def _run_folder(out: Path | None, resume: Path | None, fixed: Path | None) -> Path:
    if fixed is not None:
        fixed.mkdir(parents=True, exist_ok=True)
        (fixed / STOP).unlink(missing_ok=True)
        return fixed.resolve()
    if resume is not None:
        if last_checkpoint(resume) is None:
            raise ValueError(f"there is no checkpoint under {resume}; resume needs a run's folder.")
        return resume.resolve()
    folder = out or Path("runs", f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty: continue it by --resume, or choose another --out."
        )
    return folder.resolve()


def with_stored_settings(arguments: list[str]) -> list[str]:
    """Return the arguments of a job, with the settings of the run that it resumes, if it does.

    They count more than configuration files, and less than settings that are given one by one.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--config", action="append", default=[])
    known, rest = parser.parse_known_args(arguments)
    folder = None if known.resume is None else last_checkpoint(known.resume)
    if folder is None:
        return arguments
    progress = json.loads((folder / "progress.json").read_text())
    files = [*known.config, json.dumps(progress["settings"])]
    configs = [part for file in files for part in ("--config", file)]
    return [*configs, *rest, "--resume", str(known.resume)]


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run; only complete ones bear this name."""
    return max(folder.glob("step-????????"), default=None)


def write_checkpoint(run: Path, step: int, write: Callable[[Path], None]) -> None:
    """Let all ranks write into one new folder, which gets its name when it is complete.

    A job that dies on the way leaves the previous checkpoint, which is removed last.
    """
    final = run / f"step-{step:08d}"
    temporary = final.with_suffix(".incomplete")
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    dist.barrier()
    write(temporary)
    for file in temporary.rglob("*"):
        if file.is_file():
            _sync(file)
    dist.barrier()
    if first:
        previous = last_checkpoint(run)
        os.replace(temporary, final)
        _sync(run)
        if previous is not None:
            shutil.rmtree(previous)


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
