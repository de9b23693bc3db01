"""The model, data and engines of the stage-0 cases, and the same training without DeepSpeed."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from zero_stages_job import ROWS, param_groups

HYPER = {"lr": 0.05, "betas": [0.8, 0.95], "eps": 1e-2, "weight_decay": 0.1}
SMALL_BUCKETS = {"bucket_bytes": 512}  # several, which overlap with backward
STEPS = 4


def rank() -> int:
    return torch.distributed.get_rank()


def make_model() -> nn.Sequential:
    """Return a model whose weights differ from rank to rank: the first rank's count."""
    torch.manual_seed(100 + rank())
    return nn.Sequential(
        nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 19), nn.Tanh(), nn.Linear(19, 5)
    )


def batches(
    step: int, micro_batches: int, dtype: torch.dtype, spoil: bool = False, size: float = 10
) -> list[tuple[Tensor, Tensor]]:
    """Return this rank's micro-batches; the targets are infinite for `spoil`, on the last rank."""
    generator = torch.Generator().manual_seed(1000 * step + rank())
    size = float("inf") if spoil and rank() == torch.distributed.get_world_size() - 1 else size
    return [
        (
            torch.randn(ROWS, 7, generator=generator).to(dtype),
            size * torch.randn(ROWS, 5, generator=generator),
        )
        for _ in range(micro_batches)
    ]


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(output.float(), target)


class Plain:
    """The training loop of a script without DeepSpeed."""

    def __init__(self, dtype: torch.dtype, micro_batches: int, **options: Any) -> None:
        from belief_dist import ShardedAdaBelief

        self.model = make_model().to(dtype)
        self.micro_batches = micro_batches
        self.optimizer = ShardedAdaBelief(param_groups(self.model), **HYPER, **options)

    def step(self, step: int, scaler: Any = None, spoil: bool = False) -> None:
        data = batches(step, self.micro_batches, next(self.model.parameters()).dtype, spoil)
        self.optimizer.zero_grad()
        for number, (inputs, targets) in enumerate(data, start=1):
            last = number == len(data)
            loss = loss_of(self.model(inputs), targets) / len(data)
            with nullcontext() if last else self.optimizer.no_sync():
                (scaler.scale(loss) if scaler else loss).backward()
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()


def config_of(
    dtype: torch.dtype, micro_batches: int, clipping: float | None, **more: Any
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": micro_batches,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {"stage": 0},
    }
    if clipping is not None:
        config["gradient_clipping"] = clipping
    return config | more


def initialize(config: dict[str, Any], way: str = "type", **options: Any) -> Any:
    """Return an engine that has got the optimizer in one of three ways."""
    import deepspeed

    model = make_model()
    empty = {"params": [], "lr": 9.0}  # DeepSpeed drops it
    chosen: dict[str, Any] = {"model_parameters": [empty, *param_groups(model)]}
    if way == "type":
        optimizer = {"type": "ShardedAdaBelief", "params": {**HYPER, **options}}
        config = config | {"optimizer": optimizer}
    else:
        from belief_dist import ShardedAdaBelief

        if way == "callable":
            chosen["optimizer"] = lambda params: ShardedAdaBelief(params, **HYPER, **options)
        else:
            # Before the engine casts and broadcasts the model.
            chosen = {"optimizer": ShardedAdaBelief(param_groups(model), **HYPER, **options)}
    engine, *_ = deepspeed.initialize(model=model, config=config, **chosen)
    return engine


def train(engine: Any, step: int, spoil: bool = False, size: float = 10) -> None:
    """Make a step; `spoil` makes a gradient of the last rank infinite, `size` all of them large."""
    dtype = next(engine.module.parameters()).dtype
    for inputs, targets in batches(step, engine.gradient_accumulation_steps(), dtype, spoil, size):
        engine.backward(loss_of(engine(inputs), targets))
        engine.step()


def states_of(optimizer: Any) -> list[dict[str, Any]]:
    """Return copies of parameters and of all that this rank keeps for them."""
    optimizer.wait_pending()
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [
        {
            "param": param.detach().clone(),
            **{
                k: v.clone() if isinstance(v, Tensor) else v
                for k, v in optimizer.state[param].items()
            },
        }
        for param in params
    ]


def assert_same(ours: Any, expected: Any, context: str) -> None:
    """Assert equality of every bit of parameters, masters, m and s, and of the step counts."""
    pairs = zip(states_of(ours), states_of(expected), strict=True)
    for number, (found, wanted) in enumerate(pairs):
        assert found.keys() == wanted.keys(), context
        for key, value in wanted.items():
            same = (
                torch.equal(found[key], value) if isinstance(value, Tensor) else found[key] == value
            )
            assert same, f"{context}: {key} of parameter {number}"
