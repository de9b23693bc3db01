"""What tests download or build, kept for later runs on this machine."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def once(name: str, make: Callable[[Path], object]) -> Path:
    """Return a file or folder of the cache, which `make` makes at a path if it is not there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "belief_dist-tests"
    cache.mkdir(parents=True, exist_ok=True)
    # Some programs tell by the ending what to make.
    path, part = cache / name, cache / f"part-{name}"
    with open(cache / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            # Of a run that was killed.
            if part.is_dir():
                shutil.rmtree(part)
            part.unlink(missing_ok=True)
            make(part)
            part.rename(path)
    return path
