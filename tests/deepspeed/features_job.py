"""What DeepSpeed can do around an optimizer, each once, for test_features.py.

The deepspeed launcher runs it on 2 ranks: `features_job.py FOLDER`. Every case trains by
the engine and, beside it, a copy of the model by an unsharded AdaBelief on the mean of the ranks'
gradients. `FOLDER/<rank>.json` tells how far apart they end.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zero_stages_job import (
    ROWS,
    STEPS,
    WORLD_SIZE,
    float16_arithmetic,
    make_batch,
    make_model,
)

AdaBelief = torch.optim.AdaBelief
# As in test_zero_stages: with this eps a wrong scale of the gradients shows.
HYPER = {"lr": 0.1, "betas": [0.8, 0.95], "eps": 1e-2, "weight_decay": 0.1}
MICRO_BATCHES = 2


class Subclass(AdaBelief):
    """A user's own, which ZeRO must accept as tested, too."""


def config(stage: int, **more: Any) -> dict[str, Any]:
    zero = {"stage": stage, **more.pop("zero", {})}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "sub_group_size": 40}
    return {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "optimizer": {"type": "AdaBelief", "params": HYPER | more.pop("params", {})},
        **more,
    }


def micro_batch(step: int, micro: int) -> tuple[Tensor, Tensor]:
    """Return what this rank sees: its rows of the global batch."""
    first = (micro * WORLD_SIZE + dist.get_rank()) * ROWS
    inputs, targets = make_batch(step, MICRO_BATCHES * WORLD_SIZE * ROWS)
    return inputs[first : first + ROWS], targets[first : first + ROWS]


def reduce_(param: Tensor) -> None:
    """Average a gradient over the ranks; an expert that is on one rank only has its sum already."""
    if param.grad is None:
        param.grad = torch.zeros_like(param)
    if getattr(param, "group_name", "") != "ep_size_2":
        dist.all_reduce(param.grad)
    param.grad /= WORLD_SIZE


def train_reference(model: nn.Module, groups: Any, precise: Callable[[], Any], **more: Any) -> None:
    optimizer = AdaBelief(groups, **(HYPER | more))
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(MICRO_BATCHES):
            inputs, targets = micro_batch(step, micro)
            with precise():
                output = model(inputs)
            (nn.functional.mse_loss(output.float(), targets) / MICRO_BATCHES).backward()
        for param in model.parameters():
            reduce_(param)
        optimizer.step()


def train(
    settings: dict[str, Any],
    model: nn.Module | None = None,
    *,
    reference: nn.Module | None = None,
    reference_groups: Callable[[nn.Module], Any] = lambda model: model.parameters(),
    reference_options: dict[str, Any] | None = None,
    precise: Callable[[], Any] = nullcontext,
    overflows_first: bool = False,
    **arguments: Any,
) -> dict[str, Any]:
    """Train both ways; return the largest difference, and how far the reference has come.

    With `overflows_first` the engine makes one step more, before the others, whose gradients are
    infinite on the last rank.
    """
    model = model or make_model()
    reference = reference or copy.deepcopy(model)
    before = [p.detach().clone() for p in reference.parameters()]
    train_reference(reference, reference_groups(reference), precise, **(reference_options or {}))

    engine, *_ = deepspeed.initialize(model=model, config=settings, **arguments)
    params = list(engine.module.parameters())
    for step in range(-overflows_first, STEPS):
        for micro in range(MICRO_BATCHES):
            inputs, targets = micro_batch(max(step, 0), micro)
            output = engine(inputs.to(params[0].dtype))
            loss = nn.functional.mse_loss(output.float(), targets)
            spoilt = step < 0 and dist.get_rank() == WORLD_SIZE - 1
            engine.backward(loss * float("inf") if spoilt else loss)
            engine.step()
    with deepspeed.zero.GatheredParameters(params, enabled=engine.zero_optimization_stage() == 3):
        result = compare(params, list(reference.parameters()), before)
    return result | of_optimizer(engine)


def compare(ours: list[Tensor], theirs: list[Tensor], before: list[Tensor]) -> dict[str, float]:
    def largest(left: list[Tensor], right: list[Tensor]) -> float:
        pairs = zip(left, right, strict=True)
        return max((a.detach().float() - b.detach()).abs().max().item() for a, b in pairs)

    return {"difference": largest(ours, theirs), "moved": largest(theirs, before)}


def of_optimizer(engine: Any) -> dict[str, Any]:
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return {
        "optimizer": type(optimizer).__name__,
        "decays": [group["weight_decay"] for group in optimizer.param_groups],
        "steps": sorted({int(state["step"]) for state in optimizer.state.values()}),
        "skipped": engine.skipped_steps,
        "scale": float(getattr(engine.optimizer, "loss_scale", 1.0)),
    }


# - What a client passes


def client_instance() -> dict[str, Any]:
    model = make_model()
    return train(config(2), model, optimizer=AdaBelief(model.parameters(), **HYPER))


def client_callable() -> dict[str, Any]:
    return train(config(1), optimizer=lambda params: AdaBelief(params, **HYPER))


def client_subclass_with_offload() -> dict[str, Any]:
    settings = config(2, zero={"offload_optimizer": {"device": "cpu"}})
    settings["zero_force_ds_cpu_optimizer"] = False
    return train(settings, optimizer=lambda params: Subclass(params, **HYPER))


def groups_of_the_client() -> dict[str, Any]:
    def groups(model: nn.Module) -> list[dict[str, Any]]:
        first, *_, last = model.children()
        return [
            {"params": list(first.parameters()), "lr": 0.02},
            {"params": list(last.parameters()), "weight_decay": 0.0, "betas": [0.5, 0.9]},
        ]

    model = make_model()
    return train(config(3), model, model_parameters=groups(model), reference_groups=groups)


# - No decay


def no_decay(stage: int) -> dict[str, Any]:
    return train(config(stage, params={"no_decay": "1d"}), reference_options={"no_decay": "1d"})


def no_decay_under_zero_init() -> dict[str, Any]:
    settings = config(3, params={"no_decay": "1d"})
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = make_model()
    assert all(param.numel() == 0 for param in model.parameters())
    params = list(model.parameters())
    reference = make_model()
    with deepspeed.zero.GatheredParameters(params):  # Init draws other numbers
        for ours, theirs in zip(params, reference.parameters(), strict=True):
            theirs.data.copy_(ours)
    return train(settings, model, reference=reference, reference_options={"no_decay": "1d"})


# - Precision


def autocast(stage: int) -> dict[str, Any]:
    return train(
        config(stage, torch_autocast={"enabled": True, "dtype": "bfloat16"}),
        precise=lambda: torch.autocast("cpu", torch.bfloat16),
    )


def accumulation(stage: int, dtype: str) -> dict[str, Any]:
    settings = config(stage, bf16={"enabled": True}, data_types={"grad_accum_dtype": dtype})
    return train(settings)


def half(stage: int, loss_scale: float = 0, **zero: Any) -> dict[str, Any]:
    """Train in float16 by DeepSpeed's own loss scaler, beginning with a step that it must skip."""
    scaler = {"enabled": True, "loss_scale": loss_scale, "initial_scale_power": 10, "hysteresis": 1}
    with float16_arithmetic():
        return train(config(stage, fp16=scaler, zero=zero), overflows_first=True)


def half_refused() -> dict[str, Any]:
    with float16_arithmetic():
        return refused(config(0, fp16={"enabled": True}))


# - Models


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Sequential, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.inner = inner
        self.run = run

    def forward(self, inputs: Tensor) -> Tensor:
        return self.run(self.inner, inputs.requires_grad_())


def activation_checkpointing(stage: int) -> dict[str, Any]:
    model = make_model()
    run = deepspeed.checkpointing.checkpoint
    if stage == 3:
        run = lambda function, inputs: checkpoint(function, inputs, use_reentrant=False)  # noqa: E731
    return train(config(stage), Checkpointed(model, run), reference=copy.deepcopy(model))


class Mixture(nn.Module):
    def __init__(self, ep_size: int) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        torch.manual_seed(0)
        self.first = nn.Linear(7, 6)
        self.moe = MoE(
            6,
            nn.Linear(6, 6),
            num_experts=2,
            ep_size=ep_size,
            k=1,
            drop_tokens=False,
            use_rts=False,
        )
        self.last = nn.Linear(6, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden, *_ = self.moe(self.first(inputs))
        return self.last(hidden)


def mixture_of_experts(stage: int, ep_size: int) -> dict[str, Any]:
    # Not a copy: what DeepSpeed groups by lies on the parameters, and copies do not have it.
    model, reference = Mixture(ep_size), Mixture(ep_size)
    reference.moe.set_deepspeed_parallelism()  # the engine does that for the model
    for left, right in zip(model.parameters(), reference.parameters(), strict=True):
        dist.broadcast(left.data, 0)
        right.data.copy_(left.data)
    settings = config(stage, params={"no_decay": "1d"})
    return train(settings, model, reference=reference, reference_options={"no_decay": "1d"})


def pipeline() -> dict[str, Any]:
    """Train a pipeline of two stages, a rank each; both see all micro-batches in turn."""
    from deepspeed.pipe import PipelineModule

    whole = make_model()
    model = PipelineModule(
        list(copy.deepcopy(whole)), num_stages=2, loss_fn=nn.functional.mse_loss,
        partition_method="uniform",
    )  # fmt: skip
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=config(0)
    )
    optimizer = AdaBelief(whole.parameters(), **HYPER)
    before = copy.deepcopy(whole)

    def batches(step: int) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, targets = make_batch(step, MICRO_BATCHES * ROWS)
        return zip(inputs.split(ROWS), targets.split(ROWS), strict=True)

    for step in range(STEPS):
        engine.train_batch(batches(step))
        optimizer.zero_grad()
        for inputs, targets in batches(step):
            (nn.functional.mse_loss(whole(inputs), targets) / MICRO_BATCHES).backward()
        optimizer.step()
    # A stage calls its layers by their numbers in the whole.
    ours = [p for name, p in model.named_parameters()]
    names = [name for name, _ in model.named_parameters()]
    theirs, first = dict(whole.named_parameters()), dict(before.named_parameters())
    return compare(ours, [theirs[n] for n in names], [first[n] for n in names]) | of_optimizer(
        engine
    )


def refused(settings: dict[str, Any]) -> dict[str, Any]:
    try:
        deepspeed.initialize(model=make_model(), config=settings)
    except (TypeError, ValueError) as error:
        return {"error": str(error)}
    return {"error": None}


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "lr as string": lambda: refused(config(2, params={"lr": "1e-3"})),
    "eps auto": lambda: refused(config(2, params={"eps": "auto"})),
    "no_decay unknown": lambda: refused(config(2, params={"no_decay": "norms"})),
    "client instance": client_instance,
    "client callable": client_callable,
    "client subclass, offload": client_subclass_with_offload,
    "client groups, stage 3": groups_of_the_client,
    "no_decay, stage 0": lambda: no_decay(0),
    "no_decay, stage 1": lambda: no_decay(1),
    "no_decay, stage 2": lambda: no_decay(2),
    "no_decay, stage 3": lambda: no_decay(3),
    "no_decay, zero.Init": no_decay_under_zero_init,
    "autocast, stage 0": lambda: autocast(0),
    "autocast, stage 2": lambda: autocast(2),
    "autocast, stage 3": lambda: autocast(3),
    "bf16, fp32 accumulation, stage 1": lambda: accumulation(1, "fp32"),
    "bf16, fp32 accumulation, stage 2": lambda: accumulation(2, "fp32"),
    "bf16, fp32 accumulation, stage 3": lambda: accumulation(3, "fp32"),
    "bf16, bf16 accumulation, stage 2": lambda: accumulation(2, "bf16"),
    "fp16, stage 0": half_refused,
    "fp16, stage 0, no scale": lambda: half(0, loss_scale=1),
    "fp16, stage 1": lambda: half(1),
    "fp16, stage 2": lambda: half(2),
    "fp16, stage 2, offload": lambda: half(2, offload_optimizer={"device": "cpu"}),
    "fp16, stage 3": lambda: half(3),
    "activation checkpointing, stage 2": lambda: activation_checkpointing(2),
    "activation checkpointing, stage 3": lambda: activation_checkpointing(3),
    "experts on all ranks, stage 0": lambda: mixture_of_experts(0, 1),
    "experts on all ranks, stage 2": lambda: mixture_of_experts(2, 1),
    "an expert per rank, stage 0": lambda: mixture_of_experts(0, 2),
    "an expert per rank, stage 1": lambda: mixture_of_experts(1, 2),
    "an expert per rank, stage 2": lambda: mixture_of_experts(2, 2),
    "pipeline": pipeline,  # the last one: its process groups outlive it
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--local_rank", type=int)  # the deepspeed launcher adds it
    args = parser.parse_args()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # see zero_stages_job
    deepspeed.init_distributed("gloo")
    found: dict[str, Any] = {"main": __name__, "version": deepspeed.__version__}
    for name, case in CASES.items():
        found[name] = case()
    (args.folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # see zero_stages_job


if __name__ == "__main__":
    main()
