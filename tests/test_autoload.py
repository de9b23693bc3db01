"""`torch.optim.AdaBelief` resolves without an import, and nothing else about torch changes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import _belief_dist_autoload
import belief_dist

LOOKUP = "print(getattr(torch.optim, 'AdaBelief', None))"
CLASS = "<class 'belief_dist.optimizer.AdaBelief'>"


def run(code: str, **environment: str) -> str:
    """Run code in a new interpreter, which sees the package as it is installed."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_torch_is_enough():
    assert run(f"import torch; {LOOKUP}") == CLASS


def test_importing_torch_does_not_import_the_package():
    assert run("import sys, torch; print('belief_dist' in sys.modules)") == "False"


def test_the_autoload_module_itself_imports_neither():
    code = "import sys, _belief_dist_autoload; print({'torch', 'belief_dist'} & set(sys.modules))"
    assert run(code) == "set()"


def test_package_before_torch():
    assert run(f"import belief_dist, torch; {LOOKUP}") == CLASS


def test_without_autoload_an_import_of_the_package_is_needed():
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    assert run(f"import torch; {LOOKUP}", **off) == "None"
    assert run(f"import torch, belief_dist; {LOOKUP}", **off) == CLASS


@pytest.mark.parametrize("name", ["AdaBelief", "adabelief", "ADABELIEF", "Adabelief"])
def test_any_letter_case(name):
    assert getattr(torch.optim, name) is belief_dist.AdaBelief
    assert getattr(torch.optim, f"sharded{name}") is belief_dist.ShardedAdaBelief


def test_torch_optim_before_the_package_and_a_child_process_know_the_name():
    code = """
import multiprocessing
def show(): print(getattr(__import__("torch").optim, "shardedADABELIEF"))
if __name__ == "__main__":
    from torch.optim import AdaBelief
    import belief_dist
    assert AdaBelief is belief_dist.AdaBelief
    process = multiprocessing.get_context("fork").Process(target=show)
    process.start()
    process.join()
"""
    assert run(code) == "<class 'belief_dist.sharded.ShardedAdaBelief'>"


@pytest.mark.parametrize("name", ["ShardedAdaBelief", "shardedadabelief"])
def test_the_sharded_optimizer_has_a_name_too(name):
    assert getattr(torch.optim, name) is belief_dist.ShardedAdaBelief


@pytest.mark.parametrize("name", ["AdaBelif", "adabelief2", "__wrapped__"])
def test_unknown_names_stay_unknown(name):
    with pytest.raises(AttributeError, match=f"module 'torch.optim' has no attribute '{name}'"):
        getattr(torch.optim, name)


def test_registering_again_changes_nothing():
    before = torch.optim.__getattr__
    _belief_dist_autoload.register()
    assert torch.optim.__getattr__ is before


def test_an_earlier_getattr_keeps_answering():
    namespace = {"__getattr__": lambda name: f"earlier {name}"}
    _belief_dist_autoload._install(namespace)
    assert namespace["__getattr__"]("other") == "earlier other"
    assert namespace["__getattr__"]("adabelief") is belief_dist.AdaBelief


def test_an_adabelief_of_torch_itself_wins():
    namespace = {"AdaBelief": torch.optim.AdamW}
    _belief_dist_autoload._install(namespace)
    assert namespace["AdaBelief"] is torch.optim.AdamW
    assert namespace["__getattr__"]("adabelief") is torch.optim.AdamW
    assert namespace["__getattr__"]("ShardedAdaBelief") is belief_dist.ShardedAdaBelief


def test_a_failure_cannot_break_the_import_of_torch(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.optim")
    _belief_dist_autoload.register()
