"""AdaBelief by the ways that other frameworks name an optimizer: class, and every hyperparameter.

None of these frameworks is installed here. Each is replaced by the few lines of its published
interface that an optimizer meets, written anew; docs/doors.md tells which version that was.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import belief_dist
from tests.harness.paths import ROOT

DOORS = ROOT / "examples" / "doors"
BETAS = (0.9, 0.95)


def options(optimizer: Any) -> list[tuple[Any, ...]]:
    """Return (lr, betas, eps, weight decay) of every group of what really runs."""
    groups = belief_dist.verify(optimizer).optimizer.param_groups
    return [(g["lr"], tuple(g["betas"]), g["eps"], g["weight_decay"]) for g in groups]


@pytest.fixture
def door(monkeypatch) -> Callable[..., ModuleType]:
    """Import a file of examples/doors, with `modules` in the place of the framework."""

    def load(name: str, **modules: dict[str, Any]) -> ModuleType:
        for dotted, contents in modules.items():
            path = dotted.replace("__", ".")
            for end in range(1, path.count(".") + 2):
                parent = ".".join(path.split(".")[:end])
                if parent not in sys.modules:
                    monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
            vars(sys.modules[path]).update(contents)
        spec = importlib.util.spec_from_file_location(name, DOORS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


class List(Sequence):
    """A list that is none, as omegaconf's ListConfig is."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __getitem__(self, index: Any) -> Any:
        return self.values[index]

    def __len__(self) -> int:
        return len(self.values)


@pytest.mark.parametrize("name", ["AdaBelief", "ShardedAdaBelief"])
def test_betas_of_hydra_are_a_pair(name):
    params = nn.Linear(3, 2).parameters()
    group = {"params": params, "betas": List(0.8, 0.9)}
    made = getattr(belief_dist, name)([group], betas=List(0.9, 0.5))
    assert made.param_groups[0]["betas"] == (0.8, 0.9)
    assert made.defaults["betas"] == (0.9, 0.5)
    assert type(made.defaults["betas"]) is tuple  # so that torch.load reads it with weights_only
    with pytest.raises(TypeError, match=r"^betas must be a pair"):
        belief_dist.AdaBelief(nn.Linear(3, 2).parameters(), betas=List(0.9))


def verl_build(parameters: Any, config: SimpleNamespace) -> torch.optim.Optimizer:
    """Build as verl's FSDP engine does: betas only for classes whose name says Adam."""
    given = {"lr": config.lr, "weight_decay": config.weight_decay}
    if any(part in config.optimizer.lower() for part in ("adam", "ademamix")):
        given["betas"] = config.betas
    given |= config.override_optimizer_config or {}
    return getattr(importlib.import_module(config.optimizer_impl), config.optimizer)(
        parameters, **given
    )


def test_verl_passes_betas_only_where_they_are_overridden():
    page = (ROOT / "docs" / "doors.md").read_text()
    said = dict(re.findall(r"optim\.(\w+)=(.+?)'?(?: \\)?$", page, re.MULTILINE))
    override = said.pop("override_optimizer_config")
    # Hydra's grammar needs no blanks behind colons; YAML does.
    overridden = yaml.safe_load(override.replace(":", ": "))
    overridden["eps"] = float(overridden["eps"])  # as Hydra reads it
    said |= {"lr": float(said["lr"]), "weight_decay": float(said["weight_decay"])}
    config = SimpleNamespace(**said, betas=(0.5, 0.5), override_optimizer_config=None)
    model = nn.Linear(3, 2)
    assert options(verl_build(model.parameters(), config)) == [(1e-6, (0.9, 0.999), 1e-16, 0.1)]
    config.override_optimizer_config = overridden
    assert options(verl_build(model.parameters(), config)) == [(1e-6, BETAS, 1e-16, 0.1)]


def test_nemo_automodel_target():
    read = yaml.safe_load((DOORS / "nemo_automodel.yaml").read_text())["optimizer"]
    module, name = read.pop("_target_").rsplit(".", 1)
    made = getattr(importlib.import_module(module), name)(
        params=list(nn.Linear(3, 2).parameters()), foreach=False, **read
    )  # with params by name, and foreach=False under tensor parallelism
    assert options(made) == [(3e-4, BETAS, 1e-16, 0.1)]


def test_a_number_that_yaml_reads_as_text_is_refused_with_the_way_out():
    read = yaml.safe_load("eps: 1e-16")
    assert read == {"eps": "1e-16"}  # YAML 1.1, as PyYAML reads it
    with pytest.raises(TypeError, match=r"^eps must be a number, got '1e-16'.* 1\.0e-16, where"):
        belief_dist.AdaBelief(nn.Linear(3, 2).parameters(), **read)
    belief_dist.AdaBelief(nn.Linear(3, 2).parameters(), **yaml.safe_load("eps: 1.0e-16"))


@dataclass(kw_only=True)
class ParamGroupConfig:
    pattern: str
    optimizer_name: str
    optimizer_kwargs: dict[str, Any] = field(default_factory=dict)


class OptimizersContainer:
    """torchtitan's: groups carry their names, and fused and foreach of the configuration."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        param_groups: list[ParamGroupConfig] = field(default_factory=list)
        implementation: str = "fused"

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Any:
        return {"AdamW": torch.optim.AdamW}[name]

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        how = {
            "fused": config.implementation == "fused",
            "foreach": config.implementation == "foreach",
        }
        self.optimizers = []
        for model in model_parts:
            for each in config.param_groups:
                names, params = zip(*model.named_parameters(), strict=True)
                group = {"params": list(params), "param_names": list(names)}
                factory = self._resolve_optimizer_factory(each.optimizer_name)
                self.optimizers.append(factory([{**group, **how, **each.optimizer_kwargs}]))


def test_torchtitan_container(door):
    file = door(
        "torchtitan_adabelief",
        torchtitan__components__optimizer={
            "OptimizersContainer": OptimizersContainer,
            "ParamGroupConfig": ParamGroupConfig,
        },
    )
    model = nn.Linear(3, 2)
    container = file.AdaBeliefContainer(file.adabelief(lr=1e-3), model_parts=[model])
    assert options(container) == [(1e-3, BETAS, 1e-16, 0.1)]
    optimizer = container.optimizers[0]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert file.AdaBeliefContainer._resolve_optimizer_factory("AdamW") is torch.optim.AdamW


class HfTrainer:
    """What the Trainer of transformers does with a class that it is given."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.args = SimpleNamespace(
            learning_rate=2e-3, adam_beta1=0.9, adam_beta2=0.95, weight_decay=0.05
        )
        self.optimizer = self.optimizer_cls_and_kwargs = None
        self.callbacks: list[Any] = []

    def add_callback(self, callback: Any) -> None:
        self.callbacks.append(callback)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        cls, given = self.optimizer_cls_and_kwargs
        weight, bias = (model or self.model).parameters()
        decay = {"params": [weight], "weight_decay": self.args.weight_decay}
        self.optimizer = cls([decay, {"params": [bias], "weight_decay": 0.0}], **given)
        return self.optimizer


TRAINERS = [(2e-3, BETAS, 1e-16, 0.05), (2e-3, BETAS, 1e-16, 0.0)]


def test_axolotl_plugin(door):
    file = door("axolotl_adabelief", axolotl__integrations__base={"BasePlugin": object})
    trainer = HfTrainer(nn.Linear(3, 2))
    file.AdaBeliefPlugin().post_trainer_create(None, trainer)
    assert options(trainer.create_optimizer()) == TRAINERS
    assert [type(callback).__name__ for callback in trainer.callbacks] == ["VerifyCallback"]


def test_swift_plugin(door):
    class OptimizerCallback:
        def __init__(self, args: Any, trainer: HfTrainer) -> None:
            self.args, self.trainer = args, trainer

        def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
            return self.trainer.create_optimizer(model)

    by_name: dict[str, Any] = {"default": OptimizerCallback}
    door(
        "swift_adabelief",
        swift__optimizers={"OptimizerCallback": OptimizerCallback, "optimizers_map": by_name},
    )
    trainer = HfTrainer(nn.Linear(3, 2))
    made = by_name["adabelief"](trainer.args, trainer).create_optimizer()
    assert options(made) == TRAINERS
    assert [type(callback).__name__ for callback in trainer.callbacks] == ["VerifyCallback"]


def test_llamafactory_plugin(door, capsys):
    registry: dict[str, Any] = {}

    class OptimizerPlugin:
        def __init__(self, name: str) -> None:
            self.name = name

        def register(self) -> Callable[[Any], Any]:
            return lambda function: registry.setdefault(self.name, function)

    door(
        "llamafactory_adabelief",
        llamafactory__v1__plugins__trainer_plugins__optimizer={"OptimizerPlugin": OptimizerPlugin},
    )
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    config = {"name": "adabelief", "lr": 1e-4, "betas": [0.9, 0.95], "weight_decay": 0.1}
    made = registry["adabelief"](model, config)
    assert options(made) == [(1e-4, BETAS, 1e-16, 0.1)]
    assert made.param_groups[0]["params"] == [model.weight]
    assert capsys.readouterr().out.endswith("eps 1e-16, betas (0.9, 0.95), weight decay 0.1\n")


def test_timm_registry(door):
    @dataclass(frozen=True)
    class OptimInfo:
        name: str
        opt_class: Any
        has_betas: bool = False

    registered: dict[str, OptimInfo] = {}
    registry = SimpleNamespace(register=lambda info: registered.update({info.name: info}))
    door(
        "timm_adabelief",
        timm__optim={"OptimInfo": OptimInfo},
        timm__optim___optim_factory={"default_registry": registry},
    )
    (info,) = registered.values()
    # As create_optimizer_v2() looks a name up: what stands before "_" is a wrapper's.
    assert info.name.split("_")[-1] == info.name == "beliefdist"
    assert info.has_betas
    weight, bias = nn.Linear(3, 2).parameters()
    groups = [{"params": [bias], "weight_decay": 0.0}, {"params": [weight], "weight_decay": 0.1}]
    made = info.opt_class(groups, weight_decay=0.0, lr=1e-3, betas=BETAS)
    assert options(made) == [(1e-3, BETAS, 1e-16, 0.0), (1e-3, BETAS, 1e-16, 0.1)]
