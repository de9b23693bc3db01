"""Runs the Python blocks of all pages in this process, each page's in order, in its own folder.

Every page begins with `torch`, `nn` and `model_and_optimizer`; what else a block takes for granted
stands in a comment before it. Prints what failed as JSON: page, line, error.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn

import belief_dist
from belief_dist import ShardedAdaBelief

sys.path.insert(0, str(Path(__file__).parent))
from pages import with_language


def model_and_optimizer() -> tuple[nn.Module, ShardedAdaBelief]:
    """Return a small model and an optimizer of it."""
    belief_dist.distributed.init()
    model = nn.Linear(4, 1)
    return model, ShardedAdaBelief(model.named_parameters(), lr=1e-3)


def main(folder: Path) -> None:
    failed = []
    for page, blocks in groupby(with_language("python"), key=lambda block: block.page):
        known: dict[str, Any] = {"torch": torch, "nn": nn, "__name__": "__main__"}
        known |= {"ShardedAdaBelief": ShardedAdaBelief, "model_and_optimizer": model_and_optimizer}
        place = folder / page.replace("/", "-")
        place.mkdir()
        os.chdir(place)
        for block in blocks:
            if block.reason:
                continue
            try:
                exec(compile(block.prelude, f"{page}, prelude", "exec"), known)
                # A folder there would be one for all jobs of this machine.
                text = block.text.replace("/dev/shm", str(place))
                exec(compile("\n" * block.line + text, page, "exec"), known)
            except Exception:
                failed.append((page, block.line, traceback.format_exc(limit=-2)))
    (folder / "failed.json").write_text(json.dumps(failed))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
