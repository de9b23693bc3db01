"""torch's own get_optimizer_state_dict and set_optimizer_state_dict, with every way to shard."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from belief_dist import checkpoint
from belief_dist.checkpoint import logical_states
from tests.harness.checkpoints import BF16, FP32, build, compare, everything, train
from tests.harness.ranks import run_ranks
from tests.harness.threads import run_threads
from tests.harness.torch_state import continues, steps, whole, wrapped


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
    [(FP32, {}), (BF16, {}), (BF16, {"master": "remainder8", "state_dtype": "bfloat16"})],
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


def test_whole_tensors_are_refused() -> None:
    model, optimizer = build()
    with logical_states(optimizer):
        with pytest.raises(RuntimeError, match="full_state_dict=True asks for whole tensors"):
            get_optimizer_state_dict(
                model, optimizer, options=StateDictOptions(full_state_dict=True)
            )
        get_optimizer_state_dict(model, optimizer)
