"""Commands about a machine and the jobs on it: doctor, plan, bench."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from belief_dist import memory_plan
from belief_dist.bench import draw_bench, measure
from belief_dist.commands.output import print_json, print_table
from belief_dist.doctor import examine_ranks
from belief_dist.memory_plan import Row, python_line, shapes_of, shapes_of_count, suggestion
from belief_dist.options import is_first_rank
from belief_dist.plan_picture import draw_plan


def doctor(*, as_json: bool) -> int:
    """Tell what serves here, and return 1 if there is something to do."""
    checks = examine_ranks()
    to_do = [each for each in checks if each.advice]
    if is_first_rank():
        if as_json:
            print_json([each._asdict() for each in checks])
        else:
            print_table(("what", "found"), [(each.topic, each.found) for each in checks])
            for each in to_do:
                print(f"{each.topic}: {each.advice}")
            if not to_do:
                print("All is well.")
    return 1 if to_do else 0


def plan(
    *,
    model: str,
    ranks: int,
    memory: float | None,
    link: float | None,
    picture: Path | None,
    averages: str | None,
    as_json: bool,
) -> int:
    """Tell what every rank will hold, and return 1 if nothing fits."""
    if ranks < 1:
        raise ValueError(f"--ranks must be 1 or more, got {ranks}.")
    if memory is not None and not memory > 0:
        raise ValueError(f"--memory must be more than 0 GiB, got {memory:g}.")
    if link is not None and not link > 0:
        raise ValueError(f"--link must be more than 0 GB/s, got {link:g}.")
    try:
        count = float(model)
    except ValueError:
        shapes = shapes_of(model)
    else:
        if not 1 <= count <= 1e15:
            raise ValueError(f"a model has 1 to 1e15 parameters, got {model}.")
        shapes = shapes_of_count(int(count))
    nbytes = None if memory is None else memory * 2**30
    keeps = None if averages is None else {"ema_decay": 0.999, "ema_dtype": averages}
    rows = memory_plan.plan(shapes, ranks, nbytes, keeps)
    best = suggestion(rows, nbytes)
    if picture is not None:
        draw_plan(picture, shapes, ranks, nbytes, keeps)
    speed = None if link is None else link * 1e9
    if as_json:
        content = [
            {"way": row.way.name, "bytes": row.held, "bytes on the host": row.on_host}
            | {"bytes sent": row.sent}
            | ({} if speed is None else {"seconds to send": row.sent / speed})
            | ({} if nbytes is None else {"fits": row.held <= nbytes, "largest": row.largest})
            for row in rows
        ]
        print_json({"ways": content, "suggestion": best and python_line(best.way)})
        return int(best is None)
    columns: dict[str, Callable[[Row], str]] = {
        "way to train": lambda row: row.way.name,
        "GiB": lambda row: f"{row.held / 2**30:.2f}",
        "on host": lambda row: f"{row.on_host / 2**30:.2f}",
        "GB sent": lambda row: f"{row.sent / 1e9:.2f}",
    }
    if speed is not None:
        columns["which takes"] = lambda row: f"{1e3 * row.sent / speed:.0f} ms"
    if nbytes is not None:
        columns["fits"] = lambda row: "yes" if row.held <= nbytes else "no"
        columns["largest model"] = lambda row: f"{row.largest / 1e9:.3g}e9"
    print_table(list(columns), [[show(row) for show in columns.values()] for row in rows])
    if best is None:
        print("None of ours fits: take more ranks, or AdaBelief under ZeRO-3 or FSDP2.")
        return 1
    print(f"The fastest of ours that fits:\n    {python_line(best.way)}")
    return 0


def bench(*, elements: float, picture: Path | None, as_json: bool) -> int:
    """Measure the update here."""
    if not 1 <= elements <= 1e12:
        raise ValueError(f"--elements must be 1 to 1e12, got {elements:g}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = measure(int(elements), device)
    if picture is not None:
        draw_bench(picture, found)
    if as_json:
        print_json({**found._asdict(), "updates": [each._asdict() for each in found.updates]})
        return 0
    print(f"{found.device}: memory is read and written at {found.memory / 1e9:.1f} GB/s")
    print_table(
        ("update", "bytes", "ns", "of memory's speed"),
        [
            (each.form, f"{each.per_param:.1f}", f"{each.seconds * 1e9:.3f}", f"{each.share:.2f}")
            for each in found.updates
        ],
    )
    print("Bytes and ns are for each parameter that a rank owns.")
    return 0
