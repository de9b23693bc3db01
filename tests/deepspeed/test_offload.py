"""AdaBelief under ZeRO-Offload, ZeRO-Offload++ and ZeRO-Infinity, on 2 CPU ranks.

Nothing is pinned here and nothing is copied to another device: there is no GPU. What moves between
parameters, masters and files is real.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import belief_dist
from belief_dist.deepspeed.offload import align_gradients
from offload_job import (
    OPTIONS,
    SAVED_AT,
    STEPS,
    WORLD_SIZE,
    make_batch,
    make_model,
    param_groups,
)
from tests.harness.launch import largest_difference, launch

JOB = Path(__file__).with_name("offload_job.py")
SAME = ("1 cpu", "2 cpu", "2 callable", "2 instance", "3 cpu", "3 ratio", "3 params")


def run_parts(folder: Path, *parts: str) -> Callable[[str], list[dict[str, Any]]]:
    """Give a function name -> what each rank saved; a launch for each part, one after another."""
    for part in parts:
        launch(folder, part, job=[JOB])
    return lambda name: [torch.load(folder / f"{name}.{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_parts(tmp_path_factory.mktemp("offload"), "first")


def unsharded() -> list[dict[str, torch.Tensor]]:
    model = make_model()
    optimizer = belief_dist.AdaBelief(param_groups(model), **OPTIONS)
    trajectory = []
    for step in range(STEPS):
        inputs, targets = make_batch(step)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
        trajectory.append({n: p.detach().clone() for n, p in model.named_parameters()})
    return trajectory


def equal(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


def test_offloaded_training_has_the_bits_of_training_on_the_device(run):
    for name in SAME:
        for offloaded, plain in zip(run(name), run(name[0]), strict=True):
            assert offloaded["optimizer"] == "AdaBelief"
            assert offloaded["steps"] == {STEPS}
            assert equal(offloaded["trajectory"], plain["trajectory"]), name


def test_training_is_that_of_one_process(run):
    expected = unsharded()
    for stage in ("1", "2", "3"):
        for result in run(stage):
            for ours, theirs in zip(result["trajectory"], expected, strict=True):
                # Gradients are added in another order: float32 rounding.
                assert largest_difference(ours, theirs) < 2e-5


def test_16_bit_masters_keep_float32_states(run):
    for name in ("2 bf16 masters", "3 bf16 masters"):
        for result in run(name):
            assert result["dtypes"] == {torch.float32}
            assert all(torch.isfinite(value).all() for value in result["trajectory"][-1].values())


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("2 forced", "You are using ZeRO-Offload with a client provided optimizer"),
        ("1 elastic", "elastic_checkpoint saves no hyperparameters"),
        ("2 bf16 states", "bf16_optimizer_states is not for AdaBelief"),
        ("3 bf16 states", "bf16_optimizer_states is not for AdaBelief"),
        ("2 bf16 on device", "need offload_optimizer with device cpu"),
        ("3 bf16 on device", "need offload_optimizer with device cpu"),
    ],
)
def test_what_cannot_be_is_refused(run, name, sentence):
    for result in run(name):
        assert sentence in result["error"]


def test_gradients_are_read_from_nvme_to_aligned_places():
    """Of several in one sub-group, each beginning where the one before has ended."""
    optimizer = belief_dist.AdaBelief([torch.ones(1)])
    swapper = SimpleNamespace(
        optimizer=optimizer, numel_alignment=256, is_swappable_tensor=lambda t: t.numel() >= 1024
    )
    given = [torch.arange(4500.0), torch.arange(3000.0), torch.arange(9.0), torch.arange(1024.0)]
    starts = [0, 4500, 7500, 7509]

    def original(asked: Any, tensors: list[torch.Tensor], offsets: list[int]) -> Any:
        assert asked is swapper
        return tensors, offsets

    def pieces(kind: type) -> list[tuple[int, int]]:
        tensors, offsets = align_gradients(kind, original, swapper, given, starts)
        whole = torch.full((7509 + 1024,), torch.nan)
        for tensor, offset in zip(tensors, offsets, strict=True):
            whole[offset : offset + len(tensor)] = tensor
        assert torch.equal(whole, torch.cat(given))
        return [(offset, len(t)) for t, offset in zip(tensors, offsets, strict=True)]

    expected = [(0, 4500), (4500, 108), (4608, 2892), (7500, 9), (7509, 171), (7680, 853)]
    assert pieces(belief_dist.AdaBelief) == expected
    assert pieces(belief_dist.ShardedAdaBelief) == list(zip(starts, map(len, given), strict=True))


@pytest.mark.nvme
def test_states_on_nvme_are_those_in_memory_and_come_back(tmp_path):
    run = run_parts(tmp_path, "nvme", "resumed")
    for plain, before, after in zip(run("3"), run("3 nvme"), run("resumed"), strict=True):
        trajectory = before["trajectory"]
        assert equal(
            trajectory[:SAVED_AT], plain["trajectory"][:SAVED_AT]
        )  # then its lr is changed
        assert equal([after["loaded"]], [trajectory[SAVED_AT - 1]])
        assert equal(after["trajectory"], trajectory[SAVED_AT:])
        assert equal(after["again"], trajectory[SAVED_AT:])
        assert [group["lr"] for group in after["options"]] == [OPTIONS["lr"], 0.005]
        assert [group["weight_decay"] for group in after["options"]] == [0.1, 0.0]
        missing, module_only = after["errors"]
        assert "holds the optimizer states of 1 ranks, these are 2" in missing
        assert "cannot load weights without optimizer states" in module_only
