"""The contenders of the step benchmark, all behind one call: train on one batch, phase by phase.

Each builder takes a fresh float32 model, equal on all ranks, in an initialized gloo process group,
and the dtype to train in. In bfloat16 ShardedAdaBelief, FSDP2 and DeepSpeed keep float32 masters;
around DDP everything is bfloat16, which is less work and less exact.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from belief_dist import AdaBelief, ShardedAdaBelief
from benchmarks.update import official_adabelief
from examples.gpt.model import GPT, next_byte_loss

FORWARD, BACKWARD, STEP = "forward", "backward", "step"

# Trains on a batch; yields the name of each phase when that has ended.
Train = Callable[[Tensor], Iterator[str]]
Builder = Callable[[GPT, torch.dtype], Train]
MakeOptimizer = Callable[..., Optimizer]

COMPUTE = "compute only"
OURS = "ShardedAdaBelief"
BASELINE = "DDP + AdamW"
OPTIONS: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01}
_ADAMW = partial(AdamW, fused=True)


def loss_of(module: nn.Module, tokens: Tensor) -> Tensor:
    return next_byte_loss(module(tokens[:, :-1]), tokens[:, 1:])


def _train_with(module: nn.Module, optimizer: Optimizer) -> Train:
    def train(tokens: Tensor) -> Iterator[str]:
        optimizer.zero_grad()
        loss = loss_of(module, tokens)
        yield FORWARD
        loss.backward()
        yield BACKWARD
        optimizer.step()
        yield STEP

    return train


def _compute_only(model: GPT, dtype: torch.dtype) -> Train:
    model.to(dtype)

    def train(tokens: Tensor) -> Iterator[str]:
        model.zero_grad()
        loss = loss_of(model, tokens)
        yield FORWARD
        loss.backward()
        yield BACKWARD

    return train


def sharded(model: GPT, dtype: torch.dtype, **options: Any) -> Train:
    model.to(dtype)
    return _train_with(model, ShardedAdaBelief(model.parameters(), **OPTIONS, **options))


def _ddp(model: GPT, dtype: torch.dtype, make_optimizer: MakeOptimizer) -> Train:
    module = DistributedDataParallel(model.to(dtype), gradient_as_bucket_view=True)
    return _train_with(module, make_optimizer(module.parameters(), **OPTIONS))


def _zero_redundancy(params: Any, optimizer_class: type[Optimizer], **options: Any) -> Optimizer:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(
        params, optimizer_class=optimizer_class, parameters_as_bucket_view=True, **options
    )


def _fsdp2(model: GPT, dtype: torch.dtype, make_optimizer: MakeOptimizer) -> Train:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return _train_with(model, make_optimizer(model.parameters(), **OPTIONS))


def _deepspeed(model: GPT, dtype: torch.dtype, stage: int, make_optimizer: MakeOptimizer) -> Train:
    config = {
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    return _train_in_engine(model, dtype, config, optimizer=partial(make_optimizer, **OPTIONS))


def _deepspeed_json(
    model: GPT, dtype: torch.dtype, kind: str, zero: dict[str, Any], **options: Any
) -> Train:
    config = {
        "optimizer": {"type": kind, "params": OPTIONS | options},
        "zero_optimization": zero,
    }
    return _train_in_engine(model, dtype, config, model_parameters=model.parameters())


def _train_in_engine(
    model: GPT, dtype: torch.dtype, config: dict[str, Any], **optimized: Any
) -> Train:
    import deepspeed

    # Otherwise it compiles, for a minute, an operation that serves inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    common = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    engine, *_ = deepspeed.initialize(model=model, config=common | config, **optimized)

    def train(tokens: Tensor) -> Iterator[str]:
        loss = loss_of(engine, tokens)
        yield FORWARD
        engine.backward(loss)
        yield BACKWARD
        engine.step()
        yield STEP

    return train


ENGINES: dict[str, Builder] = {
    COMPUTE: _compute_only,
    f"{OURS} ZeRO-1": sharded,
    f"{OURS} ZeRO-1, messages": partial(sharded, shared_memory=False),
    f"{OURS} ZeRO-1, no overlap": partial(sharded, overlap=False),
    f"{OURS} ZeRO-1, 4 MiB buckets": partial(sharded, bucket_bytes=4 << 20),
    f"{OURS} ZeRO-2": partial(sharded, stage=2),
    f"{OURS} ZeRO-2, 4 MiB buckets": partial(sharded, stage=2, bucket_bytes=4 << 20),
    f"{OURS} ZeRO-1, bf16 sent": partial(sharded, reduce_dtype=torch.bfloat16),
    f"{OURS} ZeRO-1, int8 sent": partial(sharded, reduce_dtype=torch.int8),
    f"{OURS} ZeRO-1, native": partial(sharded, reduction="native"),
    BASELINE: partial(_ddp, make_optimizer=_ADAMW),
    "DDP + official AdaBelief": partial(_ddp, make_optimizer=official_adabelief),
    "DDP + ZeroRedundancy AdamW": partial(
        _ddp, make_optimizer=partial(_zero_redundancy, optimizer_class=AdamW, fused=True)
    ),
    "FSDP2 + AdamW": partial(_fsdp2, make_optimizer=_ADAMW),
    f"DeepSpeed + {OURS}": partial(_deepspeed, stage=0, make_optimizer=ShardedAdaBelief),
    "DeepSpeed ZeRO-1 + AdamW": partial(_deepspeed, stage=1, make_optimizer=_ADAMW),
    "DeepSpeed ZeRO-2 + AdamW": partial(_deepspeed, stage=2, make_optimizer=_ADAMW),
    "DeepSpeed ZeRO-3 + AdamW": partial(_deepspeed, stage=3, make_optimizer=_ADAMW),
}
# All with the same rule, for comparing bits.
SAME_RULE: dict[str, Builder] = {
    f"{OURS} ZeRO-1": ENGINES[f"{OURS} ZeRO-1"],
    f"{OURS} ZeRO-2": ENGINES[f"{OURS} ZeRO-2"],
    f"{OURS} ZeRO-1, native": ENGINES[f"{OURS} ZeRO-1, native"],
    "DDP + AdaBelief": partial(_ddp, make_optimizer=AdaBelief),
    "DDP + ZeroRedundancy AdaBelief": partial(
        _ddp, make_optimizer=partial(_zero_redundancy, optimizer_class=AdaBelief)
    ),
    "FSDP2 + AdaBelief": partial(_fsdp2, make_optimizer=AdaBelief),
    "DeepSpeed ZeRO-1 + AdaBelief": partial(_deepspeed, stage=1, make_optimizer=AdaBelief),
    "DeepSpeed ZeRO-2 + AdaBelief": partial(_deepspeed, stage=2, make_optimizer=AdaBelief),
}


def _by_json(setup: str, zero: dict[str, Any]) -> dict[str, Builder]:
    found: dict[str, Builder] = {
        f'{setup}, "{kind}"': partial(_deepspeed_json, kind=kind, zero=zero)
        for kind in ("AdamW", "AdaBelief")
    }
    if zero in ({"stage": 1}, {"stage": 2}):
        found[f'DeepSpeed ZeRO-0, "{OURS}", "stage": {zero["stage"]}'] = partial(
            _deepspeed_json, kind=OURS, zero={"stage": 0}, **zero
        )
    return found


_ON_CPU = {"offload_optimizer": {"device": "cpu"}}
# The same JSON but for the optimizer's type, and ours that shards by itself in its place.
BY_JSON: dict[str, dict[str, Builder]] = {
    setup: _by_json(setup, zero)
    for setup, zero in {
        "DeepSpeed ZeRO-1": {"stage": 1},
        "DeepSpeed ZeRO-2": {"stage": 2},
        "DeepSpeed ZeRO-3": {"stage": 3},
        "DeepSpeed ZeRO-2, CPU offload": {"stage": 2} | _ON_CPU,
        "DeepSpeed ZeRO-3, CPU offload": {"stage": 3} | _ON_CPU,
    }.items()
}
BUILDERS = ENGINES | {name: make for each in BY_JSON.values() for name, make in each.items()}
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
