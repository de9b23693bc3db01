"""What the constructor tells a DeepSpeed that is loaded; no engine needed."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from belief_dist import AdaBelief


class Own(AdaBelief):
    pass


@pytest.fixture
def deepspeed(monkeypatch) -> ModuleType:
    module, utils = ModuleType("deepspeed"), ModuleType("utils")
    module.__version__ = "0.19.8+local"
    module.supported = utils.ZERO_SUPPORTED_OPTIMIZERS = [torch.optim.Adam]
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.zero.utils", utils)
    return module


def build(cls: type) -> torch.optim.Optimizer:
    return cls([torch.nn.Parameter(torch.ones(2))])


def _configure_basic_optimizer(cls: type) -> torch.optim.Optimizer:
    """Build it in a function of the name that DeepSpeed's engine has for this."""
    return build(cls)


def test_a_class_and_its_subclass_count_as_tested_once(deepspeed):
    for cls in (AdaBelief, Own, AdaBelief):
        build(cls)
    assert deepspeed.supported == [torch.optim.Adam, AdaBelief, Own]


def test_an_old_engine_is_refused_and_an_old_bystander_is_not(deepspeed):
    deepspeed.__version__ = "0.9.5"
    build(AdaBelief)
    with pytest.raises(RuntimeError, match=r"needs DeepSpeed 0\.18 or newer .* this is 0\.9\.5"):
        _configure_basic_optimizer(AdaBelief)


@pytest.mark.parametrize("version", ["0.18.0", "1.0", "unknown"])
def test_other_engines_build(deepspeed, version):
    deepspeed.__version__ = version
    assert isinstance(_configure_basic_optimizer(Own), AdaBelief)
