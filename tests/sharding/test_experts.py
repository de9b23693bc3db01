"""Param groups with ranks of their own: experts train alike, wherever they are."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from belief_dist import ShardedAdaBelief, checkpoint
from tests.harness.models import HYPER
from tests.harness.ranks import run_ranks
from tests.sharding.experts import EXPERTS, build, everything, train

STEPS = range(6)


def placement(parts: int) -> DeviceMesh:
    """Cut the experts into so many parts."""
    shape = (dist.get_world_size() // parts, parts)
    return init_device_mesh("cpu", shape, mesh_dim_names=("expert_dp", "expert"))


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], context: Any) -> None:
    assert ours.keys() == theirs.keys(), context
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), (context, name)


def keeps(path: Path, parts: int, **options: Any) -> None:
    """Train, and keep what has come out, or compare with what was kept before."""
    model, optimizer = build(placement(parts), max_grad_norm=0.5, **options)
    norms = train(model, optimizer, STEPS)
    assert min(norms) > 0.5, "nothing was clipped"
    found = {**everything(model, optimizer), "norms": torch.tensor(norms, dtype=torch.float64)}
    steps = {int(found[f"experts.{number}.weight step"]) for number in range(EXPERTS)}
    assert len(steps) > 1, "every expert was used in every step"
    if not path.exists() and dist.get_rank() == 0:
        torch.save(found, path)
    dist.barrier()
    assert_equal(found, torch.load(path), (dist.get_world_size(), parts, options))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_placement_trains_alike(
    ranks: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """On 1, 2 and 4 ranks, experts in 1, 2, 4 parts: p, m, s, steps and norms have equal bits."""
    kept = tmp_path_factory.getbasetemp() / "experts.pt"  # that of the first one
    variants: list[dict[str, Any]] = [{"stage": 1}]
    if ranks == 4:
        variants += [{"stage": 2}, {"shared_memory": False}, {"overlap": False, "stage": 2}]
        variants += [{"later": True}]
    parts = [each for each in (1, 2, 4) if each <= ranks]
    run_ranks(ranks, tmp_path, *(partial(keeps, kept, p, **v) for p in parts for v in variants))


def skips_everywhere() -> None:
    """A NaN that one expert's ranks find, and parameters whose copies differ there."""
    model, optimizer = build(placement(2))
    train(model, optimizer, range(2))
    before = everything(model, optimizer)
    handles = []
    if dist.get_rank() == 1:
        for expert in model.experts.values():
            handles.append(expert.bias.register_hook(lambda grad: grad * float("nan")))
    train(model, optimizer, range(2, 3))
    assert optimizer.skipped_steps == 1
    assert_equal(everything(model, optimizer), before, "skipped")
    for handle in handles:
        handle.remove()
    # Ranks 1 and 3 hold the same experts.
    if dist.get_rank() == 3:
        model.experts["2"].weight.data[0, 0] += 1.0
    said = "the copies of parameter 'experts.2.weight' .* differ between the 2 ranks"
    with pytest.raises(RuntimeError, match=said):
        train(model, optimizer, range(3, 4))


def copies_are_repaired() -> None:
    """Of three copies of the experts, the odd one is made equal again; others skip that step."""
    parts = placement(2)
    model, optimizer = build(parts, on_desync="repair")
    steady, other = build(parts)
    for step in range(4):
        if step == 2:
            expert = next(iter(model.experts.values()))
            if dist.get_rank() == 3:
                expert.weight.data[0, 0] += 1.0
            train(model, optimizer, range(9, 10))
            assert "partly those of wrong parameters" in optimizer.last_step.why_not
            dist.barrier()
        for each in ((model, optimizer), (steady, other)):
            train(*each, range(step, step + 1))
    assert_equal(everything(model, optimizer), everything(steady, other), "repaired")


def checkpoints_follow_the_experts(folder: Path) -> None:
    """Saved with two parts, continued with one, two and four: the bits of the run that went on."""
    model, optimizer = build(placement(2), max_grad_norm=0.5)
    train(model, optimizer, range(3))
    checkpoint.save(folder, 3, model=model, optimizer=optimizer)
    with checkpoint.BackgroundSaver(folder / "background", model=model, optimizer=optimizer) as it:
        it.save(3)
    train(model, optimizer, range(3, 6))
    expected = everything(model, optimizer)
    for parts in (1, 2, 4):
        for source in (folder, folder / "background"):
            other, its = build(placement(parts), seed=5, stage=2, max_grad_norm=0.5)
            checkpoint.load(source, model=other, optimizer=its)
            train(other, its, range(3, 6))
            assert_equal(everything(other, its), expected, (parts, source))


def cut_experts_reshard(folder: Path) -> None:
    """One DTensor of all experts, cut over the ranks that hold them: saved at 2, loaded at 1, 4."""
    rank = dist.get_rank()

    def one(parts: int, seed: int) -> tuple[torch.nn.Parameter, ShardedAdaBelief, Any]:
        mesh = placement(parts)
        torch.manual_seed(seed)
        dense = torch.nn.Parameter(torch.randn(7))
        whole = distribute_tensor(torch.randn(EXPERTS, 5, 3), mesh["expert"], [Shard(0)])
        cut = torch.nn.Parameter(whole)
        groups = [
            {"params": [("dense", dense)]},
            {"params": [("experts", cut)], "process_group": mesh["expert_dp"]},
        ]
        optimizer = ShardedAdaBelief(groups, max_grad_norm=0.1, **HYPER)

        def step(number: int) -> None:
            # Multiples of 1/8, so that sums are exact: of each rank's tokens, for all experts.
            generator = torch.Generator().manual_seed(number)
            grads = torch.randint(-8, 8, (4, EXPERTS, 5, 3), generator=generator) / 8
            group, part = mesh.get_coordinate() or (0, 0)
            here = grads[group * parts : (group + 1) * parts].sum(0)
            mine = here.chunk(parts)[part]
            ((cut.to_local() * mine).sum() + (dense * grads[rank, 0, 0, 0]).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()

        return cut, optimizer, step

    cut, optimizer, step = one(2, 1)
    step(1)
    checkpoint.save(folder, 1, optimizer=optimizer)
    step(2)
    optimizer.wait_pending()
    expected, norm = cut.full_tensor(), optimizer.grad_norm
    for parts in (1, 2, 4):
        cut, optimizer, step = one(parts, 2)
        checkpoint.load(folder, optimizer=optimizer)
        step(2)
        optimizer.wait_pending()
        assert torch.equal(cut.full_tensor(), expected), parts
        assert torch.equal(optimizer.grad_norm, norm), parts


def refusals() -> None:
    mesh = placement(2)
    rank = dist.get_rank()
    shared, own = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))

    def make(ranks: Any, **options: Any) -> None:
        groups = [{"params": [shared]}, {"params": [own], "process_group": ranks}]
        ShardedAdaBelief(groups, **options)

    groups = [dist.new_group(ranks) for ranks in ([0, 1], [1, 2], [0, 1, 2], [3])]
    with pytest.raises(TypeError, match="process_group must be a ProcessGroup"):
        make([0, 1])
    with pytest.raises(ValueError, match=r"rank \d is not in the process_group that it passes"):
        make(groups[0])
    with pytest.raises(ValueError, match="must be equally large, and have each of the ranks once"):
        make(groups[2] if rank < 3 else groups[3])
    with pytest.raises(ValueError, match="ranks disagree about which param groups have"):
        make(mesh["expert_dp"] if rank else None)
    with pytest.raises(ValueError, match="micro_batches does not go together with param groups"):
        make(mesh["expert_dp"], micro_batches=4)
    replicated = torch.nn.Parameter(
        distribute_tensor(torch.zeros(4), mesh["expert"], [Replicate()])
    )
    with pytest.raises(ValueError, match="it must be cut over ranks of the optimizer's"):
        ShardedAdaBelief([{"params": [replicated], "process_group": mesh["expert_dp"]}])


def test_experts(tmp_path: Path) -> None:
    run_ranks(
        4,
        tmp_path,
        skips_everywhere,
        partial(checkpoints_follow_the_experts, tmp_path / "checkpoints"),
        partial(cut_experts_reshard, tmp_path / "cut"),
        refusals,
    )


def test_three_copies_of_experts(tmp_path: Path) -> None:
    run_ranks(6, tmp_path, copies_are_repaired)
