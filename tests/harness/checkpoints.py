"""A model with all that is awkward to save, and how to train, save, load and compare it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from belief_dist import ShardedAdaBelief, checkpoint
from tests.harness.models import HYPER
from tests.harness.reference import backward

FP32, BF16 = torch.float32, torch.bfloat16


class Odd(nn.Module):
    """Odd sizes, a tied weight, a frozen one, an empty one, a scalar, a buffer, channels-last."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator).to(dtype))

        self.embed = nn.Embedding(33, 31, _weight=new(33, 31).data, dtype=dtype)
        self.norm = new(129)
        self.empty = new(0, 3)
        self.scalar = new()
        self.image = nn.Parameter(new(4, 3, 2, 5).data.to(memory_format=torch.channels_last))
        self.frozen = new(7).requires_grad_(False)
        self.head = nn.Linear(31, 33, bias=True, dtype=dtype)
        self.head.weight = self.embed.weight  # tied
        self.head.bias.data = new(33).data
        self.register_buffer("count", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("mean", torch.randn(5, generator=generator))


def groups(model: Odd) -> list[dict[str, Any]]:
    named = dict(model.named_parameters())
    small = ["norm", "scalar", "head.bias"]
    return [
        {"params": [(n, p) for n, p in named.items() if n not in small]},
        {
            "params": [(n, named[n]) for n in small],
            "weight_decay": 0.0,
            "betas": (0.8, 0.98),
            "clip": False,
        },
    ]


def build(
    dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any
) -> tuple[Odd, ShardedAdaBelief]:
    model = Odd(dtype, seed)
    chosen = {"bucket_bytes": 1500, "max_grad_norm": 5.0, **HYPER, **options}
    return model, ShardedAdaBelief(groups(model), **chosen)


def train(model: Odd, optimizer: ShardedAdaBelief, steps: range) -> None:
    """Take steps on gradients that all ranks share: the same for any number that is 2**k."""
    params = list(model.parameters())
    for step in steps:
        grads: list[torch.Tensor | None] = []
        for index, param in enumerate(params):
            generator = torch.Generator().manual_seed(1 + 1000 * step + index)
            used = param.requires_grad and not (step % 2 == 0 and param.shape == (129,))
            grads.append(torch.randn(param.shape, generator=generator) if used else None)
        backward(params, [None if g is None else g.to(params[0].dtype) for g in grads])
        optimizer.step()
        optimizer.zero_grad()
        model.count += 1


def everything(model: Odd, optimizer: ShardedAdaBelief) -> dict[str, Any]:
    """Return all that a checkpoint must keep, whole, on every rank."""
    optimizer.wait_pending()
    found: dict[str, Any] = {n: v.detach().clone() for n, v in model.state_dict().items()}
    for group in optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            state = dict(optimizer.state[param])
            found[f"{name} step"] = state.pop("step")
            state.pop("wire_error", None)
            for key, value in state.items():
                theirs = optimizer.comm.exchange(value)
                found[f"{name} {key}"] = torch.cat(theirs[: optimizer.comm.num_shards])
    found["groups"] = [
        {k: v for k, v in group.items() if k not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]
    found["skipped"] = optimizer.skipped_steps
    return found


def compare(ours: dict[str, Any], theirs: dict[str, Any], where: str) -> None:
    assert ours.keys() == theirs.keys(), where
    for key, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == theirs[key].dtype, f"{where}: {key}"
            assert torch.equal(value, theirs[key]), f"{where}: {key}"
        else:
            assert value == theirs[key], f"{where}: {key}"


def save(run: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Train, save, and write down what must be found again, in memory order."""
    model, optimizer = build(dtype, **options)
    train(model, optimizer, range(3))
    optimizer.param_groups[0]["lr"] = 0.04
    saved = checkpoint.save(run, 3, model=model, optimizer=optimizer, extra={"epoch": 7})
    assert saved.path == run / "step-00000003" and saved.nbytes > 0
    whole = everything(model, optimizer)
    if dist.get_rank() == 0:
        torch.save(whole, run / "expected.pt")


def load(run: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    model, optimizer = build(dtype, seed=5, **options)
    train(model, optimizer, range(7, 9))
    loaded = checkpoint.load(run, model=model, optimizer=optimizer)
    assert (loaded.step, loaded.extra, loaded.changes) == (3, {"epoch": 7}, [])
    expected = torch.load(run / "expected.pt", weights_only=False)
    compare(everything(model, optimizer), expected, f"{dist.get_world_size()} ranks, {options}")
