"""`belief-dist plan` tells to the byte what the optimizer holds then."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from belief_dist import ShardedAdaBelief, cli
from belief_dist.memory_plan import (
    WAYS,
    bytes_by_place,
    bytes_held,
    options_from,
    plan,
    plan_for,
    shapes_of,
    shapes_of_count,
    specs_of_shapes,
    suggestion,
)
from tests.harness.ranks import run_ranks

OPTIONS: list[dict[str, Any]] = [
    *(dict(way.options or {}) for way in WAYS),
    {"bucket_bytes": 3000},
    {"stage": 2, "bucket_bytes": 3000, "state_dtype": "uint8"},
    {"reduce_dtype": "int8"},
    {"reduce_dtype": "bfloat16", "max_grad_value": 1.0},
    {"offload": "cpu", "bucket_bytes": 3000},
    {"micro_batches": 4},
    {"ema_decay": 0.9, "offload": "cpu"},
    {"ema_decay": 0.9, "offload": 0.4, "bucket_bytes": 3000},
    {"offload": 3000, "state_dtype": "uint8", "bucket_bytes": 3000},
    {"ema_decay": 0.9, "ema_dtype": "bfloat16", "state_dtype": "uint8"},
]
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def build_model() -> nn.Module:
    return nn.Sequential(nn.Linear(31, 67), nn.LayerNorm(67), nn.Linear(67, 129, bias=False))


def is_what_is_held(options: dict[str, Any]) -> None:
    for dtype in DTYPES:
        if dtype == torch.float64 and options.keys() & {"reduce_dtype", "state_dtype", "ema_dtype"}:
            continue
        model = build_model().to(dtype)
        optimizer = ShardedAdaBelief(model.parameters(), **options)
        specs = specs_of_shapes([tuple(p.shape) for p in model.parameters()], dtype)
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        chosen = options_from(options)
        planned = bytes_held(plan_for(specs, ranks, chosen), ranks, chosen)
        held = optimizer.bytes_per_rank()
        held.pop("gradients on the host", None)
        assert planned == held, (dtype, options)
        _, on_host = bytes_by_place(plan_for(specs, ranks, chosen), ranks, chosen)
        moved = [each.nbytes() for each in optimizer._engine.buckets if each.on_host]
        for kind in ("masters", "exp_avg", "exp_avg_sq", "averages"):
            assert on_host.get(kind, 0) == sum(each.get(kind, 0) for each in moved), options
        if "bucket_bytes" in options and type(options.get("offload")) in (int, float):
            assert 0 < len(moved) < len(optimizer.layout.buckets), (dtype, options)


@pytest.mark.filterwarnings("ignore:offload=.* updates on 1 thread")
def test_bytes_are_those_that_are_held(tmp_path: Path) -> None:
    run_ranks(3, tmp_path, *(partial(is_what_is_held, each) for each in OPTIONS))
    for options in OPTIONS:
        is_what_is_held(options)


def test_formulas() -> None:
    """As docs/memory.md has them: bytes per parameter for many ranks."""
    count, ranks = 7_000_000_000, 64
    held = {
        row.way.name: (row.held / count, row.on_host / count)
        for row in plan(shapes_of_count(count), ranks, None)
    }
    states = {
        "float32, ZeRO-1": 8.0 + 12 / ranks,  # the sums have a shard of their own
        "float32, ZeRO-2": 4.0 + 12 / ranks,
        "bfloat16, ZeRO-1": 4.0 + 16 / ranks,
        "bfloat16, ZeRO-2": 2.0 + 16 / ranks,
        "bfloat16, ZeRO-2, remainders": 2.0 + 14 / ranks,
        "bfloat16, ZeRO-2, remainders, 8 bits": 2.0 + (4 + 2 + 2 + 2 / 256) / ranks,
        "bfloat16, ZeRO-2, 8-bit remainders, 8 bits": 2.0 + (4 + 1 + 2 + 2 / 256) / ranks,
        "DeepSpeed ZeRO-3, bfloat16": 16 / ranks,
    }
    for name, expected in states.items():
        assert held[name][0] == pytest.approx(expected, rel=1e-3), name


def test_any_number_is_planned_at_once() -> None:
    for count in (1, 10**9, 10**15):
        shapes = shapes_of_count(count)
        assert sum(size for (size,) in shapes) == count and len(shapes) <= 4096


def test_the_fastest_that_fits_is_suggested() -> None:
    rows = plan(shapes_of_count(1_000_000_000), 8, None)
    sizes = [row.held for row in rows if row.way.options is not None]
    for number, size in enumerate(sizes):
        best = suggestion(rows, size)
        assert best is not None and best.held <= size
        assert rows.index(best) <= number
    assert suggestion(rows, min(sizes) - 1) is None


def test_models_are_only_looked_at(tmp_path: Path) -> None:
    shapes = shapes_of("tests.test_memory_plan:build_model")
    assert shapes == [(67, 31), (67,), (67,), (67,), (129, 67)]
    with pytest.raises(ValueError, match="nothing"):
        shapes_of("tests.test_memory_plan:nothing")
    with pytest.raises(ValueError, match=r"gives PosixPath, and must give a module"):
        shapes_of("pathlib:Path")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 2})
    )
    assert (50257, 64) in shapes_of(str(tmp_path))


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "7e9", "--ranks", "8", "--memory", "40", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["suggestion"] == "ShardedAdaBelief(model.named_parameters(), lr=1e-3, stage=2)"
    fits = {each["way"]: each["fits"] for each in found["ways"]}
    assert not fits["float32, ZeRO-1"] and fits["float32, ZeRO-2"]
    assert cli.main(["plan", "7e9", "--ranks", "8"]) == 0
    assert "float32, ZeRO-1" in capsys.readouterr().out
    assert cli.main(["plan", "7e11", "--ranks", "8", "--memory", "40"]) == 1
    assert "None of ours fits" in capsys.readouterr().out
    for wrong in (["0"], ["nan"], ["7e9", "--ranks", "0"], ["7e9", "--memory", "-1"], ["a:b"]):
        assert (
            cli.main(["plan", *wrong, *(["--ranks", "2"] if "--ranks" not in wrong else [])]) == 2
        )
