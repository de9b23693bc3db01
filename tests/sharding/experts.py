"""A mixture of experts whose gradients add up exactly, wherever its experts are.

Each rank holds some of the experts, routes its tokens to where theirs are, and gets the results
back. Gradients of every batch are rounded to multiples of 2^-18 before they are added: sums then
are exact in float32, and every placement of the experts has the same ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from belief_dist import ShardedAdaBelief
from tests.harness.models import HYPER

EXPERTS, BATCHES, TOKENS, WIDTH = 4, 4, 3, 6
_GRID = 2.0**18


class RoundGrad(torch.autograd.Function):
    """Rounds gradients, on a grid that is finer where losses are divided."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss_divisor: int) -> Tensor:
        ctx.grid = _GRID * loss_divisor  # a power of two, as all gradients are divided by it
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad * ctx.grid).round() / ctx.grid, None


class _Exchange(torch.autograd.Function):
    """Piece number i of a tensor goes to rank i of a group."""

    @staticmethod
    def forward(ctx: Any, pieces: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchange(pieces, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _exchange(grad, ctx.group), None


def _exchange(pieces: Tensor, group: dist.ProcessGroup) -> Tensor:
    received = torch.empty_like(pieces)
    dist.all_to_all_single(received, pieces.contiguous(), group=group)
    return received


class Mixture(nn.Module):
    """An embedding, a router, the experts of this rank, and a head."""

    def __init__(self, mesh: DeviceMesh, seed: int = 0) -> None:
        super().__init__()
        self.group = mesh["expert"].get_group()
        self.loss_divisor = 1  # batches of one rank's step
        self.parts, part = mesh["expert"].size(), mesh["expert"].get_local_rank()
        share = EXPERTS // self.parts
        torch.manual_seed(seed)
        self.embed = nn.Embedding(16, WIDTH)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.head = nn.Linear(WIDTH, 16)
        every = [nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS)]
        mine = range(part * share, (part + 1) * share)
        self.experts = nn.ModuleDict({str(number): every[number] for number in mine})

    def _rounded(self, x: Tensor) -> Tensor:
        found: Tensor = RoundGrad.apply(x, self.loss_divisor)
        return found

    def _linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self._rounded(layer.weight), self._rounded(layer.bias))

    def forward(self, tokens: Tensor) -> Tensor:
        x = nn.functional.embedding(tokens, self._rounded(self.embed.weight))
        scores = self._linear(self.router, x).softmax(-1)
        weight, chosen = scores.max(-1)
        # Every rank of the group gets all tokens, and returns those of its own experts.
        everyone = _Exchange.apply(x.expand(self.parts, *x.shape), self.group)
        routes = _exchange(chosen.expand(self.parts, *chosen.shape), self.group)
        results = []
        for x_of, chosen_of in zip(everyone, routes, strict=True):
            out = x_of * 0.0  # a part of the graph, or this rank would not join its backward
            for number, expert in self.experts.items():
                places = (chosen_of == int(number)).nonzero().flatten()
                if len(places):  # else it has no gradient
                    out = out.index_add(0, places, self._linear(expert, x_of[places]).tanh())
            results.append(out)
        mixed = _Exchange.apply(torch.stack(results), self.group).sum(0)
        return self._linear(self.head, x + weight[:, None] * mixed)


def batch_of(step: int, number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + number)
    tokens = torch.randint(16, (TOKENS + 1,), generator=generator)
    return tokens[:-1], tokens[1:]


def build(
    mesh: DeviceMesh, seed: int = 0, *, later: bool = False, **options: Any
) -> tuple[Mixture, ShardedAdaBelief]:
    """Return a model and its optimizer, to which experts are added `later` or at once."""
    model = Mixture(mesh, seed)
    named = list(model.named_parameters())
    experts = [each for each in named if each[0].startswith("experts.")]
    dense: dict[str, Any] = {"params": [e for e in named if not e[0].startswith("experts.")]}
    group = {"params": experts, "process_group": mesh["expert_dp"]}
    settings = {"bucket_bytes": 200, **HYPER, **options}
    if not later:
        return model, ShardedAdaBelief([dense, group], **settings)
    optimizer = ShardedAdaBelief([dense], **settings)
    with pytest.raises(ValueError, match="which param groups have a process_group"):
        optimizer.add_param_group(group if dist.get_rank() else {"params": experts})
    optimizer.add_param_group(group)
    return model, optimizer


def train(model: Mixture, optimizer: ShardedAdaBelief, steps: range) -> list[float]:
    """Take steps on `BATCHES` batches each, dealt out to the ranks; return the norms."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    norms = []
    for step in steps:
        mine = range(rank, BATCHES, ranks)
        model.loss_divisor = len(mine)
        for position, number in enumerate(mine):
            tokens, targets = batch_of(step, number)
            loss = nn.functional.cross_entropy(model(tokens), targets) / len(mine)
            if position < len(mine) - 1:
                with optimizer.no_sync():
                    loss.backward()
            else:
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        norms.append(optimizer.grad_norm.item())
    return norms


def everything(model: Mixture, optimizer: ShardedAdaBelief) -> dict[str, Tensor]:
    """Return parameters, m, s and step counts of all experts, by name, on every rank."""
    optimizer.wait_pending()
    found: dict[str, Tensor] = {}
    for index, (name, param) in enumerate(
        pair
        for group in optimizer.param_groups
        for pair in zip(group["param_names"], group["params"], strict=True)
    ):
        found[name] = param.detach().clone()
        part = optimizer.fragment(index)
        state = optimizer.state[param]
        found[f"{name} step"] = torch.tensor(state["step"])
        for key in ("exp_avg", "exp_avg_sq"):
            found[f"{name} {key} {part.in_param}"] = state[key].clone()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    joined: dict[str, Tensor] = {}
    pieces: dict[str, dict[int, Tensor]] = {}
    for theirs in everyone:
        for name, value in theirs.items():
            if " exp_avg" in name:
                base, _, start = name.rpartition(" ")
                if value.numel():
                    pieces.setdefault(base, {})[int(start)] = value
            elif name in joined:
                assert torch.equal(joined[name], value), name
            else:
                joined[name] = value
    for name, parts in pieces.items():
        joined[name] = torch.cat([parts[start] for start in sorted(parts)])
    return joined
