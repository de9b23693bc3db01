"""The JSON schema for editors takes what is right, and marks misspelled keys and wrong kinds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from belief_dist import cli
from belief_dist.deepspeed_schema import schema
from tests.harness.paths import ROOT
from tests.test_deepspeed_config import GOOD, changed

VALIDATOR = Draft202012Validator(schema())


def wrong(config: Any) -> list[str]:
    """Return where a configuration has something wrong."""
    return sorted(
        "/".join(map(str, error.absolute_path)) for error in VALIDATOR.iter_errors(config)
    )


def test_it_is_a_schema_that_takes_all_examples(capsys: pytest.CaptureFixture[str]) -> None:
    Draft202012Validator.check_schema(schema())
    assert wrong(GOOD) == []
    for path in sorted((ROOT / "configs").glob("*.json")):
        config = json.loads(path.read_text())
        if "zero_optimization" in config:
            assert wrong(config) == [], path.name
    assert cli.main(["check", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema()


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"zero_optimisation": {}}, [""]),
        ({"gradient_clipping": "1.0"}, ["gradient_clipping"]),
        ({"zero_optimization": {"stage": "two"}}, ["zero_optimization/stage"]),
        ({"zero_optimization": {"stages": 2}}, ["zero_optimization"]),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}},
            ["zero_optimization/offload_optimizer/device"],
        ),
        ({"optimizer": {"type": "AdaBelief", "params": {"lr": "1e-3"}}}, ["optimizer/params/lr"]),
        ({"optimizer": {"type": "AdaBelief", "params": {"stage": 2}}}, ["optimizer/params"]),
        (
            {"optimizer": {"type": "ShardedAdaBelief", "params": {"master": "fp16"}}},
            ["optimizer/params/master"],
        ),
        ({"optimizer": {"type": "ShardedAdaBelief", "params": {"offload": 0.5, "stage": 2}}}, []),
        ({"optimizer": {"type": "AdamW", "params": {"anything": 1}}}, []),
        ({"optimizer": {"type": "AdaBelief", "params": {"lr": "auto", "betas": [0.9, 0.99]}}}, []),
    ],
    ids=str,
)
def test_what_is_marked(change: dict[str, Any], where: list[str]) -> None:
    assert wrong(changed(**change)) == where
