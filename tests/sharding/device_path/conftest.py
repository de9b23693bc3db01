"""All tests here take the CPU for a device that runs behind the host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from belief_dist.kernels import triton_kernel
from tests.harness.device_path import device_path

# numpy, which the interpreter computes with, warns of what special numbers do.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Programs without work cost the interpreter as much as a GPU's cost nothing.
    monkeypatch.setattr(triton_kernel, "CHUNK_TILES", 1)
    with device_path():
        yield
