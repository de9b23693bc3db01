"""Data that Debian packages: fetched by name with apt-get, unpacked, never installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path


def cache() -> Path:
    """Return where packages are unpacked."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "belief_dist" / "evidence"


def file_of(package: str, path: str, purpose: str) -> Path:
    """Return a file of a package, which is fetched where it is not installed.

    Args:
        package: Its name.
        path: Of the file, without the first slash.
        purpose: What the file is, for the message.

    Raises:
        FileNotFoundError: There is no such file, and it cannot be fetched.
    """
    for root in (Path("/"), cache()):
        if (root / path).exists():
            return root / path
    advice = (
        f"{purpose} is missing. On Debian or Ubuntu `apt-get install {package}` brings it; "
        f"elsewhere unpack that package below {cache()}, so that {cache() / path} exists."
    )
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise FileNotFoundError(advice)
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as folder:
        for command in (["apt-get", "-q", "download", package], ["dpkg-deb", "-x"]):
            files = [str(file) for file in Path(folder).glob("*.deb")]
            unpacking = [*files, str(cache())] if files else []
            done = subprocess.run(
                [*command, *unpacking], cwd=folder, capture_output=True, text=True
            )
            if done.returncode:
                raise FileNotFoundError(f"{advice} apt said: {done.stderr.strip()[-300:]}")
    if not (cache() / path).exists():
        raise FileNotFoundError(advice)
    return cache() / path
