"""What the constructor tells a DeepSpeed that is loaded, or will be; no engine needed."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch

from belief_dist import AdaBelief
from belief_dist.deepspeed import import_hook


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


def test_a_deepspeed_that_comes_later_is_told(tmp_path, monkeypatch, caplog):
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(import_hook, "_finders", {})
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[:])
    monkeypatch.syspath_prepend(tmp_path)
    zero = tmp_path / "deepspeed" / "runtime" / "zero"
    zero.mkdir(parents=True)
    (zero / "utils.py").write_text("ZERO_SUPPORTED_OPTIMIZERS = []\n")
    (tmp_path / "deepspeed" / "__init__.py").write_text(
        "__version__ = '0.19.8'\nfrom .runtime.zero import utils\n"
    )
    (tmp_path / "deepspeed" / "runtime" / "engine.py").write_text(
        "class DeepSpeedEngine:\n    def load_checkpoint(self): pass\n"
    )
    for cls in (AdaBelief, Own, AdaBelief):
        build(cls)
    assert "deepspeed" not in sys.modules
    later = importlib.import_module("deepspeed")
    assert later.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS == [AdaBelief, Own]
    engine = importlib.import_module("deepspeed.runtime.engine").DeepSpeedEngine
    assert engine.load_checkpoint.belief_dist_wrappers
    # What this one lacks is said, and no error.
    assert (
        "DeepSpeed 0.19.8 has no runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3" in caplog.text
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        del sys.modules[name]


@pytest.mark.parametrize("version", ["0.18.0", "1.0", "unknown"])
def test_other_engines_build(deepspeed, version):
    deepspeed.__version__ = version
    assert isinstance(_configure_basic_optimizer(Own), AdaBelief)
