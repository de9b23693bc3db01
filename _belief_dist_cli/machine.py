"""Commands about a machine and the jobs on it: doctor, plan, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from _belief_dist_cli.app import NUMBER, WHOLE, Json, act, app, command


@command(
    app,
    "doctor",
    "doctor --json",
    "doctor  # on every rank: torchrun --nproc-per-node=8 -m belief_dist.cli doctor",
    one="there is something to do",
)
def doctor(as_json: Json = False) -> int:
    """Tell what serves here, what is slow or broken, and what to do.

    On the ranks of a launcher it tries the collectives, too.
    """
    return act("doctor", as_json=as_json)


@command(
    app,
    "plan 7e9 --ranks 64 --memory 70",
    "plan 7e9 --ranks 64 --link 50 --picture plan.png",
    "plan mymodels.gpt:build --ranks 8 --averages float32",
    one="nothing fits",
)
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A number of parameters (7e9), module:function that builds a model, or the folder "
            "or name of a Hugging Face model.",
        ),
    ],
    ranks: Annotated[int, typer.Option("--ranks", help="Devices of the job.", **WHOLE)],
    memory: Annotated[
        float | None, typer.Option("--memory", help="GiB of each that these may take.", **NUMBER)
    ] = None,
    link: Annotated[
        float | None,
        typer.Option(
            "--link", help="GB/s that each can send: tells how long that takes.", **NUMBER
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", help="Draw memory for all numbers of ranks up to these, as PNG."),
    ] = None,
    averages: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option("--averages", help="Of the weights, which our ways shall keep in this dtype."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Tell what every rank of a job will hold.

    That is what parameters, gradients, masters and states take in each way to train, and the call
    for the fastest one that fits. Activations come on top.
    """
    return act(
        "plan",
        model=model,
        ranks=ranks,
        memory=memory,
        link=link,
        picture=picture,
        averages=averages,
        as_json=as_json,
    )


@command(app, "bench", "bench --elements 1e6 --picture bench.png")
def bench(
    elements: Annotated[
        float,
        typer.Option("--elements", help="Parameters of an update.", show_default="2**24", **NUMBER),
    ] = 2.0**24,
    picture: Annotated[Path | None, typer.Option("--picture", help="Draw it, as PNG.")] = None,
    as_json: Json = False,
) -> int:
    """Measure the update here.

    It is measured in each form, beside a plain pass over as many bytes.
    """
    return act("bench", elements=elements, picture=picture, as_json=as_json)
