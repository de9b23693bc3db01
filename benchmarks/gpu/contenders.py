"""Ways to train a GPT on one GPU, behind one interface."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from belief_dist import AdaBelief, ShardedAdaBelief
from examples.gpt.model import GPT, next_byte_loss

OPTIONS: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01}
_MAX_NORM = 1.0


def loss_of(module: nn.Module, tokens: Tensor) -> Tensor:
    return next_byte_loss(module(tokens[:, :-1]), tokens[:, 1:])


def exact_attention() -> AbstractContextManager[Any]:
    """Attention whose backward pass adds in a fixed order, for runs that are compared."""
    return sdpa_kernel(SDPBackend.MATH)


class Contender:
    """A model and its optimizer; None trains nothing."""

    def __init__(self, module: nn.Module, optimizer: Any) -> None:
        self.module, self.optimizer = module, optimizer

    def zero_grad(self) -> None:
        (self.module if self.optimizer is None else self.optimizer).zero_grad()

    def backward(self, tokens: Tensor) -> None:
        loss_of(self.module, tokens).backward()

    def without_sync(self) -> AbstractContextManager[Any]:
        """Gradients only accumulate inside."""
        for owner in (self.optimizer, self.module):
            if hasattr(owner, "no_sync"):
                return owner.no_sync()
        return nullcontext()

    def clip(self) -> None:
        """Clip to a global norm, where the optimizer does not do so itself."""
        nn.utils.clip_grad_norm_(self.module.parameters(), _MAX_NORM)

    def step(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()

    def skipped(self) -> int:
        """Return how many steps were skipped, of an optimizer that counts them."""
        return int(getattr(self.optimizer, "skipped_steps", 0))

    def iterate(self, tokens: Tensor) -> None:
        self.zero_grad()
        self.backward(tokens)
        self.step()

    def accumulate_and_clip(self, tokens: Tensor) -> None:
        """A step of two batches with clipping."""
        self.zero_grad()
        with self.without_sync():
            self.backward(tokens)
        self.backward(tokens)
        self.clip()
        self.step()


class Clipping(Contender):
    """The optimizer clips."""

    def clip(self) -> None:
        pass


class InDeepSpeed(Clipping):
    """DeepSpeed's engine; it clips as its JSON says."""

    def zero_grad(self) -> None:
        pass  # its step did

    def backward(self, tokens: Tensor) -> None:
        self.module.backward(loss_of(self.module, tokens))  # type: ignore[operator]

    def without_sync(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def step(self) -> None:
        self.module.step()  # type: ignore[operator]


Maker = Callable[[GPT, str], Contender]


def one_rank(device: str) -> None:
    """Join a process group of this process alone, as the frameworks expect one."""
    if dist.is_initialized():
        return
    here = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(here)
    os.environ.setdefault("MASTER_PORT", "29511")
    folder = tempfile.mkdtemp()
    more = {"device_id": torch.device("cuda", 0)} if device == "cuda" else {}
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=0,
        world_size=1,
        **more,
    )


def plain(model: GPT, device: str, make: Callable[..., Any] | None = None) -> Contender:
    return Contender(model, make(model.parameters(), **OPTIONS) if make else None)


def imported(model: GPT, device: str, module: str, name: str) -> Contender:
    kind = getattr(importlib.import_module(module), name)
    return Contender(model, kind(model.parameters(), **OPTIONS))


def sharded(model: GPT, device: str, **options: Any) -> Contender:
    return Clipping(model, ShardedAdaBelief(model.parameters(), **OPTIONS, **options))


def ddp(model: GPT, device: str) -> Contender:
    one_rank(device)
    module = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return Contender(module, AdamW(module.parameters(), fused=True, **OPTIONS))


def zero_redundancy(model: GPT, device: str) -> Contender:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    one_rank(device)
    module = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(
        module.parameters(), AdamW, parameters_as_bucket_view=True, fused=True, **OPTIONS
    )
    return Contender(module, optimizer)


def fsdp2(model: GPT, device: str) -> Contender:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    one_rank(device)
    policy = MixedPrecisionPolicy(param_dtype=next(model.parameters()).dtype)
    model.float()  # its masters
    mesh = init_device_mesh(device, (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return Contender(model, AdamW(model.parameters(), fused=True, **OPTIONS))


def deepspeed(model: GPT, device: str, stage: int) -> Contender:
    one_rank(device)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": next(model.parameters()).dtype == torch.bfloat16},
        "gradient_clipping": _MAX_NORM,
        "optimizer": {"type": "AdamW", "params": {**OPTIONS, "torch_adam": device == "cpu"}},
        "zero_optimization": {"stage": stage},
    }
    return InDeepSpeed(initialize_deepspeed(model, config), None)


def initialize_deepspeed(model: nn.Module, config: dict[str, Any]) -> Any:
    import deepspeed

    # Otherwise it compiles, for a minute, an operation that serves inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config
    )
    return engine


SMALLEST = {"master": "remainder", "state_dtype": "uint8"}
# What ours are compared with, and the packages that they need. A failure of theirs is a row.
PEERS: dict[str, tuple[Maker, list[str]]] = {
    "torch AdamW fused": (partial(plain, make=partial(AdamW, fused=True)), []),
    "torch AdamW foreach": (partial(plain, make=partial(AdamW, foreach=True)), []),
    "DDP + AdamW fused": (ddp, []),
    "DDP + ZeroRedundancyOptimizer(AdamW fused)": (zero_redundancy, []),
    "FSDP2 + AdamW fused, fp32 masters": (fsdp2, []),
    "FlashAdamW": (partial(imported, module="flashoptim", name="FlashAdamW"), ["flashoptim"]),
    "torchao AdamW8bit": (partial(imported, module="torchao.optim", name="AdamW8bit"), ["torchao"]),
    "bitsandbytes Adam8bit": (
        partial(imported, module="bitsandbytes.optim", name="Adam8bit"),
        ["bitsandbytes"],
    ),
    "DeepSpeed ZeRO-1, its AdamW": (partial(deepspeed, stage=1), ["deepspeed"]),
    "DeepSpeed ZeRO-2, its AdamW": (partial(deepspeed, stage=2), ["deepspeed"]),
}
OURS: dict[str, Maker] = {
    "compute only": plain,
    "AdaBelief": partial(plain, make=AdaBelief),
    "ShardedAdaBelief, fp32 masters": sharded,
    "ShardedAdaBelief, clipping": partial(sharded, max_grad_norm=_MAX_NORM),
    "ShardedAdaBelief, stage 2": partial(sharded, stage=2),
    "ShardedAdaBelief, remainder": partial(sharded, master="remainder"),
    "ShardedAdaBelief, remainder, 8-bit states": partial(sharded, **SMALLEST),
    "ShardedAdaBelief, remainder8, 8-bit states": partial(
        sharded, **{**SMALLEST, "master": "remainder8"}
    ),
    "ShardedAdaBelief, offload of a quarter": partial(sharded, offload=0.25),
    "ShardedAdaBelief, offload of a half": partial(sharded, offload=0.5),
    "ShardedAdaBelief, offload": partial(sharded, offload="cpu"),
}
