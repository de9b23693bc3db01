"""AdaBelief under ZeRO-Offload, ZeRO-Offload++ and ZeRO-Infinity, on 2 CPU ranks.

Nothing is pinned here and nothing is copied to another device: there is no GPU. What moves between
parameters, masters and files is real.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import belief_dist
from deepspeed_offload_job import (
    OPTIONS,
    SAVED_AT,
    STEPS,
    WORLD_SIZE,
    make_batch,
    make_model,
    param_groups,
)
from test_deepspeed import largest_difference, launch

JOB = Path(__file__).with_name("deepspeed_offload_job.py")
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


@pytest.mark.nvme
def test_states_on_nvme_come_back(tmp_path):
    run = run_parts(tmp_path, "nvme", "resumed")
    for before, after in zip(run("3 nvme"), run("resumed"), strict=True):
        trajectory = before["trajectory"]
        assert equal([after["loaded"]], [trajectory[SAVED_AT - 1]])
        assert equal(after["again"], after["trajectory"])
        for ours, theirs in zip(after["trajectory"], trajectory[SAVED_AT:], strict=True):
            # A new step count or new moments would differ by about lr, 1e-2. It is not the same
            # bits: gradients that DeepSpeed swaps differ from those of the run that saved.
            assert largest_difference(ours, theirs) < 1e-5
        assert [group["lr"] for group in after["options"]] == [OPTIONS["lr"], 0.005]
        assert [group["weight_decay"] for group in after["options"]] == [0.1, 0.0]
        missing, module_only = after["errors"]
        assert "holds the optimizer states of 1 ranks, these are 2" in missing
        assert "cannot load weights without optimizer states" in module_only
