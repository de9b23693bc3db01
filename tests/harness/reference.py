"""What sharded training must equal, bit for bit: one process that holds everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from belief_dist import ShardedAdaBelief
from belief_dist.kernels import squared_norm_bins_
from belief_dist.norm import NUM_WORDS, norm_from_bins
from belief_dist.operands import BLOCK, Operands
from belief_dist.rule import compute_dtype, step_scalars
from belief_dist.state_formats import noise_key, update_stored_reference_
from tests.harness.models import rank_order_sum


class Reference:
    """One process that holds everything and adds the ranks' gradients in rank order."""

    def __init__(
        self,
        params: list[torch.nn.Parameter],
        options: list[dict[str, Any]],
        *,
        remainders: torch.dtype | None = None,
        state_dtype: torch.dtype = torch.float32,
        seed: int = 0,
        ema_decay: float | None = None,
        ema_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.options = options  # one for each parameter
        self.low = [p.detach().clone(memory_format=torch.contiguous_format) for p in params]
        dtype = [compute_dtype(p.dtype) for p in params]
        self.master = [p.to(d, copy=True) for p, d in zip(self.low, dtype, strict=True)]
        self.keys = [noise_key(seed, index) for index in range(len(params))]
        # Of each parameter, by the name in the optimizer's state.
        self.states: list[dict[str, torch.Tensor]] = []
        for master, each in zip(self.master, options, strict=True):
            form = master.dtype if state_dtype == torch.float32 else state_dtype
            count = master.numel()
            state = {}
            for name in ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * each["amsgrad"]:
                state[name] = torch.zeros(count, dtype=form)
                if form == torch.uint8:
                    state[f"{name}_exponent"] = torch.zeros(-(-count // BLOCK), dtype=form)
            if ema_decay is not None:
                form = master.dtype if ema_dtype == torch.float32 else ema_dtype
                state["param_ema"] = master.reshape(-1).to(form, copy=True)
            self.states.append(state)
        self.remainder = [
            None if remainders is None else torch.zeros(p.numel(), dtype=remainders) for p in params
        ]
        self.steps = [0] * len(params)
        self.ema_weight = 0.0 if ema_decay is None else 1.0 - ema_decay
        self.norm = torch.tensor(0.0)

    @property
    def exp_avg_sq(self) -> list[torch.Tensor]:
        """Return s of every parameter, in its shape."""
        pairs = zip(self.states, self.low, strict=True)
        return [state["exp_avg_sq"].view(low.shape) for state, low in pairs]

    def step(
        self,
        grads: list[list[torch.Tensor | None]],
        max_grad_norm: float | None,
        world_size: int,
    ) -> None:
        """Apply one step to `grads[addend][param]`, added in this order."""
        sums: list[torch.Tensor | None] = []
        bins = torch.zeros(NUM_WORDS, dtype=torch.int64)
        # Of param groups with norms of their own, which tests tell apart by their limits.
        own_bins = {
            limit: torch.zeros_like(bins) for each in self.options if (limit := own_limit(each))
        }
        for index, master in enumerate(self.master):
            pieces = [addend[index] for addend in grads]
            if all(piece is None for piece in pieces):
                sums.append(None)
                continue
            zero = torch.zeros_like(master)
            total = rank_order_sum([zero if piece is None else piece for piece in pieces])
            sums.append(total)
            if self.options[index].get("clip", True):
                limit = own_limit(self.options[index])
                squared_norm_bins_(own_bins.get(limit, bins), total.reshape(-1))
        mean = 1.0 / world_size
        self.norm = norm_from_bins(bins) * mean
        scale = mean
        if max_grad_norm is not None:
            scale *= min(1.0, max_grad_norm / (self.norm.item() + 1e-6))
        self.own_norms = {limit: norm_from_bins(own_bins[limit]) * mean for limit in own_bins}
        own_scales = {
            limit: mean * min(1.0, limit / (norm.item() + 1e-6))
            for limit, norm in self.own_norms.items()
        }
        for i, total in enumerate(sums):
            if total is None:
                continue
            self.steps[i] += 1
            halves = self.remainder[i] is not None
            operands = Operands(
                param=(self.low if halves else self.master)[i].view(-1),
                grad=total.reshape(-1),
                param_out=None if halves else self.low[i].view(-1),
                remainder=self.remainder[i],
                key=self.keys[i],
                **self.states[i],
            )
            update_stored_reference_(
                operands,
                step_scalars(self.options[i], self.steps[i], ema_weight=self.ema_weight),
                grad_scale=own_scales.get(own_limit(self.options[i]), scale)
                if self.options[i].get("clip", True)
                else mean,
            )


def own_limit(options: dict[str, Any]) -> float:
    """Return to what the norm of a param group's own is clipped; 0 if it has none."""
    limit: float = options.get("max_grad_norm") or 0.0
    return limit


def collect(optimizer: ShardedAdaBelief, keys: Sequence[str]) -> list[list[torch.Tensor]]:
    """Put states together from the fragments of all ranks of the optimizer's group."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    mine = [[optimizer.state[param][key] for param in params] for key in keys]
    # As bytes in arrays, which take a fraction of the time that tensors take to be pickled.
    everyone = optimizer.comm.exchange(
        [[part.contiguous().view(torch.uint8).numpy() for part in parts] for parts in mine]
    )
    return [
        [
            torch.cat([torch.from_numpy(theirs[k][i]) for theirs in everyone]).view(part.dtype)
            for i, part in enumerate(parts)
        ]
        for k, parts in enumerate(mine)
    ]


def compare(optimizer: ShardedAdaBelief, reference: Reference, context: str) -> None:
    """Assert equality of every bit: parameters, m, s, masters, steps."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, param in enumerate(params):
        assert torch.equal(param, reference.low[i]), f"{context}: parameter {i}"
        assert optimizer.state[param]["step"] == reference.steps[i], f"{context}: step of {i}"
    states = {name: [each[name] for each in reference.states] for name in reference.states[0]}
    if "master" in optimizer.state[params[0]]:
        states["master"] = reference.master
    if "remainder" in optimizer.state[params[0]]:
        states["remainder"] = [half for half in reference.remainder if half is not None]
    for key, whole in zip(states, collect(optimizer, list(states)), strict=True):
        for i, (ours, theirs) in enumerate(zip(whole, states[key], strict=True)):
            assert torch.equal(ours, theirs.reshape(-1)), f"{context}: {key} of {i}"


def backward(params: list[torch.nn.Parameter], grads: list[torch.Tensor | None]) -> None:
    """Give every parameter its gradient through a real backward pass."""
    terms = [(p * g).sum() for p, g in zip(params, grads, strict=True) if g is not None]
    torch.stack([term.float() for term in terms]).sum().backward()
