"""The compiled kernel, and numbers of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from belief_dist import kernels
from belief_dist.kernels.cpp import CppKernel


@pytest.fixture
def kernel() -> CppKernel:
    found = kernels._cpp()
    assert isinstance(found, CppKernel), f"tests need a C++ compiler: {found}"
    return found


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
