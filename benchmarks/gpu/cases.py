"""What a section is made of: cases, each of which measures one row or several."""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from examples.gpt.model import GPT

Outcome = dict[str, Any]  # of one row: figures by column; "name" replaces the case's
SAME = "same bits"  # the column whose False means that bits differ


class Case(NamedTuple):
    """Something to measure.

    Attributes:
        table: Under whose heading its rows stand.
        run: Returns a row, or rows with names of their own.
        packages: That it needs besides torch.
        counts: Whether a failure makes the whole run fail; bits that differ always do.
    """

    table: str
    name: str
    run: Callable[[], Outcome | list[Outcome]]
    packages: Sequence[str] = ()
    counts: bool = True


class Shape(NamedTuple):
    """Of a GPT and of its batch."""

    layers: int
    width: int
    heads: int
    context: int
    batch: int

    def model(self, dtype: torch.dtype, device: str) -> GPT:
        torch.manual_seed(0)
        with torch.device(device):
            return GPT(self.layers, self.width, self.heads, self.context).to(dtype)

    def tokens(self, device: str, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        count = (self.batch, self.context + 1)
        return torch.randint(256, count, generator=generator).to(device)


class Size(NamedTuple):
    """How much is measured."""

    elements: int  # of a flat tensor
    bits: int  # elements whose bits are compared
    tensors: int
    rounds: int
    step: Shape  # of the step that is timed
    job: Shape  # of short trainings
    steps: int  # of these
    ranks: tuple[int, ...]  # process groups whose bits are compared


FULL = Size(
    elements=64 << 20,
    bits=1_000_003,
    tensors=1000,
    rounds=10,
    step=Shape(24, 1024, 16, 512, 8),
    job=Shape(4, 256, 4, 128, 8),
    steps=30,
    ranks=(1, 3, 4),
)
# For tests: the same code in seconds on a CPU.
SMALL = Size(
    elements=1 << 14,
    bits=1003,
    tensors=4,
    rounds=2,
    step=Shape(1, 64, 2, 16, 2),
    job=Shape(1, 64, 2, 16, 2),
    steps=12,
    ranks=(3,),
)
SIZES = {"full": FULL, "small": SMALL}


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def parameters(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


def describe(error: BaseException) -> str:
    """Return an error in one line, with the last place of this repository that it passed."""
    places = traceback.extract_tb(error.__traceback__)
    own = [p for p in places if "site-packages" not in p.filename] or list(places)
    where = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    lines = str(error).strip().splitlines() or [""]
    text = lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"
    return f"{type(error).__name__}: {text[:400]}{where}"


def rows_of(case: Case) -> Iterator[Outcome]:
    """Run a case; its rows, named."""
    found = case.run()
    for row in [found] if isinstance(found, dict) else found:
        yield {"name": case.name, **row}
