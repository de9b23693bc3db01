"""Two data-parallel copies of a model that is cut over two ranks: local parts, one global norm."""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from belief_dist import ShardedAdaBelief, checkpoint
from belief_dist.checkpoint.formats.convert import differences
from belief_dist.checkpoint.formats.full_state import read_full_state
from belief_dist.kernels import squared_norm_bins_
from belief_dist.norm import NUM_WORDS, add_squares_, norm_from_bins
from belief_dist.options import DEFAULTS
from belief_dist.rule import step_scalars, update_reference_
from belief_dist.sharding.dtensor import local_part
from belief_dist.sharding.norms import MODEL
from belief_dist.sharding.spike_guard import FEWEST
from tests.harness.late import Slow
from tests.harness.models import HYPER, rank_order_sum
from tests.harness.ranks import run_ranks

Stage = Literal[1, 2]
MAX_NORM = 0.05


def cut_model(tp: DeviceMesh) -> nn.Sequential:
    """A linear layer cut by rows, one by columns whose bias all ranks hold, and an uncut norm."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6))
    parallelize_module(model, tp, {"1": ColwiseParallel(), "3": RowwiseParallel()})
    return model


def gradients_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [local_part(param.grad).clone() for param in model.parameters()]


def whole(local: Tensor, param: Tensor) -> Tensor:
    """Put the parts of a local tensor together."""
    if not isinstance(param, DTensor):
        return local
    return DTensor.from_local(local, param.device_mesh, param.placements).full_tensor()


def equals_the_uncut_rule(stage: Stage, overlap: bool, own_limit: float | None = None) -> None:
    """With a limit, the last three parameters, cut and not, are a group with a norm of its own."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = cut_model(mesh["tp"])
    single = copy.deepcopy(model)
    params = list(single.parameters())
    first = len(params) - 3 if own_limit is not None else len(params)
    parts = list(model.parameters())[:first], list(model.parameters())[first:]
    limits = None, own_limit
    groups = [
        {"params": part, "max_grad_norm": limit}
        for part, limit in zip(parts, limits, strict=True)
        if part
    ]
    optimizer = ShardedAdaBelief(
        groups,
        process_group=mesh["dp"],
        bucket_bytes=200,
        stage=stage,
        overlap=overlap,
        max_grad_norm=MAX_NORM,
        **HYPER,
    )
    states = [tuple(torch.zeros_like(local_part(p)) for _ in range(2)) for p in params]
    for step in range(1, 5):
        torch.manual_seed(step)
        data = torch.randn(2, 5, 6)
        everyone = [gradients_of(single, x) for x in data]
        model(data[mesh["dp"].get_local_rank()]).square().sum().backward()
        if stage == 1:
            for param in model.parameters():
                assert type(param.grad) is type(param.data)
        optimizer.step()
        sums = [rank_order_sum(list(grads)) for grads in zip(*everyone, strict=True)]
        bins = torch.zeros(2, NUM_WORDS, dtype=torch.int64)
        for i, (total, param) in enumerate(zip(sums, params, strict=True)):
            squared_norm_bins_(bins[int(i >= first)], whole(total, param).reshape(-1).contiguous())
        norm, own_norm = (norm_from_bins(each).item() / 2 for each in bins)
        assert optimizer.grad_norm.item() == norm, (stage, step)
        factors = [MAX_NORM / (norm + 1e-6), (own_limit or 0.0) / (own_norm + 1e-6)]
        if own_limit is not None:
            assert optimizer.group_grad_norms[1].item() == own_norm and factors[1] < 1
        assert factors[0] < 1
        for i, (total, param, state) in enumerate(zip(sums, params, states, strict=True)):
            scale = 0.5 * min(1.0, factors[int(i >= first)])
            scalars = step_scalars({**DEFAULTS, **HYPER}, step)
            local = local_part(param.data)
            update_reference_(local, total, *state, scalars, grad_scale=scale)
        for ours, theirs, state in zip(model.parameters(), params, states, strict=True):
            assert torch.equal(local_part(ours), local_part(theirs)), (stage, step)
            part = optimizer.layout.fragment(
                [id(p) for p in model.parameters()].index(id(ours)), mesh["dp"].get_local_rank()
            )
            own = state[1].reshape(-1)[part.in_param :][: part.numel]
            assert torch.equal(optimizer.state[ours]["exp_avg_sq"], own)
        optimizer.zero_grad()


def parts_are_never_read_too_early() -> None:
    """Gathers that have not begun: `to_local` and the local tensor itself wait for them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    results = []
    for read in (None, lambda param: param.to_local(), local_part):
        model = cut_model(mesh["tp"])
        optimizer = ShardedAdaBelief(
            model.parameters(), process_group=mesh["dp"], bucket_bytes=200, **HYPER
        )
        if read is not None:
            Slow(optimizer)
        torch.manual_seed(1)
        model(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
        if read is None:
            optimizer._engine.read_guard.wait_all()
        cut = [param for param in model.parameters() if isinstance(param, DTensor)]
        results.append([(read or local_part)(param).clone() for param in cut])
        optimizer._engine.read_guard.wait_all()
    for early in results[1:]:
        assert all(map(torch.equal, early, results[0]))


def a_spike_of_one_part_skips_in_all() -> None:
    """They have one norm together, which says so on the ranks of every part."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = cut_model(mesh["tp"])
    optimizer = ShardedAdaBelief(
        model.parameters(), process_group=mesh["dp"], spike_guard=3.0, **{**HYPER, "lr": 1e-4}
    )
    torch.manual_seed(1)
    inputs = torch.randn(5, 6)
    for step in range(FEWEST + 2):
        is_spike = step == FEWEST
        before = [local_part(p).clone() for p in model.parameters()]
        model(inputs).sum().backward()
        if is_spike and dist.get_rank() == 1:
            bins = optimizer._engine.reducer._bins[optimizer.comm, MODEL]
            add_squares_(bins, torch.tensor([1e4]))
        optimizer.step()
        assert optimizer.last_step.was_taken != is_spike
        optimizer.zero_grad()
        if is_spike:
            now = [local_part(p) for p in model.parameters()]
            assert all(map(torch.equal, before, now))
    assert optimizer.skipped_steps == 1
    history = optimizer.spike_history
    assert len(history) == 2 + FEWEST and len(set(map(tuple, exchanged(history)))) == 1


def exchanged(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def skips_in_all_parts() -> None:
    """What one part's ranks find out concerns the others as well."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = cut_model(mesh["tp"])
    optimizer = ShardedAdaBelief(model.parameters(), process_group=mesh["dp"], **HYPER)
    before = [local_part(p).clone() for p in model.parameters()]
    model(torch.randn(5, 6)).sum().backward()
    grads = optimizer._engine.buckets[0].flat_grad
    assert grads is not None
    if dist.get_rank() == 1:
        optimizer._engine.buckets[0].grad_shard[0] = float("nan")
        optimizer._engine.reducer._bins_of(0)[-1] += 1
    optimizer.step()
    assert optimizer.skipped_steps == 1
    optimizer.zero_grad()
    for param, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(local_part(param), value)
    # One copy of the second part changes: ranks 1 and 3 hold it, 0 and 2 are told.
    if dist.get_rank() == 3:
        local_part(model[1].weight.data)[0, 0] += 1.0
    model(torch.randn(5, 6)).sum().backward()
    sentence = {
        0: "another part of the tensor-parallel model have come apart",
        1: "differ between the 2 ranks of the process group: none has a majority",
    }[mesh["tp"].get_local_rank()]
    with pytest.raises(RuntimeError, match=re.escape(sentence)):
        optimizer.step()
    for param, value in zip(model.parameters(), before, strict=True):
        if dist.get_rank() != 3:
            assert torch.equal(local_part(param), value)


def trains(model: nn.Module, optimizer: ShardedAdaBelief, numbers: range) -> None:
    """Take steps on data that all data-parallel ranks share."""
    for step in numbers:
        torch.manual_seed(step)
        model(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def checkpoints_reshard(folder: Path) -> None:
    """Saved by 2 x 2 ranks; 1 x 4, uneven parts, and 4 x 1 have every logical tensor's bits."""
    keeps = {**HYPER, "ema_decay": 0.9}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = cut_model(mesh["tp"])
    optimizer = ShardedAdaBelief(
        model.named_parameters(), process_group=mesh["dp"], bucket_bytes=200, **keeps
    )
    trains(model, optimizer, range(3))
    before = [local_part(param).clone() for param in model.parameters()]
    with optimizer.averaged_parameters():
        lent = [local_part(param).clone() for param in model.parameters()]
    assert not any(map(torch.equal, before, lent))
    assert all(map(torch.equal, before, map(local_part, model.parameters())))
    saved = checkpoint.save(folder / "first", 3, model=model, optimizer=optimizer)
    assert saved.nbytes > 0
    for dp, tp in ((1, 4), (4, 1), (2, 2)):
        other_mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
        other = cut_model(other_mesh["tp"])
        other_optimizer = ShardedAdaBelief(
            other.named_parameters(), process_group=other_mesh["dp"], stage=2, **keeps
        )
        for param in other.parameters():
            local_part(param.data).fill_(7.0)
        checkpoint.load(folder / "first", model=other, optimizer=other_optimizer)
        again = folder / f"{dp}x{tp}"
        checkpoint.save(again, 3, model=other, optimizer=other_optimizer)
        if dist.get_rank() == 0:
            one, two = read_full_state(folder / "first"), read_full_state(again)
            assert differences(one, two) == [], (dp, tp)
            assert one.states["1.weight"]["exp_avg_sq"].shape == (10, 6)
            assert one.steps["3.bias"] == 3 and "param_ema" in one.states["3.bias"]
    # On the mesh of then, training goes on as if it had never stopped.
    for each in (model, optimizer), (other, other_optimizer):
        trains(*each, range(3, 5))
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(local_part(ours), local_part(theirs))
    with optimizer.averaged_parameters(), other_optimizer.averaged_parameters():
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(local_part(ours), local_part(theirs))


def copies_are_repaired_in_one_part(copies: int) -> None:
    """The other part skips the step with it, or fails with it where no majority can tell."""
    mesh = init_device_mesh("cpu", (copies, 2), mesh_dim_names=("dp", "tp"))
    model, steady = cut_model(mesh["tp"]), cut_model(mesh["tp"])
    optimizers = [
        ShardedAdaBelief(
            each.parameters(),
            process_group=mesh["dp"],
            bucket_bytes=200,
            on_desync="repair",
            **HYPER,
        )
        for each in (model, steady)
    ]
    optimizer = optimizers[0]
    index, part = mesh.get_coordinate() or (0, 0)

    def train(each: nn.Module, its: ShardedAdaBelief, step: int) -> None:
        torch.manual_seed(step * copies + index)
        each(torch.randn(5, 6)).square().sum().backward()
        its.step()
        its.zero_grad()

    for step in range(1, 5):
        if step == 3:
            if (index, part) == (1, 1):
                local_part(model[1].weight).data[0, 0] += 1.0
            if copies == 2:
                said = "none has a majority" if part == 1 else "another part .* could not make"
                with pytest.raises(RuntimeError, match=said):
                    train(model, optimizer, 9)
                return
            train(model, optimizer, 9)
            assert optimizer.skipped_steps == 1
            why = "partly those of wrong" if part == 1 else "another part of the model"
            assert why in optimizer.last_step.why_not
        train(model, optimizer, step)
        train(steady, optimizers[1], step)
    for ours, theirs in zip(model.parameters(), steady.parameters(), strict=True):
        assert torch.equal(local_part(ours), local_part(theirs))


def refusals() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = cut_model(mesh["tp"])
    with pytest.raises(ValueError, match=r"cut over ranks \[\d, \d\].*process_group=mesh\['dp'\]"):
        ShardedAdaBelief(model.parameters())
    sharded = fully_shard(nn.Linear(8, 8), mesh=init_device_mesh("cpu", (4,)))
    with pytest.raises(ValueError, match="with FSDP2 use AdaBelief"):
        ShardedAdaBelief(sharded.parameters())
    optimizer = ShardedAdaBelief(model.parameters(), process_group=mesh["dp"], **HYPER)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    saved["sharding"]["part"] = [1 - mesh["tp"].get_local_rank()]
    with pytest.raises(ValueError, match=r"part \[\d\] of a tensor-parallel model, but this"):
        optimizer.load_state_dict(saved)


def test_tensor_parallel(tmp_path: Path) -> None:
    run_ranks(
        4,
        tmp_path,
        *(partial(equals_the_uncut_rule, s, o) for s in (1, 2) for o in (True, False)),
        partial(equals_the_uncut_rule, 2, True, 0.01),
        parts_are_never_read_too_early,
        skips_in_all_parts,
        a_spike_of_one_part_skips_in_all,
        partial(checkpoints_reshard, tmp_path / "checkpoints"),
        refusals,
        partial(copies_are_repaired_in_one_part, 2),
    )


def test_three_copies_of_two_parts(tmp_path: Path) -> None:
    run_ranks(6, tmp_path, partial(copies_are_repaired_in_one_part, 3))
