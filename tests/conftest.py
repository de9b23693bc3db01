"""One folder for what DeepSpeed compiles, so that each operation is built once for all tests.

Not the user's own: a build that was killed leaves a lock there, for which the next one waits for
ever.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from tempfile import TemporaryDirectory

import pytest


@pytest.fixture(scope="session", autouse=True)
def torch_extensions() -> Iterator[None]:
    with TemporaryDirectory(prefix="belief_dist-extensions-") as folder:
        os.environ["TORCH_EXTENSIONS_DIR"] = folder
        yield
