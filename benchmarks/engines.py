"""The contenders of the step benchmark, all behind one call: train on one batch.

Each builder takes a fresh model, equal on all ranks, in an initialized gloo process group.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from belief_dist import ShardedAdaBelief
from benchmarks.update import official_adabelief
from examples.gpt.model import GPT, next_byte_loss

TrainStep = Callable[[Tensor], None]
Builder = Callable[[GPT], TrainStep]

COMPUTE = "compute only"
BASELINE = "DDP + AdamW"
_OPTIONS: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01}


def _loss(module: nn.Module, tokens: Tensor) -> Tensor:
    return next_byte_loss(module(tokens[:, :-1]), tokens[:, 1:])


def _train_with(module: nn.Module, optimizer: Optimizer) -> TrainStep:
    def train(tokens: Tensor) -> None:
        optimizer.zero_grad()
        _loss(module, tokens).backward()
        optimizer.step()

    return train


def _compute_only(model: GPT) -> TrainStep:
    def train(tokens: Tensor) -> None:
        model.zero_grad()
        _loss(model, tokens).backward()

    return train


def _sharded(model: GPT, **options: Any) -> TrainStep:
    return _train_with(model, ShardedAdaBelief(model.parameters(), **_OPTIONS, **options))


def _ddp(model: GPT, make_optimizer: Callable[..., Optimizer]) -> TrainStep:
    module = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return _train_with(module, make_optimizer(module.parameters(), **_OPTIONS))


def _zero_redundancy(params: Any, **options: Any) -> Optimizer:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(
        params, optimizer_class=AdamW, parameters_as_bucket_view=True, fused=True, **options
    )


def _fsdp2(model: GPT) -> TrainStep:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _train_with(model, AdamW(model.parameters(), fused=True, **_OPTIONS))


def _deepspeed(model: GPT, stage: int) -> TrainStep:
    import deepspeed

    # Otherwise it compiles, for a minute, an operation that serves inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=AdamW(model.parameters(), fused=True, **_OPTIONS),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        },
    )

    def train(tokens: Tensor) -> None:
        engine.backward(_loss(engine, tokens))
        engine.step()

    return train


ENGINES: dict[str, Builder] = {
    COMPUTE: _compute_only,
    "ShardedAdaBelief ordered": partial(_sharded, reduction="ordered"),
    "ShardedAdaBelief ordered, no overlap": partial(_sharded, overlap=False),
    "ShardedAdaBelief ZeRO-2": partial(_sharded, stage=2),
    "ShardedAdaBelief native": partial(_sharded, reduction="native"),
    BASELINE: partial(_ddp, make_optimizer=partial(AdamW, fused=True)),
    "DDP + official AdaBelief": partial(_ddp, make_optimizer=official_adabelief),
    "DDP + ZeroRedundancy AdamW": partial(_ddp, make_optimizer=_zero_redundancy),
    "FSDP2 + AdamW": _fsdp2,
    "DeepSpeed ZeRO-1 + AdamW": partial(_deepspeed, stage=1),
    "DeepSpeed ZeRO-2 + AdamW": partial(_deepspeed, stage=2),
}
_PACKAGES = {"official": "adabelief_pytorch", "DeepSpeed": "deepspeed"}


def _package(name: str) -> str | None:
    """Return the package that an engine needs besides torch and this one."""
    return next((package for word, package in _PACKAGES.items() if word in name), None)


def missing_package(name: str) -> str | None:
    """Return the package that an engine needs and that is not installed."""
    package = _package(name)
    return package if package and importlib.util.find_spec(package) is None else None


def import_package(name: str) -> None:
    """Import what an engine needs, so that its memory is not counted as the engine's."""
    package = _package(name)
    if package == "deepspeed":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        logging.disable(logging.WARNING)
    if package:
        importlib.import_module(package)
