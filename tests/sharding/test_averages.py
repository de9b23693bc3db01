"""Averages of the weights: kept in the pass of the update, and lent without a trace."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from belief_dist import AdaBelief, ShardedAdaBelief, checkpoint, cli
from belief_dist.checkpoint.errors import CheckpointError
from belief_dist.checkpoint.formats.safetensors import read_safetensors
from tests.harness.checkpoints import BF16, FP32, Odd, build, groups, load, save, train
from tests.harness.models import HYPER, SHAPES, make_grad, make_params
from tests.harness.ranks import run_ranks
from tests.harness.reference import backward, collect
from tests.harness.sharded_cases import equals_reference
from tests.harness.threads import run_threads

pytestmark = pytest.mark.filterwarnings("ignore:offload='cpu' updates on 1 thread")

KEEP: dict[str, Any] = {"ema_decay": 0.9}
NARROW = {"ema_decay": 0.9, "ema_dtype": torch.bfloat16}
HALVES: dict[str, Any] = {"dtype": torch.bfloat16, "master": "remainder"}
FORMS: list[dict[str, Any]] = [
    {},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float16},
    {"dtype": torch.float64},
    HALVES,
    {**HALVES, "state_dtype": torch.uint8, "stage": 2},
    {"state_dtype": torch.bfloat16},
    {"offload": "cpu"},
    {**HALVES, "master": "remainder8", "offload": "cpu"},
]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_equals_one_process_bit_for_bit(world_size: int, tmp_path: Path) -> None:
    """Averages of parameters without a gradient stay, as their states do."""
    more = [{"unused": True}, {"options": {"amsgrad": True}, "micro_batches": 2, "stage": 2}]
    kept = [KEEP, NARROW]
    cases = [
        partial(equals_reference, 1500, True, **{**form, **each, **keep})
        for (form, keep), each in zip(
            itertools.product(FORMS, kept), itertools.cycle(more), strict=False
        )
        if not (keep is NARROW and form.get("dtype") == torch.float64)
    ]
    run_ranks(world_size, tmp_path, *cases)


def over_rows() -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    params, optimizer = new(process_group=mesh, **KEEP)
    alone = make_params()
    twin = ShardedAdaBelief(named(alone), process_group=dist.new_subgroups(1)[0], **KEEP, **HYPER)
    for step in (1, 2, 3):
        one_step(optimizer, params, step, rank=0)
        one_step(twin, alone, step, rank=0)
    assert all(map(torch.equal, averages_of(optimizer, params), averages_of(twin, alone)))


def test_on_a_mesh_of_rows(tmp_path: Path) -> None:
    run_ranks(4, tmp_path, over_rows)


def named(params: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return [(f"p{index}", param) for index, param in enumerate(params)]


def new(
    dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[list[nn.Parameter], ShardedAdaBelief]:
    params = make_params(dtype)
    return params, ShardedAdaBelief(named(params), bucket_bytes=1500, **{**HYPER, **options})


def one_step(
    optimizer: ShardedAdaBelief,
    params: list[nn.Parameter],
    step: int,
    *,
    rank: int | None = None,
    scale: float = 1.0,
) -> None:
    rank = optimizer.comm.rank if rank is None else rank
    grads = [make_grad(s, step, rank, i).to(params[i].dtype) * scale for i, s in enumerate(SHAPES)]
    backward(params, grads)
    optimizer.step()
    optimizer.zero_grad()


def averages_of(optimizer: ShardedAdaBelief, params: list[nn.Parameter]) -> list[Tensor]:
    with optimizer.averaged_parameters():
        return [param.detach().clone() for param in params]


# - The oracle


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.999])
def test_it_is_the_average_of_torch(decay: float) -> None:
    model, optimizer = build(ema_decay=decay)
    twin = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    twin.update_parameters(model)  # its first call copies: ours starts from the weights, too
    params = list(model.parameters())
    for step in range(1, 30):
        generator = torch.Generator().manual_seed(step)
        grads = [torch.randn(param.shape, generator=generator) for param in params]
        trains = [param.requires_grad for param in params]
        backward(params, [g if its else None for g, its in zip(grads, trains, strict=True)])
        optimizer.step()
        optimizer.zero_grad()
        twin.update_parameters(model)
    with optimizer.averaged_parameters():
        for ours, theirs in zip(params, twin.module.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-7)


def test_bfloat16_has_no_bias() -> None:
    """1 / 2048 of the way each step is less than bfloat16 resolves; rounded to nearest it stays."""
    weights = torch.nn.Parameter(torch.zeros(100_000))
    optimizer = ShardedAdaBelief([weights], lr=0.0, ema_decay=1 - 1 / 2048, ema_dtype="bfloat16")
    weights.grad = torch.ones_like(weights)
    optimizer.step()
    weights.data.fill_(1.0)
    optimizer.state[weights]["param_ema"].fill_(0.5)
    for _ in range(512):
        optimizer.step()
    expected = 1.0 - 0.5 * (1 - 1 / 2048) ** 512
    found = optimizer.state[weights]["param_ema"]
    assert found.dtype == torch.bfloat16 and found.numel() == 100_000
    assert abs(found.double().mean().item() - expected) < 1e-4


# - In the parameters


def leaves_no_trace(form: dict[str, Any]) -> None:
    """Training with an evaluation after every step has the bits of training without."""
    form = {**form}
    dtype = form.pop("dtype", torch.float32)
    params, optimizer = new(dtype, **KEEP, **form)
    others, twin = new(dtype, **KEEP, **form)
    module = nn.ParameterList(params)
    for step in range(1, 6):
        one_step(optimizer, params, step)
        one_step(twin, others, step)
        before = [param.detach().clone() for param in others]
        whole = collect(twin, ["param_ema"])[0]
        with optimizer.averaged_parameters():
            for param, average in zip(params, whole, strict=True):
                assert torch.equal(param.detach().reshape(-1), average.to(dtype))
            if step == 2:  # none of this is training
                with torch.no_grad():
                    for param in params:
                        param.add_(1)
            if step == 3:
                module.double()
                module.to(dtype)
            if step == 4:
                for param in params:
                    param.data = torch.zeros_like(param)
        if step == 5:
            with pytest.raises(KeyError, match="evaluation"), optimizer.averaged_parameters():
                raise KeyError("evaluation")
        assert all(map(torch.equal, params, before)), step
        for param, other in zip(params, others, strict=True):
            for key, value in twin.state[other].items():
                assert torch.equal(*map(torch.as_tensor, (optimizer.state[param][key], value)))
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_they_leave_no_trace(world_size: int, tmp_path: Path) -> None:
    more = [{"check_states": True}, {"overlap": False}, {"shared_memory": False}]
    cases = [partial(leaves_no_trace, form) for form in [*FORMS, *more]]
    run_ranks(world_size, tmp_path, *cases)


def refuses_to_train(stage: Any, tmp: Path) -> None:
    params, optimizer = new(stage=stage, **KEEP)
    one_step(optimizer, params, 1)
    module = nn.ParameterList(params)
    shard = optimizer.state_dict()
    tries: list[Callable[[], object]] = [
        lambda: backward(params, [torch.ones_like(p) for p in params]),
        optimizer.step,
        lambda: checkpoint.save(tmp, 1, model=module, optimizer=optimizer),
        lambda: optimizer.load_state_dict(shard),
        lambda: optimizer.add_param_group({"params": [("new", nn.Parameter(torch.ones(3)))]}),
        optimizer.restart_averages,
        optimizer.rebuild,
        optimizer.averaged_parameters().__enter__,
    ]
    before = [param.detach().clone() for param in params]
    with optimizer.averaged_parameters():
        for each in tries:
            with pytest.raises((RuntimeError, CheckpointError), match="leave it before backward"):
                each()
    optimizer.zero_grad()
    assert all(map(torch.equal, params, before))
    one_step(optimizer, params, 2)
    backward(params, [torch.ones_like(p) for p in params])
    with pytest.raises(RuntimeError, match=r"call it after step\(\)"):
        averages_of(optimizer, params)
    optimizer.step()


def test_training_inside_is_an_error(tmp_path: Path) -> None:
    run_ranks(2, tmp_path, *(partial(refuses_to_train, stage, tmp_path / "r") for stage in (1, 2)))


def test_without_the_option() -> None:
    params, optimizer = new()
    for each in (optimizer.averaged_parameters().__enter__, optimizer.restart_averages):
        with pytest.raises(RuntimeError, match=re.escape("optimizer with ema_decay=0.999")):
            each()
    assert "param_ema" not in optimizer.state[params[0]]
    assert "averages" not in optimizer.bytes_per_rank()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ema_decay": 1.0}, "ema_decay must be > 0 and < 1, or None, got 1.0."),
        ({"ema_decay": 0}, "ema_decay must be > 0 and < 1"),
        ({"ema_decay": float("nan")}, "ema_decay must be"),
        ({"ema_dtype": "bfloat16"}, "ema_dtype=torch.bfloat16 needs ema_decay"),
        ({**KEEP, "ema_dtype": torch.uint8}, "ema_dtype must be torch.float32 or torch.bfloat16"),
        ({"dtype": torch.float64, **NARROW}, "would narrow the average of float64 parameter"),
    ],
)
def test_values_that_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        new(**options)


# - When it moves


def test_it_starts_from_weights_that_are_loaded_before_the_first_step() -> None:
    for form in FORMS:
        params, optimizer = new(**KEEP, **form)
        with torch.no_grad():
            params[7].fill_(3.0)  # counts a version up
        params[6].data.fill_(2.0)  # counts none
        lent = averages_of(optimizer, params)
        assert all(map(torch.equal, lent, params))
        one_step(optimizer, params, 1)
        lent = averages_of(optimizer, params)
        for index, start in ((6, 2.0), (7, 3.0)):
            weight = 1.0 - 0.9
            way = (params[index] - start).double() * weight
            assert torch.allclose(lent[index].double(), start + way, atol=2e-2), form
        optimizer.restart_averages()
        lent = averages_of(optimizer, params)
        if form.get("master") == "remainder8":
            # One master of 24 bits in 256 lies between two bfloat16 numbers, and averages of such
            # become the even one, parameters the larger one.
            for mean, param in zip(lent, params, strict=True):
                assert torch.allclose(mean, param, rtol=2**-7, atol=0.0)
        else:
            assert all(map(torch.equal, lent, params))


def skipped(dtype: torch.dtype) -> None:
    params, optimizer = new(dtype, **KEEP)
    one_step(optimizer, params, 1)
    before = averages_of(optimizer, params)
    one_step(optimizer, params, 2, scale=float("nan" if dist.get_rank() == 1 else 1.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    loss = sum((p.float().sum() for p in params), torch.zeros(())) * float("inf")
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert optimizer.skipped_steps == 2 and scaler.get_scale() == 2.0**9
    assert all(map(torch.equal, averages_of(optimizer, params), before))
    one_step(optimizer, params, 3)
    after = averages_of(optimizer, params)
    assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True) if a.numel())


def test_a_step_that_is_skipped_does_not_count(tmp_path: Path) -> None:
    run_ranks(2, tmp_path, *(partial(skipped, d) for d in (torch.float32, torch.float16)))


# - Saved and loaded


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (FP32, KEEP),
        (FP32, NARROW),
        (BF16, {**KEEP, "master": "remainder8", "state_dtype": "uint8"}),
        (BF16, {**NARROW, "stage": 2, "offload": "cpu"}),
    ],
)
def test_any_number_of_ranks_loads_them(
    tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    for before, after in ((1, (3,)), (3, (1, 2)), (4, (5,))):
        run = tmp_path / str(before)
        run_threads(before, partial(save, run, dtype, options))
        for ranks in after:
            more = {**options, "bucket_bytes": 700 * ranks, "stage": 2}
            run_threads(ranks, partial(load, run, dtype, more))


def lent_by(model: Odd, optimizer: ShardedAdaBelief) -> dict[str, Tensor]:
    with optimizer.averaged_parameters():
        return {name: value.detach().clone() for name, value in model.named_parameters()}


def groups_of_one(model: Odd) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k != "clip"} for group in groups(model)]


@pytest.mark.parametrize("form", [{}, {"master": "remainder8"}], ids=str)
def test_a_checkpoint_without_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, form: dict[str, Any]
) -> None:
    model, optimizer = build(BF16, **form)
    train(model, optimizer, range(3))
    checkpoint.save(tmp_path, 3, model=model, optimizer=optimizer)
    model, optimizer = build(BF16, seed=5, **form, **KEEP)
    train(model, optimizer, range(2))
    with caplog.at_level(logging.INFO, "belief_dist"):
        checkpoint.load(tmp_path, model=model, optimizer=optimizer)
    assert "averages were not saved and start from the weights that are read" in caplog.text
    lent = lent_by(model, optimizer)
    assert all(torch.equal(lent[name], value) for name, value in model.named_parameters())
    own = optimizer.state[model.embed.weight]
    if "master" in own:
        assert torch.equal(own["param_ema"], own["master"])
    # And the other way round.
    checkpoint.save(tmp_path, 4, model=model, optimizer=optimizer)
    model, optimizer = build(BF16, seed=5, **form)
    loaded = checkpoint.load(tmp_path, model=model, optimizer=optimizer)
    assert loaded.changes == ["averages of the weights are left out: none are kept here"]
    single = AdaBelief(groups_of_one(model), **HYPER)
    again = checkpoint.load(tmp_path, optimizer=single)
    assert loaded.changes[0] in again.changes and "param_ema" not in single.state[model.norm]


def test_a_shard_without_them(caplog: pytest.LogCaptureFixture) -> None:
    params, optimizer = new(**KEEP)
    for step in (1, 2):
        one_step(optimizer, params, step)
    shard = optimizer.state_dict()
    others, twin = new(**KEEP)
    for param, other in zip(params, others, strict=True):
        other.data.copy_(param)
    twin.load_state_dict(shard)
    expected = averages_of(optimizer, params)
    assert all(map(torch.equal, averages_of(twin, others), expected))
    plain_params, plain = new()
    plain.load_state_dict(shard)
    assert "param_ema" not in plain.state[plain_params[0]]
    assert not caplog.records
    with caplog.at_level(logging.INFO, "belief_dist"):
        twin.load_state_dict(plain.state_dict())
    assert "holds no averages: they start from the weights" in caplog.text
    assert all(map(torch.equal, averages_of(twin, others), others))


def test_logical_states_hold_them() -> None:
    params, optimizer = new(**KEEP)
    one_step(optimizer, params, 1)
    with checkpoint.logical_states(optimizer):
        saved = optimizer.state_dict()
    others, twin = new(**KEEP)
    for param, other in zip(params, others, strict=True):
        other.data.copy_(param)
    with checkpoint.logical_states(twin):
        twin.load_state_dict(saved)
    expected = averages_of(optimizer, params)
    assert all(map(torch.equal, averages_of(twin, others), expected))
    for entry in saved["state"].values():
        del entry["param_ema"]
    with checkpoint.logical_states(twin):
        twin.load_state_dict(saved)
    assert all(map(torch.equal, averages_of(twin, others), others))


def test_exported_to_safetensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("safetensors")
    model, optimizer = build(BF16, **KEEP)
    train(model, optimizer, range(3))
    run, file = tmp_path / "run", tmp_path / "model.safetensors"
    checkpoint.save(run, 3, model=model, optimizer=optimizer)
    words = ["checkpoint", "convert", str(run), str(file), "--to"]
    assert cli.main([*words, "safetensors", "--averages"]) == 0
    found = read_safetensors(file)
    with optimizer.averaged_parameters():
        expected = {name: value.clone() for name, value in model.state_dict().items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert cli.main([*words, "torch", "--averages"]) == 2
    assert "weights to use: to 'safetensors', not 'torch'" in capsys.readouterr().err
    model, optimizer = build(BF16)
    checkpoint.save(tmp_path / "other", 1, model=model, optimizer=optimizer)
    words[2] = str(tmp_path / "other")
    assert cli.main([*words, "safetensors", "--averages"]) == 2
    assert "holds no averages of the weights" in capsys.readouterr().err
