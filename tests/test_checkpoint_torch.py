"""torch's own get_optimizer_state_dict and set_optimizer_state_dict, with every way to shard."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from belief_dist import AdaBelief, checkpoint
from belief_dist.checkpoint import logical_states
from models import HYPER
from ranks import run_ranks
from test_checkpoint import BF16, FP32, build, compare, everything, train
from threads import run_threads


def wrapped(kind: str, seed: int) -> tuple[nn.Module, AdaBelief]:
    torch.manual_seed(seed)
    model: Any = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    if kind == "DDP":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model)
    return model, AdaBelief(model.parameters(), **HYPER)


def steps(model: nn.Module, optimizer: AdaBelief, first: int, count: int) -> None:
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        model(torch.randn(4, 7, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    full = getattr(tensor, "full_tensor", None)
    return (full() if full is not None else tensor).detach().clone()


def continues(kind: str, full: bool, run: Path) -> None:
    """A state that has come through torch's functions goes on as if nothing had happened."""
    options = StateDictOptions(full_state_dict=full)
    model, optimizer = wrapped(kind, 0)
    steps(model, optimizer, 0, 3)
    before = [whole(p) for p in model.parameters()]
    saved = {
        "model": get_model_state_dict(model, options=options),
        "optim": get_optimizer_state_dict(model, optimizer, options=options),
    }
    assert all(torch.equal(whole(p), b) for p, b in zip(model.parameters(), before, strict=True))
    other, other_optimizer = wrapped(kind, 1)
    if full:
        target = saved
    else:
        dcp.save(saved, checkpoint_id=run)
        target = {
            "model": get_model_state_dict(other),
            "optim": get_optimizer_state_dict(other, other_optimizer),
        }
        # The fresh optimizer's states were made by a fake step, which has not counted.
        assert {entry["step"] for entry in target["optim"]["state"].values()} == {0}
        dcp.load(target, checkpoint_id=run)
    set_model_state_dict(other, target["model"], options=options)
    set_optimizer_state_dict(other, other_optimizer, target["optim"], options=options)
    assert {int(state["step"]) for state in other_optimizer.state.values()} == {3}
    for each in (model, optimizer), (other, other_optimizer):
        steps(*each, 3, 2)  # type: ignore[arg-type]
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(whole(ours), whole(theirs)), kind
        for key in ("exp_avg", "exp_avg_sq"):
            a, b = optimizer.state[ours][key], other_optimizer.state[theirs][key]
            assert torch.equal(whole(a), whole(b)), f"{kind} {key}"


def save_from(kind: str, run: Path) -> None:
    model, optimizer = wrapped(kind, 0)
    steps(model, optimizer, 0, 3)
    checkpoint.save(run, 3, model=model, optimizer=optimizer, extra={"epoch": 1})
    weights = {"model": get_model_state_dict(model)}
    dcp.save(weights, checkpoint_id=run / "bare")
    for _ in range(2):
        steps(model, optimizer, 3, 1)
    found = {n: whole(p) for n, p in get_model_state_dict(model).items()}
    if dist.get_rank() == 0:
        torch.save(found, run / "later.pt")


def load_into(kind: str, run: Path, exact: bool) -> None:
    """Another way of sharding goes on from the very states: with the bits, if it adds alike."""
    model, optimizer = wrapped(kind, 1)
    steps(model, optimizer, 5, 1)
    loaded = checkpoint.load(run, model=model, optimizer=optimizer)
    assert (loaded.step, loaded.extra) == (3, {"epoch": 1})
    other, _ = wrapped(kind, 2)
    weights = get_model_state_dict(other)
    dcp.load({"model": weights}, checkpoint_id=run / "bare")
    for name, value in get_model_state_dict(model).items():
        assert torch.equal(whole(value), whole(weights[name])), (kind, name)
    for _ in range(2):
        steps(model, optimizer, 3, 1)
    expected = torch.load(run / "later.pt", weights_only=True)
    for name, value in get_model_state_dict(model).items():
        if exact:
            assert torch.equal(whole(value), expected[name]), (kind, name)
        # All ranks see the same data, so only the mean over 3 instead of 2 rounds otherwise.
        torch.testing.assert_close(whole(value), expected[name], rtol=1e-4, atol=1e-5)


def test_save_under_ddp_and_fsdp2(tmp_path: Path) -> None:
    """`checkpoint.save` at 2 ranks, `checkpoint.load` at 2 and 3, from and to either."""
    kinds = ("DDP", "FSDP2")
    run_ranks(2, tmp_path, *(partial(save_from, kind, tmp_path / kind) for kind in kinds))
    for ranks in (2, 3):
        cases = [
            partial(load_into, to, tmp_path / saved, exact=ranks == 2 and saved == to)
            for saved in kinds
            for to in kinds
        ]
        run_ranks(ranks, tmp_path, *cases)


def test_ddp_and_fsdp2(tmp_path: Path) -> None:
    run_ranks(
        2,
        tmp_path,
        *(
            partial(continues, kind, full, tmp_path / f"{kind}{full}")
            for kind in ("DDP", "FSDP2")
            for full in (False, True)
        ),
    )


def save(run: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    model, optimizer = build(dtype, **options)
    train(model, optimizer, range(3))
    with logical_states(optimizer):
        optim = get_optimizer_state_dict(model, optimizer)
        dcp.save({"optim": optim, "model": get_model_state_dict(model)}, checkpoint_id=run)
    found = everything(model, optimizer)
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(found, run / "expected.pt")


def load(run: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    model, optimizer = build(dtype, seed=4, **options)
    weights = get_model_state_dict(model)
    with logical_states(optimizer):
        optim = get_optimizer_state_dict(model, optimizer)
        dcp.load({"optim": optim, "model": weights}, checkpoint_id=run)
        set_model_state_dict(model, weights)
        set_optimizer_state_dict(model, optimizer, optim)
    expected = torch.load(run / "expected.pt", weights_only=False)
    compare(everything(model, optimizer), expected, f"{options}")


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(FP32, {}), (BF16, {}), (BF16, {"master": "remainder", "state_dtype": "bfloat16"})],
)
def test_sharded(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    run_threads(3, partial(save, tmp_path, dtype, options))
    for ranks in (1, 2):
        run_threads(ranks, partial(load, tmp_path, dtype, options))


def test_a_shard_is_not_taken_for_the_whole() -> None:
    model, optimizer = build()
    with pytest.raises(RuntimeError, match="is this rank's shard, which get_optimizer_state_dict"):
        get_optimizer_state_dict(model, optimizer)
    model, optimizer = build(state_dtype="uint8")
    with pytest.raises(ValueError, match="states of 8 bits do not fit into torch's"):
        with logical_states(optimizer):
            pass
