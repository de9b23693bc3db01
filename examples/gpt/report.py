"""What a run shows and writes: progress bar, log, loss plot and the final table. By one rank."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm


class Log:
    """A file of JSON lines, one for every step; when a run resumes, it goes on behind its step."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.rows = [row for row in read_log(path) if row["step"] <= resumed_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        os.replace(temporary, path)
        self._file = path.open("a", buffering=1)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a log; none if there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def progress_bar(done: int, total: int) -> tqdm[Any]:
    """Return a bar that says at each step how training goes."""
    # In a file every refresh is a line.
    seconds = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(initial=done, total=total, unit="step", dynamic_ncols=True, mininterval=seconds)


def draw_losses(rows: list[dict[str, Any]], unigram: float, path: Path) -> None:
    """Write the plot of all losses, beside what a model without context would reach at best."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], lw=0.8, label="training")
    held_out = [row for row in rows if "held_out_loss" in row]
    axes.plot(
        [row["step"] for row in held_out],
        [row["held_out_loss"] for row in held_out],
        "o-",
        label="held out",
    )
    axes.axhline(unigram, ls="--", c="grey", label="unigram entropy of the held-out text")
    axes.set(xlabel="step", ylabel="loss (nats per byte)")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_table(
    held: dict[str, int], unsharded: dict[str, int], world_size: int, engine: str
) -> None:
    """Print the bytes that the fullest rank holds beside those of an unsharded optimizer."""
    table = Table(title=f"MB per rank, {world_size} ranks, engine {engine}")
    for column in ("", "held", "unsharded", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    rows = [(kind, held[kind], unsharded[kind]) for kind in unsharded]
    rows.append(("total", sum(held.values()), sum(unsharded.values())))
    for kind, here, whole in rows:
        ratio = f"{here / whole:.2f}" if whole else "-"
        table.add_row(
            kind, f"{here / 1e6:.3f}", f"{whole / 1e6:.3f}", ratio, end_section=kind == rows[-2][0]
        )
    Console().print(table)


def unsharded_bytes(num_params: int, itemsize: int) -> dict[str, int]:
    """Return what data-parallel AdaBelief without sharding holds on every rank.

    Args:
        num_params: Elements of the model.
        itemsize: Bytes of an element of parameters and gradients; under 4, masters come on top.
    """
    return {
        "parameters": num_params * itemsize,
        "gradients": num_params * itemsize,
        "masters": num_params * 4 if itemsize < 4 else 0,
        "exp_avg": num_params * 4,
        "exp_avg_sq": num_params * 4,
    }
