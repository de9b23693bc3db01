"""Training with ShardedAdaBelief that must equal one process, bit for bit: what is tried, and how.

The reference sums the ranks' gradients in rank order and applies the rule to whole parameters.
"""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist

from belief_dist import ShardedAdaBelief
from belief_dist.engine_options import EngineOptions
from belief_dist.options import DEFAULTS
from tests.harness.models import HYPER, SHAPES, make_grad, make_params, rank_order_sum
from tests.harness.reference import Reference, backward, compare


def equals_reference(
    bucket_bytes: int,
    overlap: bool,
    *,
    dtype: torch.dtype = torch.float32,
    max_grad_norm: float | None = None,
    micro_batches: int = 1,
    steps: int = 4,
    options: dict[str, Any] | None = None,
    unused: bool = False,
    stage: Literal[1, 2] = 1,
    reduce_dtype: torch.dtype | None = None,
    offload: Literal["cpu"] | float | None = None,
    master: Literal["fp32", "remainder", "remainder8"] = "fp32",
    state_dtype: torch.dtype = torch.float32,
    process_group: dist.ProcessGroup | None = None,
    shared_memory: bool = True,
    **averages: Any,
) -> None:
    """Train a few steps on all ranks and compare everything after each."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    hyper = {**HYPER, **(options or {})}
    params = make_params(dtype, seed=rank)  # the constructor must spread rank 0's
    first, second = params[:4], params[4:]
    groups = [{"params": first}, {"params": second, "lr": 0.02, "weight_decay": 0.0}]
    own = [{**DEFAULTS, **hyper}] * len(first)
    own += [{**DEFAULTS, **hyper, "lr": 0.02, "weight_decay": 0.0}] * len(second)
    small = {"state_dtype": state_dtype, "seed": 3, **averages}
    rest = EngineOptions(master=master).remainder_dtype
    reference = Reference(make_params(dtype, seed=0), own, remainders=rest, **small)
    optimizer = ShardedAdaBelief(
        groups,
        bucket_bytes=bucket_bytes,
        overlap=overlap,
        max_grad_norm=max_grad_norm,
        stage=stage,
        reduce_dtype=reduce_dtype,
        offload=offload,
        master=master,
        process_group=process_group,
        shared_memory=shared_memory,
        **small,
        **hyper,
    )
    wire = reduce_dtype or dtype

    def gradient(step: int, of: int, index: int, micro: int) -> torch.Tensor | None:
        # Parameter 2 is used by the last rank only, parameter 4 by nobody in odd steps.
        if unused and ((index == 2 and of != world_size - 1) or (index == 4 and step % 2)):
            return None
        return make_grad(SHAPES[index], step, of, index, micro).to(dtype)

    for step in range(1, steps + 1):
        # What is added, in this order: at stage 1 one sum of micro-batches for each rank, at stage
        # 2 every micro-batch of every rank.
        everyone: list[list[torch.Tensor | None]] = []
        if stage == 1:
            for of in range(world_size):
                summed: list[torch.Tensor | None] = []
                for index in range(len(params)):
                    parts = [gradient(step, of, index, micro) for micro in range(micro_batches)]
                    kept = [part for part in parts if part is not None]
                    summed.append(sum(kept[1:], start=kept[0].clone()) if kept else None)
                everyone.append(summed)
        else:
            for micro, of in itertools.product(range(micro_batches), range(world_size)):
                everyone.append([gradient(step, of, i, micro) for i in range(len(params))])
        everyone = [[None if g is None else g.to(wire) for g in addend] for addend in everyone]
        for micro in range(micro_batches):
            mine = [gradient(step, rank, index, micro) for index in range(len(params))]
            if stage == 1 and micro + 1 < micro_batches:
                with optimizer.no_sync():
                    backward(params, mine)
            else:
                backward(params, mine)
        optimizer.step()
        reference.step(everyone, max_grad_norm, world_size)
        context = f"W={world_size}, bucket {bucket_bytes}, overlap {overlap}, step {step}"
        assert optimizer.grad_norm.item() == reference.norm.item(), context
        exact = math.sqrt(
            math.fsum(
                math.fsum((rank_order_sum(present).double() ** 2).flatten().tolist())
                for i in range(len(params))
                if (present := [g[i] for g in everyone if g[i] is not None])
            )
        )
        # float64 against exact arithmetic; a forgotten division by W would be far off.
        assert math.isclose(reference.norm.item() * world_size, exact, rel_tol=1e-12), context
        compare(optimizer, reference, context)
        optimizer.zero_grad()


def main_comparison() -> list[partial[None]]:
    """Return the cases of all features, one by one."""
    cases = [
        partial(equals_reference, bucket_bytes, overlap)
        for bucket_bytes in (1, 1500, 10**9)
        for overlap in (True, False)
    ]
    cases += [
        partial(equals_reference, 1500, overlap, **more)
        for overlap in (True, False)
        for more in (
            {"dtype": torch.bfloat16},
            {"dtype": torch.float64},
            {"max_grad_norm": 1.0},
            {"max_grad_norm": 1.0, "dtype": torch.bfloat16},
            {"micro_batches": 3},
            {"unused": True},
            {"unused": True, "micro_batches": 2, "max_grad_norm": 0.5},
            {"options": {"amsgrad": True}},
            {"options": {"rectify": True}, "steps": 8},
            {"options": {"weight_decouple": False}},
            {"options": {"maximize": True}},
            {"reduce_dtype": torch.bfloat16},
            {"reduce_dtype": torch.float32, "dtype": torch.bfloat16, "micro_batches": 2},
        )
    ]
    cases += [
        partial(equals_reference, 1500, True, stage=2, **more)
        for more in (
            {"dtype": torch.bfloat16, "micro_batches": 3},
            {"dtype": torch.float64},
            {"unused": True, "micro_batches": 2, "max_grad_norm": 0.5},
            {"reduce_dtype": torch.bfloat16, "micro_batches": 2},
        )
    ]
    cases += [
        partial(equals_reference, bucket_bytes, True, offload="cpu", **more)
        for bucket_bytes in (1, 1500)
        for more in (
            {"unused": True, "options": {"amsgrad": True}},
            {"dtype": torch.bfloat16, "unused": True, "max_grad_norm": 1.0},
            {"dtype": torch.float64, "stage": 2},
            {"dtype": torch.bfloat16, "stage": 2, "micro_batches": 2},
        )
    ]
    cases += [
        partial(equals_reference, 1, True, offload=offload, steps=2, **more)
        for offload, more in (
            (0.2, {"unused": True, "options": {"amsgrad": True}, "max_grad_norm": 1.0}),
            (0.7, {"dtype": torch.bfloat16, "stage": 2, "master": "remainder"}),
            (500, {"dtype": torch.bfloat16, "state_dtype": torch.uint8}),
        )
    ]
    cases += [
        partial(equals_reference, *schedule, stage=2, micro_batches=3, max_grad_norm=1.0)
        for schedule in ((1, True), (1500, True), (1500, False), (10**9, True))
    ]
    return cases


def combinations() -> list[partial[None]]:
    """Return a case for each choice of schedule, stage, wire dtype, clipping and accumulation.

    Every other one sends messages, so that of any two choices both ways are tried with each.
    """
    choices = itertools.product(
        (1, 1500, 10**9), (True, False), (1, 2), (None, torch.bfloat16), (None, 1.0), (1, 3)
    )
    return [
        partial(
            equals_reference,
            bucket_bytes,
            overlap,
            stage=stage,
            reduce_dtype=wire,
            max_grad_norm=clip,
            micro_batches=micro_batches,
            steps=2,
            shared_memory=sum(map(bool, (overlap, stage == 2, wire, clip, micro_batches > 1))) % 2
            == 0,
        )
        for bucket_bytes, overlap, stage, wire, clip, micro_batches in choices
    ]
