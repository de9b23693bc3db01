"""Checkpoints: saved at N ranks, loaded at M, with the bits of a run that never stopped."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from belief_dist import AdaBelief, ShardedAdaBelief, checkpoint
from belief_dist.state_formats import (
    NEAREST8,
    decode_m,
    decode_s,
    encode_m,
    encode_s,
    join_master,
    split_master,
    split_rounded_master,
)
from tests.harness.checkpoints import (
    BF16,
    FP32,
    Odd,
    build,
    compare,
    everything,
    groups,
    load,
    save,
    train,
)
from tests.harness.models import HYPER, make_grad
from tests.harness.ranks import run_ranks
from tests.harness.reference import backward
from tests.harness.threads import run_threads


@pytest.mark.parametrize("before", [1, 2, 3, 4, 5])
def test_any_number_of_ranks(tmp_path: Path, before: int) -> None:
    run_threads(before, partial(save, tmp_path, torch.float32, {}))
    for after in (1, 2, 3, 4, 5):
        run_threads(after, partial(load, tmp_path, torch.float32, {"bucket_bytes": 700 * after}))


def logical(optimizer: ShardedAdaBelief) -> dict[str, torch.Tensor]:
    """Return weights and states as float32 numbers, whole and in memory order, on every rank."""
    optimizer.wait_pending()
    found: dict[str, torch.Tensor] = {}
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    for index, name in enumerate(names):
        mine = optimizer.fragment_tensors(index)
        mine.pop("wire_error", None)
        everyone = optimizer.comm.exchange(mine)[: optimizer.comm.num_shards]
        whole = {key: torch.cat([theirs[key] for theirs in everyone]) for key in mine}
        master = whole["param"].float()
        if "remainder" in whole:
            master = join_master(whole["param"], whole["remainder"])
        found[f"{name} master"] = master
        for key, decode in [("exp_avg", decode_m), ("exp_avg_sq", decode_s)]:
            value = whole[key]
            if value.dtype == torch.uint8:
                value = decode(value, whole[f"{key}_exponent"])
            found[f"{name} {key}"] = value.float()
    return found


def save_logical(run: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    model, optimizer = build(dtype, **options)
    train(model, optimizer, range(3))
    checkpoint.save(run, 3, model=model, optimizer=optimizer)
    whole = logical(optimizer)
    if dist.get_rank() == 0:
        torch.save(whole, run / "expected.pt")


def load_logical(
    run: Path, dtype: torch.dtype, options: dict[str, Any], rounds: str, say: str
) -> None:
    model, optimizer = build(dtype, seed=5, **options)
    loaded = checkpoint.load(run, model=model, optimizer=optimizer)
    assert say in "; ".join(loaded.changes) if say else not loaded.changes
    expected = torch.load(run / "expected.pt")
    found = logical(optimizer)
    for key, value in found.items():
        if rounds == "bfloat16" and "exp_avg" in key:
            expected[key] = expected[key].bfloat16().float()
        if rounds == "8 bits" and "exp_avg" in key:
            encode, decode = (encode_m, decode_m) if key.endswith("avg") else (encode_s, decode_s)
            nearest = torch.full(value.shape, 1 << 15)
            expected[key] = decode(*encode(expected[key], nearest))
        if rounds == "24 bits" and "master" in key:
            expected[key] = join_master(*split_rounded_master(expected[key], NEAREST8))
        assert torch.equal(value, expected[key]), f"{options}: {key}"
    # The parameters are what such masters make of them, on every rank.
    named = dict(model.named_parameters())
    for name, param in named.items():
        master = expected[f"{name} master"]
        halves = "master" in options
        low = split_master(master)[0] if halves else master.to(dtype)
        order = param.permute(0, 2, 3, 1) if param.ndim == 4 else param
        assert torch.equal(order.detach().reshape(-1), low), name


REMAINDER, SMALL = {"master": "remainder"}, {"state_dtype": "bfloat16"}
BYTE, REMAINDER8 = {"state_dtype": "uint8"}, {"master": "remainder8"}


@pytest.mark.parametrize(
    ("before", "after", "rounds", "say"),
    [
        ((BF16, {}), (BF16, {"stage": 2, "overlap": False}), "", ""),
        ((BF16, {}), (BF16, REMAINDER), "", ""),
        ((BF16, REMAINDER), (BF16, {"reduction": "native"}), "", ""),
        ((FP32, {"stage": 2}), (BF16, REMAINDER), "", ""),
        ((BF16, REMAINDER | BYTE), (FP32, BYTE), "", ""),
        ((FP32, SMALL), (FP32, {}), "", "exp_avg were saved as bfloat16 and are read as float32"),
        ((FP32, {}), (BF16, SMALL), "bfloat16", "as float32 and are read as bfloat16, rounded"),
        ((FP32, BYTE), (FP32, {}), "", "exp_avg_sq were saved as uint8 and are read as float32"),
        ((FP32, BYTE), (FP32, {"offload": "cpu"}), "", "as uint8 and are read as float32, exactly"),
        ((FP32, {}), (BF16, REMAINDER | BYTE), "8 bits", "as float32 and are read as uint8"),
        ((BF16, {"offload": "cpu"} | REMAINDER), (BF16, {"offload": "cpu"}), "", ""),
        ((BF16, {}), (BF16, {"offload": "cpu"} | REMAINDER), "", ""),
        ((BF16, REMAINDER), (BF16, REMAINDER8), "24 bits", "with 32 bits and are read with 24"),
        ((BF16, REMAINDER8), (BF16, REMAINDER), "", ""),
        ((BF16, REMAINDER8), (BF16, REMAINDER8 | {"offload": "cpu"}), "", ""),
        ((BF16, {"reduce_dtype": "bfloat16"}), (FP32, {}), "", ""),
    ],
)
def test_another_form(
    tmp_path: Path, before: tuple[Any, Any], after: tuple[Any, Any], rounds: str, say: str
) -> None:
    """Masters and states are the same numbers wherever their form can hold them."""
    run_threads(3, partial(save_logical, tmp_path, *before))
    for ranks in (2, 4):
        run_threads(ranks, partial(load_logical, tmp_path, *after, rounds, say))


def plant(model: Odd, optimizer: ShardedAdaBelief, expected: dict[str, Any]) -> None:
    """Give a fresh optimizer a state by other means than a checkpoint."""
    model.load_state_dict({name: expected[name] for name in model.state_dict()})
    optimizer.wait_pending()
    index = 0
    for number, group in enumerate(optimizer.param_groups):
        for name, param in zip(group["param_names"], group["params"], strict=True):
            part = optimizer.layout.fragment(index, optimizer.comm.shard_index)
            state = optimizer.state[param]
            for key, value in state.items():
                if key == "step":
                    continue
                scale = 256 if key.endswith("_exponent") else 1
                start = part.in_param // scale
                value.copy_(expected[f"{name} {key}"][start : start + value.numel()])
            state["step"] = expected[f"{name} step"]
            index += 1
        group.update(expected["groups"][number])


def continues(run: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Loaded, and never stopped: the same next steps at this world size."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    expected = torch.load(run / "expected.pt", weights_only=False)
    results = []
    for way in ("planted", "loaded"):
        model, optimizer = build(dtype, seed=5, **options)
        if way == "planted":
            plant(model, optimizer, expected)
        else:
            checkpoint.load(run, model=model, optimizer=optimizer)
        train(model, optimizer, range(3 + 10 * rank, 6 + 10 * rank))
        results.append(everything(model, optimizer))
    compare(*results, f"{options}")


def mesh(rows: int, columns: int) -> Any:
    return dist.init_device_mesh("cpu", (rows, columns)) if dist.is_initialized() else None


def over_mesh(case: Any, rows: int, columns: int, *arguments: Any) -> None:
    *rest, options = arguments
    case(*rest, {**options, "process_group": mesh(rows, columns)})


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(FP32, {}), (BF16, REMAINDER), (BF16, REMAINDER8 | BYTE), (FP32, SMALL | {"stage": 2})],
)
@pytest.mark.parametrize(("before", "after"), [(4, 1), (1, 3), (5, 2)])
def test_the_next_steps(
    tmp_path: Path, dtype: torch.dtype, options: Any, before: int, after: int
) -> None:
    run_threads(before, partial(save, tmp_path, dtype, options))
    run_threads(after, partial(continues, tmp_path, dtype, options))


def among(ranks: int, case: Any, *arguments: Any) -> None:
    """Run a case on the first ranks alone."""
    group = dist.new_group(list(range(ranks)))
    if dist.get_rank() < ranks:
        *rest, options = arguments
        case(*rest, {**options, "process_group": group})


def test_between_processes(tmp_path: Path) -> None:
    """With messages between processes: 4 to 1, 1 to 3, 3 to 4; also from and to copies."""
    a, b, c, d = [tmp_path / name for name in "abcd"]
    for folder in (a, b, c, d):
        folder.mkdir()
    run_ranks(
        4,
        tmp_path,
        partial(save, a, FP32, {}),
        partial(over_mesh, save, 2, 2, d, BF16, REMAINDER),
        partial(among, 1, continues, a, FP32, {}),
        partial(among, 1, save, b, BF16, REMAINDER),
        partial(among, 3, continues, b, BF16, REMAINDER),
        partial(among, 3, load, d, BF16, REMAINDER),
        partial(among, 3, save, c, FP32, BYTE),
        partial(continues, c, FP32, BYTE),
        partial(over_mesh, continues, 2, 2, c, FP32, BYTE),
        partial(over_mesh, load, 4, 1, a, FP32, {}),
    )


def save_errors(run: Path) -> None:
    model, optimizer = build(reduce_dtype="int8")
    rank = dist.get_rank()
    train(model, optimizer, range(10 * rank, 10 * rank + 3))
    checkpoint.save(run, 3, model=model, optimizer=optimizer)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    errors = [optimizer.state[p]["wire_error"] for p in params]
    everyone = optimizer.comm.exchange(errors)
    if rank == 0:
        torch.save(everyone, run / "errors.pt")


def load_errors(run: Path, before: int) -> None:
    model, optimizer = build(seed=3, reduce_dtype="int8")
    loaded = checkpoint.load(run, model=model, optimizer=optimizer)
    ranks = dist.get_world_size()
    assert bool(loaded.changes) == (ranks != before)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    saved = torch.load(run / "errors.pt")
    everyone = optimizer.comm.exchange([optimizer.state[p]["wire_error"] for p in params])
    for index in range(len(params)):
        theirs = [errors[index] for errors in saved]
        ours = [errors[index] for errors in everyone]
        if ranks == before:
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        # Rounded once for each scale and sum, in float32.
        mean = torch.stack(theirs).double().mean(0)
        torch.testing.assert_close(torch.stack(ours).double().mean(0), mean, rtol=1e-5, atol=1e-6)


def test_wire_errors(tmp_path: Path) -> None:
    """Each rank has its own again; another number of ranks, as much of them in the mean."""
    run_threads(3, partial(save_errors, tmp_path))
    assert any(errors.any() for errors in torch.load(tmp_path / "errors.pt")[2])
    for ranks in (1, 2, 3, 5):
        run_threads(ranks, partial(load_errors, tmp_path, 3))


def test_loss_scale_and_skipped_steps(tmp_path: Path) -> None:
    def new() -> tuple[Odd, ShardedAdaBelief, torch.amp.GradScaler]:
        return *build(), torch.amp.GradScaler("cpu", init_scale=2.0**30)

    model, optimizer, scaler = new()
    for param in model.parameters():
        param.grad = torch.full_like(param, torch.inf)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    checkpoint.save(tmp_path, 1, model=model, optimizer=optimizer, scaler=scaler)
    model, optimizer, other = new()
    checkpoint.load(tmp_path, model=model, optimizer=optimizer, scaler=other)
    assert optimizer.skipped_steps == 1
    assert other.state_dict() == scaler.state_dict() != new()[2].state_dict()


def plain_step(model: Odd, optimizer: Any, step: int) -> None:
    backward(
        list(model.parameters()),
        [
            make_grad(tuple(p.shape), step, 0, i) if p.requires_grad else None
            for i, p in enumerate(model.parameters())
        ],
    )
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("direction", ["to sharded", "from sharded"])
def test_the_optimizer_of_one_device(tmp_path: Path, direction: str) -> None:
    """AdaBelief reads what ShardedAdaBelief has written, and the other way round."""
    results = []

    def plain_groups(model: Odd) -> list[dict[str, Any]]:
        made = groups(model)
        made[1].pop("clip")
        return made

    first: Any = Odd(FP32, 0)
    if direction == "to sharded":
        first_optimizer: Any = AdaBelief(plain_groups(first), **HYPER)
    else:
        first_optimizer = ShardedAdaBelief(groups(first), **HYPER)
    for step in range(3):
        plain_step(first, first_optimizer, step)
    checkpoint.save(tmp_path, 3, model=first, optimizer=first_optimizer)
    for kind in ("plain", "sharded"):
        model = Odd(FP32, 9)
        optimizer: Any = (
            AdaBelief(plain_groups(model), **HYPER)
            if kind == "plain"
            else ShardedAdaBelief(groups(model), **HYPER)
        )
        checkpoint.load(tmp_path, model=model, optimizer=optimizer)
        for step in range(3, 5):
            plain_step(model, optimizer, step)
        results.append(model.state_dict())
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_weights_alone(tmp_path: Path) -> None:
    """Without an optimizer; and plain DCP reads them, tied ones under both names."""
    model, optimizer = build(BF16)
    train(model, optimizer, range(2))
    saved = checkpoint.save(tmp_path, 2, model=model, optimizer=optimizer)
    other = Odd(BF16, 8)
    loaded = checkpoint.load(tmp_path, model=other)
    assert loaded.changes == [
        "weights were saved as float32 and are read as bfloat16, rounded to nearest"
    ]
    third = Odd(BF16, 9)
    target = {"model": third.state_dict()}
    with warnings.catch_warnings(action="ignore"):
        dcp.load(target, checkpoint_id=saved.path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
        assert torch.equal(value, third.state_dict()[name]), name
    checkpoint.save(tmp_path / "weights", 0, model=model)
    checkpoint.load(tmp_path / "weights", model=other)
    with pytest.raises(checkpoint.CheckpointError, match="it holds weights alone, and no optim"):
        checkpoint.load(tmp_path / "weights", optimizer=optimizer)


def test_an_optimizer_alone(tmp_path: Path) -> None:
    model, optimizer = build()
    train(model, optimizer, range(2))
    checkpoint.save(tmp_path, 2, optimizer=optimizer)
    other, other_optimizer = build(seed=3)
    checkpoint.load(tmp_path, optimizer=other_optimizer)
    for (name, param), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(param, theirs), name
