"""Sheets of generated pictures, from generators that are trained again: runs keep numbers alone."""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from examples.evidence.adversarial import LATENT, train
from examples.evidence.findings import Findings
from examples.evidence.style import picture

_ROWS, _COLUMNS = 3, 8


def draw_samples(found: Findings, path: Path) -> None:
    """Draw pictures of every contender on one rank, trained with seed 0 as in its recorded run."""
    keys = [key for key, cell in found.cells.items() if cell.work.ranks == 1 and found.runs(*key)]
    with picture(path, len(keys), 3, (2.6, 1.2)) as panels:
        for panel, key in zip(panels, tqdm(keys, desc="samples"), strict=True):
            setting, name = key
            cell = found.cells[key]
            artist = train(cell.work, cell.contender, found.lr(setting, name), 0)[1].eval()
            with torch.no_grad():
                drawn = artist(torch.randn(_ROWS * _COLUMNS, LATENT)).view(_ROWS, _COLUMNS, 28, 28)
            sheet = drawn.transpose(1, 2).reshape(_ROWS * 28, _COLUMNS * 28)
            panel.imshow(sheet, cmap="gray", vmin=-1, vmax=1)
            panel.set(title=f"{setting}, {name}", xticks=[], yticks=[])
