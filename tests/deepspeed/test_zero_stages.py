"""`"optimizer": {"type": "AdaBelief"}` in any launcher's ranks, at ZeRO stages 0 to 3.

One launch of 2 CPU ranks per stage runs every case of `zero_stages_job.py`, which never imports
belief_dist. What it trained is compared with one process that sees the whole batch.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import belief_dist
from tests.harness.forked import Job, run_all_forked
from tests.harness.launch import largest_difference, launch
from zero_stages_job import ROWS, STEPS, WORLD_SIZE, make_batch, make_model, param_groups

JOB = Path(__file__).with_name("zero_stages_job.py")
STAGES = (0, 1, 2, 3)
STARTERS = {0: "deepspeed", 1: "torchrun", 2: "spawn", 3: "forked"}

# A large eps: with 1e-16 a wrong scale of the gradients, say a forgotten mean, would not show.
HYPER = {"lr": 0.1, "betas": [0.8, 0.95], "eps": 1e-2, "weight_decay": 0.1}
# A tiny eps: the first step is then lr / beta1 wherever the gradient is not zero.
SCALE_FREE = {"lr": 0.125, "betas": [0.5, 0.9], "eps": 1e-30}
MICRO_BATCHES = 2
CASES = {
    "trajectory": {"type": "AdaBelief", "params": HYPER},
    "first_step": {"type": "adabelief", "params": SCALE_FREE},
    "bf16": {"type": "ADABELIEF", "params": HYPER},
    "unknown_key": {"type": "AdaBelief", "params": {**HYPER, "weight_decuple": True}},
}


def make_config(case: str, stage: int) -> dict[str, Any]:
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": 0.0,  # left out, DeepSpeed clips at 1.0
        "optimizer": CASES[case],
        "zero_optimization": {"stage": stage},
    }
    if stage == 3:
        # Really partition these small parameters, and step in several sub-groups.
        config["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0,
            "sub_group_size": 40,
        }
    if case == "bf16":
        # Without accumulation all stages compute the same bits.
        config |= {"bf16": {"enabled": True}, "gradient_accumulation_steps": 1}
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Give a function (stage, case) -> what each rank saved; one launch per stage."""

    @functools.cache
    def launched(stage: int) -> Path:
        folder = tmp_path_factory.mktemp(f"stage{stage}")
        for case in CASES:
            (folder / f"{case}.json").write_text(json.dumps(make_config(case, stage)))
        if STARTERS[stage] == "forked":
            run_all_forked(JOB, folder, [Job(WORLD_SIZE, [folder])])
        else:
            launch(folder, job=[JOB], starter=STARTERS[stage])
        return folder

    def results(stage: int, case: str) -> list[dict[str, Any]]:
        folder = launched(stage)
        return [torch.load(folder / f"{case}.{rank}.pt") for rank in range(WORLD_SIZE)]

    return results


def unsharded(optimizer_class: type, **options: Any) -> tuple[list[dict], dict[str, dict]]:
    """Train in this process on the global batch; return the trajectory and the states."""
    model = make_model()
    optimizer = optimizer_class(param_groups(model), **options)
    trajectory = [{n: p.detach().clone() for n, p in model.named_parameters()}]
    for step in range(STEPS):
        inputs, targets = make_batch(step, MICRO_BATCHES * WORLD_SIZE * ROWS)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
        trajectory.append({n: p.detach().clone() for n, p in model.named_parameters()})
    states = {
        key: {n: optimizer.state[p][key] for n, p in model.named_parameters() if p.dim() > 1}
        for key in ("exp_avg", "exp_avg_sq")
    }
    return trajectory, states


@pytest.mark.parametrize("stage", STAGES)
def test_trajectory_is_that_of_one_process(run, stage):
    trajectory, states = unsharded(belief_dist.AdaBelief, **HYPER)
    for result in run(stage, "trajectory"):
        assert result["optimizer"] == "belief_dist.optimizer.AdaBelief"
        # Before the first step and after the last; at ZeRO-3 groups have no parameters then.
        assert all("AdaBelief runs under DeepSpeedEngine" in line for line in result["verified"])
        for step in range(STEPS + 1):
            # DeepSpeed adds up the gradients in another order: fp32 rounding, nothing more.
            assert largest_difference(result["trajectory"][step], trajectory[step]) < 2e-6
        for key in states:
            assert largest_difference(result["states"][key], states[key]) < 2e-6


def test_another_optimizer_would_have_been_noticed():
    ours, _ = unsharded(belief_dist.AdaBelief, **HYPER)
    adamw, _ = unsharded(torch.optim.AdamW, **HYPER)
    assert largest_difference(ours[1], ours[0]) > 1e-2
    assert largest_difference(ours[1], adamw[1]) > 1e-2


@pytest.mark.parametrize("stage", STAGES)
def test_first_step_has_the_length_of_adabelief(run, stage):
    length = SCALE_FREE["lr"] / SCALE_FREE["betas"][0]
    for result in run(stage, "first_step"):
        before, after, *_ = result["trajectory"]
        moved = {name: (after[name] - before[name]).abs() for name in before}
        for name in ("2.weight", "2.bias"):
            torch.testing.assert_close(
                moved[name], torch.full_like(moved[name], length), rtol=1e-5, atol=0
            )
        for name in ("0.weight", "0.bias"):  # behind the layer of zeros: no gradient yet
            assert not moved[name].any()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", ["trajectory", "bf16"])
def test_states_are_those_that_checkpoint_tools_know(run, stage, case):
    for result in run(stage, case):
        assert result["state_keys"] == {"step", "exp_avg", "exp_avg_sq"}
        assert result["steps"] == {("int", STEPS)}


@pytest.mark.parametrize("stage", STAGES[1:])
def test_bf16_stages_agree_to_the_bit(run, stage):
    # At stage 0 DeepSpeed takes a step on zero gradients at construction: it must leave no trace.
    for result, plain in zip(run(stage, "bf16"), run(0, "bf16"), strict=True):
        assert result["trajectory"][0]["0.weight"].dtype == torch.bfloat16
        for step in range(STEPS + 1):
            assert largest_difference(result["trajectory"][step], plain["trajectory"][step]) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_an_unknown_option_is_named(run, stage):
    for result in run(stage, "unknown_key"):
        assert "AdaBelief has no option 'weight_decuple'" in result["error"]
        assert "Did you mean 'weight_decouple'?" in result["error"]
