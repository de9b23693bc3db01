"""One run of the example over changing numbers of ranks, beside one that never stops."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.pictures import DPI, GREY, SKY, canvas, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def plot_resume(file: Path, out: Path) -> None:
    """Draw the result of `resume --json FILE`.

    Args:
        file: What was written.
        out: The picture, PNG or SVG.
    """
    draw_resume(json.loads(file.read_text()), out)


def draw_resume(runs: Runs, path: Path) -> None:
    """Draw both curves over one another, and their difference below."""
    resume_figure(runs).savefig(path, dpi=DPI)


def resume_figure(runs: Runs) -> Figure:
    """Return the figure, whose lines are named inside of it."""
    figure = canvas(5.4)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    steps = [row["step"] for row in runs["resumed"]]
    styles = {"uninterrupted": (SKY, 4.5), "resumed": ("black", 1.0)}
    losses = {name: [row["loss"] for row in rows] for name, rows in runs.items()}
    ranks = [str(ranks) for ranks in _RANKS]
    names = {
        "uninterrupted": f"{_RANKS[0]} ranks, never stopped (below)",
        "resumed": f"{', '.join(ranks[:-1])} and {ranks[-1]} ranks, resumed (on top)",
    }
    for place, (name, (color, width)) in enumerate(styles.items()):
        above.plot(steps, losses[name], lw=width, color=color)
        where = {"transform": above.transAxes, "va": "center"}
        above.plot(
            [0.28, 0.33], [0.8 - 0.1 * place] * 2, lw=width, color=color, transform=above.transAxes
        )
        above.text(0.35, 0.8 - 0.1 * place, names[name], fontsize=10, **where)
    above.set(ylabel="training loss\n(nats per byte)")
    gaps = [abs(a - b) for a, b in zip(losses["resumed"], losses["uninterrupted"], strict=True)]
    below.plot(steps, [gap * 1e7 for gap in gaps], ".", ms=3, color="black")
    below.set(xlabel="step", ylabel="their difference\n(1e-7 of these)", ylim=(-0.4, None))
    for part in compare_runs(runs):
        for panel in (above, below):
            panel.axvline(part.last + 0.5, ls=":", color=GREY, lw=0.8)
        label = f"{part.ranks} ranks" if part.ranks > 1 else "1 rank"
        place = above.get_xaxis_transform()
        above.text((part.first + part.last) / 2, 1.03, label, transform=place, ha="center")
    for panel in (above, below):
        plain(panel)
    figure.align_ylabels()
    figure.subplots_adjust(left=0.11, right=0.98, bottom=0.1, top=0.94, hspace=0.08)
    return figure
