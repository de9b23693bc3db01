"""Packages that the environment must not have, in folders of their own, installed once."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.cache import once

UNREACHABLE = re.compile(
    r"Failed to establish a new connection|Could not find a version|Temporary failure in name|"
    r"Read timed out|ProxyError|ConnectionError|No matching distribution"
)


def installed(requirement: str, *, alone: bool = False) -> Path:
    """Return a folder with a package, for PYTHONPATH; skip the test where it cannot be had.

    Args:
        requirement: Its name and exact version.
        alone: Without what it depends on.
    """

    def install(folder: Path) -> None:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--retries=1"]
        done = subprocess.run(
            [*pip, *["--no-deps"] * alone, f"--target={folder}", requirement],
            capture_output=True,
            text=True,
            timeout=300,
        )
        if done.returncode != 0 and UNREACHABLE.search(done.stderr):
            pytest.skip(f"{requirement} cannot be had: {done.stderr.strip()[-300:]}")
        assert done.returncode == 0, done.stderr

    return once(f"{requirement.replace('==', '-')}-{sys.implementation.cache_tag}", install)
