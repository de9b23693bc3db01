"""A file that is complete or not there: written beside its place, and renamed to it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from belief_dist.checkpoint.safe_reader import check_regular


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield where to write; afterwards it takes the place of `path`, if nothing was raised.

    Raises:
        ValueError: `path` is a link, folder, pipe or device, which would be replaced, or its folder
            is missing.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {path.parent}.")
    if os.path.lexists(path):
        check_regular(path)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
