"""A dozen cells of the table of compatibility with DeepSpeed, trained in one launch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from belief_dist import AdaBelief
from benchmarks.compatibility import (
    DOZEN,
    TOLERANCE,
    Cell,
    Result,
    distance,
    replace_table,
    run_cells,
    table,
    unsharded,
)
from benchmarks.compatibility_job import make_model

NVME = [cell for cell in DOZEN if cell.offload == "nvme"]
IN_MEMORY = [cell for cell in DOZEN if cell.offload != "nvme"]


@pytest.fixture(scope="module")
def results() -> dict[Cell, Result]:
    return run_cells(IN_MEMORY)


@pytest.mark.nvme
def test_nvme() -> None:
    for cell, result in run_cells(NVME).items():
        if "async_io" in result.refused:
            pytest.skip(f"no libaio on this machine: {result.refused}")
        assert not result.refused
        assert result.distance <= TOLERANCE[cell.dtype]


@pytest.mark.parametrize("cell", IN_MEMORY, ids=str)
def test_a_cell(results: dict[Cell, Result], cell: Cell) -> None:
    result = results[cell]
    if cell.dtype == "float16" and not get_accelerator().is_fp16_supported():
        assert "fp16 is not supported" in result.refused
    elif cell.dtype == "float16" and cell.stage == 0:
        assert 'AdaBelief is wrong with "fp16" at ZeRO stage 0' in result.refused
    else:
        assert not result.refused
        assert result.distance <= TOLERANCE[cell.dtype]


@pytest.mark.parametrize("cell", [c for c in IN_MEMORY if c.dtype == "float32"], ids=str)
def test_another_optimizer_would_be_far_outside_the_tolerance(
    results: dict[Cell, Result], cell: Cell
) -> None:
    start = [param.detach() for param in make_model().parameters()]
    assert distance(start, cell) == 1.0  # no training at all
    trained_otherwise = unsharded(cell, torch.optim.AdamW)
    assert distance(trained_otherwise, cell) > 3 * max(TOLERANCE.values())  # of bfloat16, too
    of_a_wrong_scale = unsharded(cell, AdaBelief, gradient_scale=2.0)
    assert cell.clip or distance(of_a_wrong_scale, cell) > 100 * TOLERANCE[cell.dtype]


def test_the_table_says_what_came_out(tmp_path: Path) -> None:
    cells = [Cell(1, "float32", "none", 1, clip, False) for clip in (False, True)]
    refused = Cell(2, "float16", "none", 4, True, True)
    found = {cells[0]: Result(2e-7, ""), cells[1]: Result(0.5, ""), refused: Result(0.0, "No: 1.")}
    text = table(found)
    assert "| 1 | float32 | none | ok 2e-07 |  | **wrong** 5e-01 |" in text
    assert "| 2 | float16 | none |" in text and "refused [1]" in text and "[1] No: 1." in text
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- table:begin -->\nold\n<!-- table:end -->\nb\n")
    replace_table(page, text)
    assert page.read_text() == f"a\n<!-- table:begin -->\n{text}\n<!-- table:end -->\nb\n"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="has no lines"):
        replace_table(page, text)
