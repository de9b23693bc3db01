"""What `belief-dist check` says of bad DeepSpeed configurations, and how it mends them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from belief_dist import cli
from belief_dist.deepspeed_config import check_config, read_config
from belief_dist.deepspeed_keys import SECTIONS, TOP
from tests.harness.paths import ROOT

GOOD: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdaBelief", "params": {"lr": 1e-3, "betas": [0.9, 0.99]}},
    "zero_optimization": {"stage": 2},
    "bf16": {"enabled": True},
}
NO_KEY = "DeepSpeed knows no such key and {} it"


def changed(**more: Any) -> dict[str, Any]:
    """Return the good configuration with other values; "a__b" is b in the table a."""
    found = copy.deepcopy(GOOD)
    for path, value in more.items():
        table = found
        *parents, last = path.split("__")
        for parent in parents:
            table = table.setdefault(parent, {})
        if value is ...:
            table.pop(last)
        else:
            table[last] = value
    return found


# (what is changed, path, sentence or its beginning, what is at the path of the corrected file);
# `...` as the last one: it cannot mean one thing only, and stays.
Case = tuple[dict[str, Any], str, str, Any]
STAYS: Any = ...
NUMBER = "must be a number, and {!r} is text: without the quotes."
CASES: list[Case] = [
    (
        {"zero_optimisation": {"stage": 3}, "zero_optimization": ...},
        "zero_optimisation",
        f"{NO_KEY.format('ignores')}; it is spelled 'zero_optimization'.",
        ("zero_optimization", {"stage": 3}),
    ),
    (
        {"optimiser": GOOD["optimizer"], "optimizer": ...},
        "optimiser",
        f"{NO_KEY.format('ignores')}; it is spelled 'optimizer'.",
        ("optimizer", GOOD["optimizer"]),
    ),
    (
        {"optimizer__param": {"lr": 1.0}, "optimizer__params": ...},
        "optimizer.param",
        f"{NO_KEY.format('refuses')}; it is spelled 'params'.",
        ("optimizer", {"type": "AdaBelief", "params": {"lr": 1.0}}),
    ),
    (
        {"gradient_clip": 0.5, "gradient_clipping": ...},
        "gradient_clip",
        f"{NO_KEY.format('ignores')}; it is spelled 'gradient_clipping'.",
        ("gradient_clipping", 0.5),
    ),
    (
        {"Train_Micro_Batch_Size_Per_GPU": 2, "train_micro_batch_size_per_gpu": ...},
        "Train_Micro_Batch_Size_Per_GPU",
        f"{NO_KEY.format('ignores')}; it is spelled 'train_micro_batch_size_per_gpu'.",
        ("train_micro_batch_size_per_gpu", 2),
    ),
    (
        {"gradient_cliping": 0.5},
        "gradient_cliping",
        f"{NO_KEY.format('ignores')} ('gradient_clipping' is there, too).",
        STAYS,
    ),
    ({"epochs": 3}, "epochs", f"{NO_KEY.format('ignores')}.", STAYS),
    (
        {"zero_optimization__stages": 1, "zero_optimization__stage": ...},
        "zero_optimization.stages",
        f"{NO_KEY.format('refuses')}; it is spelled 'stage'.",
        ("zero_optimization", {"stage": 1}),
    ),
    (
        {"zero_optimization__overlap_com": True},
        "zero_optimization.overlap_com",
        f"{NO_KEY.format('refuses')}; it is spelled 'overlap_comm'.",
        ("zero_optimization", {"stage": 2, "overlap_comm": True}),
    ),
    (
        {"bf16": {"enable": True}},
        "bf16.enable",
        f"{NO_KEY.format('refuses')}; it is spelled 'enabled'.",
        ("bf16", {"enabled": True}),
    ),
    (
        {"zero_optimization__stage": "2"},
        "zero_optimization.stage",
        NUMBER.format("2"),
        ("zero_optimization", {"stage": 2}),
    ),
    (
        {"gradient_clipping": "1.0"},
        "gradient_clipping",
        NUMBER.format("1.0"),
        ("gradient_clipping", 1.0),
    ),
    ({"gradient_clipping": "one"}, "gradient_clipping", "must be a number, got 'one'.", STAYS),
    (
        {"optimizer__params__lr": "1e-3"},
        "optimizer.params.lr",
        NUMBER.format("1e-3"),
        ("optimizer", {"type": "AdaBelief", "params": {"lr": 1e-3, "betas": [0.9, 0.99]}}),
    ),
    (
        {"optimizer__params__lr": "fast"},
        "optimizer.params.lr",
        "must be a number, got 'fast'.",
        STAYS,
    ),
    (
        {"bf16__enabled": "true"},
        "bf16.enabled",
        "must be true or false, got 'true'.",
        ("bf16", {"enabled": True}),
    ),
    (
        {"bf16__enabled": 1},
        "bf16.enabled",
        "must be true or false, got 1.",
        ("bf16", {"enabled": True}),
    ),
    ({"bf16__enabled": "yes"}, "bf16.enabled", "must be true or false, got 'yes'.", STAYS),
    (
        {"train_micro_batch_size_per_gpu": 4.5},
        "train_micro_batch_size_per_gpu",
        "must be a whole number, 0 or more, got 4.5.",
        STAYS,
    ),
    (
        {"gradient_accumulation_steps": -1},
        "gradient_accumulation_steps",
        "must be a whole number, 0 or more, got -1.",
        STAYS,
    ),
    ({"zero_optimization": 2}, "zero_optimization", "must be a table {...}, got 2.", STAYS),
    ({"optimizer": "AdaBelief"}, "optimizer", "must be a table {...}, got 'AdaBelief'.", STAYS),
    (
        {"gradient_accumulation_steps": "auto"},
        "gradient_accumulation_steps",
        'is "auto", which only the Transformers Trainer and Accelerate replace; write a value (or '
        "check with --hf or --accelerate).",
        STAYS,
    ),
    (
        {"optimizer__params__eps": "auto"},
        "optimizer.params.eps",
        'for "auto" the Trainer writes its adam_epsilon, 1e-8, and AdaBelief is nearly SGD then; '
        "leave it out (the default is 1e-16).",
        ("optimizer", GOOD["optimizer"]),
    ),
    (
        {"optimizer__params__lr": "auto"},
        "optimizer.params.lr",
        'is "auto", which only the Transformers Trainer and Accelerate replace; write a value (or '
        "check with --hf or --accelerate).",
        STAYS,
    ),
    (
        {"optimizer__params__rectify": "auto"},
        "optimizer.params.rectify",
        'is "auto", which only the Trainer and Accelerate replace, and only for lr, betas, eps, '
        "weight_decay; write a value, or leave it out.",
        STAYS,
    ),
    (
        {"optimizer__params__eps": 1e-8},
        "optimizer.params.eps",
        "1e-08 was probably meant for Adam: AdaBelief adds eps to exp_avg_sq in every step, so "
        "that steps shrink with small gradients as SGD's do. Leave it out (the default is 1e-16), "
        "or keep it if you mean it.",
        STAYS,
    ),
    (
        {"optimizer__params__weight_decey": 0.1},
        "optimizer.params.weight_decey",
        "AdaBelief has no such option; it is spelled 'weight_decay'.",
        (
            "optimizer",
            {
                "type": "AdaBelief",
                "params": {"lr": 1e-3, "betas": [0.9, 0.99], "weight_decay": 0.1},
            },
        ),
    ),
    (
        {"optimizer__params__momentum": 0.9},
        "optimizer.params.momentum",
        "AdaBelief has no such option.",
        STAYS,
    ),
    (
        {"optimizer__params__bias_correction": False},
        "optimizer.params",
        "AdaBelief cannot serve bias_correction=False: AdaBelief always corrects the bias of its "
        "moments. Remove it.",
        STAYS,
    ),
    ({"optimizer__params__lr": -1.0}, "optimizer.params", "lr must be", STAYS),
    ({"optimizer__params__betas": [0.9, 1.0]}, "optimizer.params", "betas", STAYS),
    (
        {"optimizer__type": "AdaBelieve"},
        "optimizer.type",
        "DeepSpeed knows no 'AdaBelieve'; it is spelled 'AdaBelief'.",
        ("optimizer", GOOD["optimizer"]),
    ),
    ({"optimizer__type": ...}, "optimizer.type", 'is missing; write "type": "AdaBelief".', STAYS),
    (
        {"optimizer__type": "ShardedAdaBelief"},
        "optimizer.type",
        "ShardedAdaBelief shards by itself and works at zero_optimization.stage 0; at stage 2 use "
        '"AdaBelief".',
        STAYS,
    ),
    (
        {"fp16": {"enabled": True}},
        "bf16.enabled",
        "fp16 and bf16 are both on; switch one of them off.",
        STAYS,
    ),
    (
        {"bfloat16": {"enabled": True}},
        "bfloat16",
        "bf16 is there, too, which means the same; keep one of them.",
        STAYS,
    ),
    (
        {"fp16": {"enabled": True}, "bf16": ..., "zero_optimization__stage": 0},
        "fp16.enabled",
        "DeepSpeed at stage 0 divides gradients by a loss scale that it never multiplies the loss "
        "by, and AdaBelief would hardly move: use zero_optimization.stage 1, bf16, or "
        "ShardedAdaBelief.",
        STAYS,
    ),
    (
        {"zero_optimization__stage": 4},
        "zero_optimization.stage",
        "must be 0, 1, 2 or 3, got 4.",
        STAYS,
    ),
    (
        {"zero_optimization__cpu_offload": True},
        "zero_optimization.cpu_offload",
        'was replaced by "offload_optimizer": {"device": "cpu"}.',
        ("zero_optimization", {"stage": 2, "offload_optimizer": {"device": "cpu"}}),
    ),
    (
        {"zero_optimization__offload_optimizer": {"device": "CPU"}},
        "zero_optimization.offload_optimizer.device",
        "must be cpu, nvme, none, got 'CPU'.",
        ("zero_optimization", {"stage": 2, "offload_optimizer": {"device": "cpu"}}),
    ),
    (
        {"zero_optimization__offload_optimizer": {"device": "gpu"}},
        "zero_optimization.offload_optimizer.device",
        "must be cpu, nvme, none, got 'gpu'.",
        STAYS,
    ),
    (
        {"zero_optimization__offload_optimizer": {"device": "nvme", "nvme_path": "/x"}},
        "zero_optimization.offload_optimizer.device",
        'at stage 2, "nvme" is silently the same as "cpu".',
        STAYS,
    ),
    (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        "zero_optimization.offload_optimizer.nvme_path",
        "is needed by device nvme: a folder on that disk.",
        STAYS,
    ),
    (
        {"zero_optimization__offload_param": {"device": "cpu"}},
        "zero_optimization.offload_param",
        "works at stage 3 only; at stage 2 DeepSpeed ignores it.",
        STAYS,
    ),
    (
        {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
        "zero_optimization.offload_optimizer",
        "is ignored at stage 0; take stage 1, 2 or 3, or remove it.",
        STAYS,
    ),
    (
        {"zero_optimization__offload_optimizer": {"device": "cpu", "pin_memry": True}},
        "zero_optimization.offload_optimizer.pin_memry",
        f"{NO_KEY.format('refuses')}; it is spelled 'pin_memory'.",
        (
            "zero_optimization",
            {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
        ),
    ),
    (
        {"scheduler": {"type": "WarmUpLR"}},
        "scheduler.type",
        "must be LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR or a class of "
        "torch's, got 'WarmUpLR'.",
        ("scheduler", {"type": "WarmupLR"}),
    ),
    (
        {"train_batch_size": 10, "gradient_accumulation_steps": 2},
        "train_batch_size",
        "10 is no multiple of train_micro_batch_size_per_gpu times gradient_accumulation_steps, 8, "
        "and so fits no number of ranks.",
        STAYS,
    ),
    (
        {"gradient_clipping": ...},
        "gradient_clipping",
        "is not there, and DeepSpeed 0.19 clips to a norm of 1.0 then, older ones not at all; "
        "write 1.0 or 0.0.",
        ("gradient_clipping", 1.0),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[1]} {case[2][:30]}")
def test_bad_configurations(case: Case) -> None:
    change, path, sentence, right = case
    config = changed(**change)
    before = copy.deepcopy(config)
    report = check_config(config)
    assert config == before  # it only looks
    assert len(report.findings) == 1, report.findings
    (found,) = report.findings
    assert (found.path, found.is_fixed) == (path, right is not ...)
    if sentence[-1] in ".)":
        assert found.sentence == sentence
    else:
        assert found.sentence.startswith(sentence)
    if right is ...:
        assert report.corrected == before and report.diff() == ""
    else:
        key, value = right
        assert report.corrected[key] == value
        assert check_config(report.corrected).findings == []
        assert "\n-" in report.diff() or "\n+" in report.diff()


def test_what_is_right_passes() -> None:
    assert check_config(GOOD).findings == []
    for path in sorted((ROOT / "configs").glob("*.json")):
        is_auto = path.name.startswith(("hf", "accelerate", "lightning"))
        found = check_config(read_config(path), replaces_auto=is_auto).findings
        assert found == [], (path.name, found)


def test_auto_is_right_where_the_trainer_replaces_it() -> None:
    auto = changed(optimizer__params={"lr": "auto", "weight_decay": "auto", "eps": "auto"})
    assert len(check_config(auto).findings) == 3
    report = check_config(auto, replaces_auto=True)
    assert [each.path for each in report.findings] == ["optimizer.params.eps"]
    assert report.corrected["optimizer"]["params"] == {"lr": "auto", "weight_decay": "auto"}


def test_what_is_left_of_adam_is_told_only_where_it_matters() -> None:
    harmless = {"lr": 1e-3, "bias_correction": True, "torch_adam": True, "set_grad_none": False}
    assert check_config(changed(optimizer__params=harmless)).findings == []


def test_the_engines_options_are_known() -> None:
    sharded = {"type": "ShardedAdaBelief", "params": {"spike_guard": 5, "no_decay": "1d"}}
    config = changed(optimizer=sharded, zero_optimization={"stage": 0})
    assert check_config(config).findings == []


def test_other_optimizers_are_left_alone() -> None:
    adam = changed(optimizer={"type": "AdamW", "params": {"eps": 1e-8, "torch_adam": True}})
    assert check_config(adam).findings == []


def test_the_keys_are_those_of_deepspeed() -> None:
    from deepspeed.runtime import constants
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    for section, model in {
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    }.items():
        fields = model.model_fields
        theirs = {*fields, *(each.alias for each in fields.values() if each.alias)}
        assert theirs - SECTIONS[section].keys() == set(), section
    names = """TRAIN_BATCH_SIZE TRAIN_MICRO_BATCH_SIZE_PER_GPU GRADIENT_ACCUMULATION_STEPS
        GRADIENT_CLIPPING OPTIMIZER SCHEDULER STEPS_PER_PRINT PRESCALE_GRADIENTS DUMP_STATE
        GRADIENT_PREDIVIDE_FACTOR WALL_CLOCK_BREAKDOWN MEMORY_BREAKDOWN DISABLE_ALLGATHER
        ZERO_ALLOW_UNTESTED_OPTIMIZER ZERO_FORCE_DS_CPU_OPTIMIZER COMMUNICATION_DATA_TYPE
        DATALOADER_DROP_LAST TORCH_AUTOCAST CHECKPOINT DATA_TYPES VOCABULARY_SIZE"""
    assert {getattr(constants, name) for name in names.split()} <= TOP.keys()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(changed(gradient_clipping="1.0")))
    assert cli.main(["check", str(path)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("gradient_clipping: must be a number")
    assert '-  "gradient_clipping": "1.0",\n+  "gradient_clipping": 1.0,' in out
    assert cli.main(["check", str(path), "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["corrected"] == GOOD and printed["findings"][0]["is_fixed"]
    path.write_text(json.dumps(GOOD))
    assert cli.main(["check", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: no mistakes were found\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{,}", "is no JSON: line 1, column 2: "),
        ('{"a": 1, // b\n}', "JSON has no comments"),
        ('{"bf16": {}, "bf16": {}}', "has 'bf16' twice in one table; remove one of them."),
        ("[]", "must hold a JSON object, got []."),
        ("[" * 100_000, "is nested too deeply to be a configuration."),
        ("\udcff", "is no text file."),
    ],
)
def test_what_is_no_configuration(
    text: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert cli.main(["check", str(path)]) == 2
    assert sentence in capsys.readouterr().err
