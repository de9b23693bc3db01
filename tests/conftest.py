"""The lane and the order of tests, and one folder for what DeepSpeed compiles.

So each operation is built once for all tests. The folder is not the user's own: a build that was
killed leaves a lock there, for which the next one waits for ever.
"""

from __future__ import annotations

import os
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.harness import lanes

_EXTENSIONS = pytest.StashKey[TemporaryDirectory[str]]()


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # workers of pytest-xdist inherit the variable
        folder = TemporaryDirectory(prefix="belief_dist-extensions-")
        config.stash[_EXTENSIONS] = folder
        os.environ["TORCH_EXTENSIONS_DIR"] = folder.name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function):
            lanes.mark(item)
    items.sort(key=lanes.order)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Workers(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return lanes.worker(nodeid)

    return Workers(config, log)


def pytest_unconfigure(config: pytest.Config) -> None:
    folder = config.stash.get(_EXTENSIONS, None)
    if folder is not None:
        folder.cleanup()
