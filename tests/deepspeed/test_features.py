"""What DeepSpeed can do around an optimizer, in one launch of `features_job.py`.

The launch has torch's autoload off and goes through `belief_dist.run`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from features_job import CASES, HYPER, STEPS, WORLD_SIZE
from tests.harness.launch import launch

JOB = Path(__file__).with_name("features_job.py")
FP32 = 2e-6  # DeepSpeed adds up the gradients in another order: rounding, nothing more
# Forward and backward in bfloat16 (8 bits, a spacing of 2**-8 around 1), where the reference may
# round elsewhere: two to three such spacings on parameters below 1.
BF16 = 1e-2
FP16 = 2e-3  # 11 bits: likewise
REFUSED = {
    "lr as string": "lr must be a number, got '1e-3'",
    "eps auto": "eps='auto', which only the Transformers Trainer replaces",
    "no_decay unknown": "no_decay must be None, '1d'",
    "fp16, stage 0": "divides gradients by a loss scale that it never multiplied the loss by",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("features")
    launch(folder, job=["--module", "belief_dist.run", JOB], TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD_SIZE)]


def tolerance(case: str) -> float:
    if "fp16" in case:
        return FP16
    return BF16 if "bf16" in case or "autocast" in case else FP32


@pytest.mark.parametrize("case", sorted(CASES.keys() - REFUSED.keys()))
def test_trains_as_an_unsharded_optimizer(results, case):
    for result in results:
        found = result[case]
        assert found["moved"] > 0.01  # far above the tolerances of what is compared
        assert found["difference"] < tolerance(case)
        assert found["optimizer"] == ("Subclass" if "subclass" in case else "AdaBelief")
        assert found["steps"] == [STEPS]


@pytest.mark.parametrize(
    "case", sorted(case for case in CASES.keys() - REFUSED.keys() if "fp16" in case)
)
def test_a_step_that_overflows_is_skipped_and_halves_the_scale(results, case):
    for result in results:
        assert result[case]["skipped"] == 1
        assert result[case]["scale"] == (1.0 if "no scale" in case else 2.0**9)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("no_decay, ")])
def test_a_group_without_decay_is_split_off(results, case):
    for result in results:
        assert result[case]["decays"] == [HYPER["weight_decay"], 0.0]


@pytest.mark.parametrize("case", REFUSED)
def test_refused_on_every_rank(results, case):
    for result in results:
        assert REFUSED[case] in result[case]["error"]
