"""One run of the example over changing numbers of ranks, beside one that never stops."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

_ROOT = Path(__file__).parent.parent
_RANKS = (4, 3, 1, 4)
_BATCH = 24  # a multiple of every number of ranks: the global batch is always the same
Runs = dict[str, list[dict[str, Any]]]


class Part(NamedTuple):
    """How a quarter of the resumed run compares with the other run.

    Attributes:
        first: Its first step.
        last: Its last step.
        ranks: By which it was trained.
        equal: Steps whose loss has the same bits.
        largest_difference: Of the training losses, in nats per byte.
    """

    first: int
    last: int
    ranks: int
    equal: int
    largest_difference: float


def _train(ranks: int, steps: int, *arguments: str | Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(ranks), "examples/train_gpt.py", "--config", "configs/gpt.yaml"]
    settings = {"steps": steps, "batch": _BATCH, "save_every": steps, "eval_every": steps}
    command += [f"--{name}={value}" for name, value in settings.items()]
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=_ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"training at {ranks} ranks failed:\n{done.stderr[-4000:]}")


def run_resume(steps: int) -> Runs:
    """Return the log's rows of the "resumed" and of the "uninterrupted" run.

    Raises:
        ValueError: `steps` has no quarters.
    """
    if steps < 1 or steps % len(_RANKS):
        raise ValueError(f"steps must be a multiple of {len(_RANKS)}, got {steps}.")
    quarter = steps // len(_RANKS)
    with tempfile.TemporaryDirectory() as scratch:
        resumed, whole = Path(scratch, "resumed"), Path(scratch, "uninterrupted")
        for number, ranks in enumerate(_RANKS):
            where = ("--resume", resumed) if number else ("--out", resumed)
            _train(ranks, steps, *where, "--stop_at", str((number + 1) * quarter))
        _train(_RANKS[0], steps, "--out", whole)
        return {
            run.name: [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
            for run in (resumed, whole)
        }


def compare_runs(runs: Runs) -> list[Part]:
    """Return a comparison of the training losses for each quarter."""
    pairs = list(zip(runs["resumed"], runs["uninterrupted"], strict=True))
    quarter = len(pairs) // len(_RANKS)
    parts = []
    for number, ranks in enumerate(_RANKS):
        rows = pairs[number * quarter : (number + 1) * quarter]
        gaps = [abs(one["loss"] - other["loss"]) for one, other in rows]
        parts.append(
            Part(rows[0][0]["step"], rows[-1][0]["step"], ranks, gaps.count(0.0), max(gaps))
        )
    return parts


def draw_resume(runs: Runs, path: Path) -> None:
    """Draw both curves over one another, and their difference below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(
        2, 1, figsize=(8, 6), sharex=True, layout="constrained", height_ratios=(2, 1)
    )
    steps = [row["step"] for row in runs["resumed"]]
    losses = {name: [row["loss"] for row in rows] for name, rows in runs.items()}
    above.plot(steps, losses["uninterrupted"], lw=2.5, c="C1", label="4 ranks, uninterrupted")
    above.plot(steps, losses["resumed"], lw=0.8, c="C0", label="4, 3, 1 and 4 ranks")
    above.set(ylabel="training loss (nats per byte)")
    above.legend()
    gaps = [abs(a - b) for a, b in zip(losses["resumed"], losses["uninterrupted"], strict=True)]
    below.semilogy(steps, [gap or float("nan") for gap in gaps], lw=0.8, c="C0")
    below.set(xlabel="step", ylabel="|difference|, where not 0")
    for part in compare_runs(runs):
        for axes in (above, below):
            axes.axvline(part.last + 0.5, ls=":", c="grey", lw=0.8)
        label = f"{part.ranks} ranks" if part.ranks > 1 else "1 rank"
        place = above.get_xaxis_transform()
        above.text((part.first + part.last) / 2, 0.93, label, transform=place, ha="center")
    figure.savefig(path, dpi=110)
    plt.close(figure)
