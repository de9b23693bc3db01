"""AdaBelief in DeepSpeed's JSON, for every combination of stage, dtype, offload and the rest.

Each cell trains by 2 ranks of the deepspeed launcher, and its weights are compared with those of
one process that trains an unsharded float32 AdaBelief on the same data.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from belief_dist import AdaBelief
from benchmarks.compatibility_job import RANKS, ROWS, STEPS, make_batch, make_model
from benchmarks.jobs import free_port, run_job

_JOB = Path(__file__).with_name("compatibility_job.py")
_SECONDS = 900  # of one launch
# eps is of the size of what these gradients put into s: with 1e-16 the update would not notice
# gradients of a wrong scale.
_OPTIONS: dict[str, Any] = {
    "lr": 0.02,
    "betas": [0.8, 0.95],
    "eps": 1e-10,
    "weight_decay": 0.1,
}
_MAX_NORM = 0.02  # below the gradients' norm
_WARMUP = 3
# float32 differs by the order of sums. bfloat16 has 8 bits, float16 11, in the activations and
# gradients and, beside float32 masters, in the weights that are compared.
TOLERANCE = {"float32": 2e-5, "bfloat16": 0.05, "float16": 0.005}


class Cell(NamedTuple):
    """One combination."""

    stage: int
    dtype: str
    offload: str
    accumulate: int
    clip: bool
    schedule: bool


class Result(NamedTuple):
    """What came of a cell: a distance from the unsharded weights, or a refusal.

    Attributes:
        distance: Norm of the weights' difference, over the norm of what training has changed.
        refused: DeepSpeed's sentence, or "".
    """

    distance: float
    refused: str


STAGES = (0, 1, 2, 3)
DTYPES = ("float32", "bfloat16", "float16")
OFFLOADS = ("none", "cpu", "nvme")
COLUMNS = tuple(itertools.product((1, 4), (False, True), (False, True)))
ALL = [
    Cell(*row, *column) for row in itertools.product(STAGES, DTYPES, OFFLOADS) for column in COLUMNS
]
# Each stage, dtype, offload and feature at least once, and those together that share code.
DOZEN = [
    Cell(0, "float32", "none", 4, True, True),
    Cell(0, "bfloat16", "none", 1, False, False),
    Cell(0, "float16", "none", 1, False, False),
    Cell(1, "float32", "none", 1, True, False),
    Cell(1, "bfloat16", "cpu", 4, True, True),
    Cell(2, "float32", "none", 4, False, True),
    Cell(2, "float32", "cpu", 4, True, False),
    Cell(2, "bfloat16", "none", 4, True, True),
    Cell(2, "float16", "cpu", 4, True, True),
    Cell(3, "float32", "none", 4, True, True),
    Cell(3, "bfloat16", "cpu", 1, True, False),
    Cell(3, "float32", "nvme", 4, True, True),
]


def _config(cell: Cell, scratch: Path) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": cell.accumulate,
        "gradient_clipping": _MAX_NORM if cell.clip else 0.0,
        "optimizer": {"type": "AdaBelief", "params": _OPTIONS},
        "zero_optimization": {"stage": cell.stage},
    }
    zero = config["zero_optimization"]
    if cell.stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0}
    if cell.offload != "none":
        zero["offload_optimizer"] = {"device": cell.offload}
    if cell.offload == "nvme":
        zero["offload_optimizer"]["nvme_path"] = str(scratch)
    if cell.dtype != "float32":
        config[{"bfloat16": "bf16", "float16": "fp16"}[cell.dtype]] = {"enabled": True}
    if cell.schedule:
        rates = {"warmup_min_lr": 0.0, "warmup_max_lr": _OPTIONS["lr"]}
        params = rates | {"warmup_num_steps": _WARMUP, "warmup_type": "linear"}
        config["scheduler"] = {"type": "WarmupLR", "params": params}
    return config


def unsharded(cell: Cell, optimizer: Any = AdaBelief, gradient_scale: float = 1.0) -> list[Tensor]:
    """Return the weights that one process trains in float32 on the whole batches.

    Args:
        cell: By which settings.
        optimizer: A class.
        gradient_scale: Not 1 for a mistake that the comparison has to notice.
    """
    model = make_model()
    stepping = optimizer(model.parameters(), **(_OPTIONS | {"betas": tuple(_OPTIONS["betas"])}))
    for step in range(STEPS):
        if cell.schedule:  # DeepSpeed's WarmupLR stays at its lowest rate for two steps
            share = min(1.0, max(0, step - 1) / _WARMUP)
            for group in stepping.param_groups:
                group["lr"] = share * _OPTIONS["lr"]
        inputs, targets = make_batch(step, cell.accumulate * RANKS * ROWS)
        stepping.zero_grad()
        (gradient_scale * nn.functional.mse_loss(model(inputs), targets)).backward()
        if cell.clip:
            norm = nn.utils.clip_grad_norm_(model.parameters(), _MAX_NORM)
            if norm <= _MAX_NORM:
                raise RuntimeError(f"the gradients' norm is {norm}: clipping would not be seen.")
        stepping.step()
    return [param.detach() for param in model.parameters()]


def distance(weights: list[Tensor], cell: Cell) -> float:
    """Return how far weights are from unsharded training, over how far that has moved them.

    Args:
        weights: Trained ones.
        cell: By which settings.
    """
    reference = unsharded(cell)
    start = [param.detach() for param in make_model().parameters()]

    def norm_of_difference(other: list[Tensor]) -> float:
        parts = [(r - o).double().norm() for r, o in zip(reference, other, strict=True)]
        return torch.stack(parts).norm().item()

    return norm_of_difference(weights) / norm_of_difference(start)


def _launch(folder: Path) -> None:
    command: list[object] = [
        Path(sys.executable).with_name("deepspeed"),
        "--num_accelerators",
        RANKS,
    ]
    command += ["--master_addr", "127.0.0.1", "--master_port", free_port(), _JOB, folder]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | os.environ | {"PATH": path}
    done = run_job(command, folder, environment, _SECONDS)
    if done.returncode:
        raise RuntimeError(f"the deepspeed launcher failed:\n{done.stdout[-8000:]}")


def run_cells(cells: Iterable[Cell]) -> dict[Cell, Result]:
    """Train cells, those that follow one another in one launch; compare all ranks' weights.

    Raises:
        RuntimeError: A launch failed, ranks differ, or another optimizer has run.
    """
    cells = list(cells)
    found: dict[Cell, Result] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for number, cell in enumerate(cells):
            config = _config(cell, folder)
            (folder / f"{number:03d}.json").write_text(json.dumps(config))
        _launch(folder)
        for number, cell in enumerate(cells):
            ranks = [torch.load(folder / f"{number:03d}.{rank}.pt") for rank in range(RANKS)]
            found[cell] = _result(cell, ranks)
    return found


def _result(cell: Cell, ranks: list[dict[str, Any]]) -> Result:
    refusals = {rank.get("refused", "") for rank in ranks}
    if refusals != {""}:
        if "" in refusals:
            raise RuntimeError(f"{cell} was refused on some ranks only: {refusals}.")
        return Result(0.0, min(refusals).strip().splitlines()[0])
    names = {rank["optimizer"] for rank in ranks}
    if names != {"AdaBelief"}:
        raise RuntimeError(f"{cell} was trained by {names}.")
    first = ranks[0]["weights"]
    for other in ranks[1:]:
        if not all(map(torch.equal, first, other["weights"])):
            raise RuntimeError(f"{cell}: the ranks' weights differ.")
    return Result(distance(first, cell), "")


def table(results: dict[Cell, Result]) -> str:
    """Return results as Markdown: a row for stage, dtype and offload, refusals as notes."""
    head = [
        f"{accumulate} micro-batch{'es' if accumulate > 1 else ''}"
        f"{', clip' if clip else ''}{', warm-up' if schedule else ''}"
        for accumulate, clip, schedule in COLUMNS
    ]
    lines = [f"| stage | dtype | offload | {' | '.join(head)} |", "|---" * (len(head) + 3) + "|"]
    notes: list[str] = []
    for row in itertools.product(STAGES, DTYPES, OFFLOADS):
        cells = [results.get(Cell(*row, *column)) for column in COLUMNS]
        if not any(cells):
            continue
        marks = (_mark(row[1], cell, notes) for cell in cells)
        lines.append(f"| {' | '.join(map(str, row))} | {' | '.join(marks)} |")
    return "\n".join([*lines, "", *(f"[{n}] {note}  " for n, note in enumerate(notes, 1))])


def _mark(dtype: str, result: Result | None, notes: list[str]) -> str:
    if result is None:
        return ""
    if result.refused:
        if result.refused not in notes:
            notes.append(result.refused)
        return f"refused [{notes.index(result.refused) + 1}]"
    verdict = "ok" if result.distance <= TOLERANCE[dtype] else "**wrong**"
    return f"{verdict} {result.distance:.0e}"


def replace_table(page: Path, text: str) -> None:
    """Put a table between the marks of a page.

    Raises:
        ValueError: The page has no such marks.
    """
    begin, end = "<!-- table:begin -->", "<!-- table:end -->"
    old = page.read_text()
    if begin not in old or end not in old:
        raise ValueError(f"{page} has no lines {begin} and {end}.")
    before, rest = old.split(begin, 1)
    after = rest.split(end, 1)[1]
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")
