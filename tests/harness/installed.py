"""Packages that the environment must not have, in folders of their own, installed once."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNREACHABLE = re.compile(
    r"Failed to establish a new connection|Could not find a version|Temporary failure in name|"
    r"Read timed out|ProxyError|ConnectionError|No matching distribution"
)


def installed(*requirements: str, alone: bool = False) -> Path:
    """Return a folder with these packages, for PYTHONPATH; skip the test where there are none.

    Args:
        requirements: Names with exact versions.
        alone: Without what they depend on.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "belief_dist-tests"
    name = "-".join(each.replace("==", "-") for each in requirements)
    folder = cache / f"{name}-{sys.implementation.cache_tag}"
    cache.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            shutil.rmtree(f"{folder}.part", ignore_errors=True)  # of a run that was killed
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile"]
            done = subprocess.run(
                [
                    *pip,
                    *["--no-deps"] * alone,
                    "--retries=1",
                    f"--target={folder}.part",
                    *requirements,
                ],
                capture_output=True,
                text=True,
                timeout=300,
            )
            if done.returncode != 0 and UNREACHABLE.search(done.stderr):
                pytest.skip(f"{name} cannot be had: {done.stderr.strip()[-300:]}")
            assert done.returncode == 0, done.stderr
            Path(f"{folder}.part").rename(folder)
    return folder
