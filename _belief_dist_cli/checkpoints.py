"""Commands about checkpoints: inspect, verify, diff, convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from _belief_dist_cli.app import NUMBER, WHOLE, Json, act, app, checkpoint_app, command

# What `belief_dist.checkpoint.formats.convert` writes; a test compares the two.
Target = Literal["belief_dist", "torch", "official", "universal", "safetensors"]
TARGETS: tuple[str, ...] = get_args(Target)

Checkpoint = Annotated[
    Path, typer.Argument(metavar="PATH", help="A run directory, or a checkpoint in it.")
]
Step = Annotated[
    int | None,
    typer.Option("--step", help="Of a run directory.", show_default="the newest", **WHOLE),
]
Weights = Annotated[
    Path | None, typer.Option("--weights", help="The model's, where SOURCE is a state_dict.")
]
Names = Annotated[
    Path | None,
    typer.Option("--names", help="File with the parameters' names in order, one a line."),
]
Options = Annotated[str, typer.Option("--options", help="JSON: options that SOURCE does not tell.")]
Trust = Annotated[bool, typer.Option("--trust", help="Run code in DeepSpeed's pickles.")]


@command(checkpoint_app, "checkpoint inspect run", "checkpoint inspect run --step 200 --json")
def inspect(path: Checkpoint, step: Step = None, as_json: Json = False) -> int:
    """Show what a checkpoint holds."""
    return act("inspect", path=path, step=step, as_json=as_json)


@command(checkpoint_app, "checkpoint verify run", "checkpoint verify run --step 200")
def verify(path: Checkpoint, step: Step = None, as_json: Json = False) -> int:
    """Compare all files with their checksums.

    A file that is missing, truncated or changed is an error, which names it.
    """
    return act("verify", path=path, step=step, as_json=as_json)


@command(
    checkpoint_app,
    "checkpoint diff run other-run",
    "checkpoint diff run optimizer.pt --weights model.pt",
    one="they differ",
)
def diff(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="In any format.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Likewise.")],
    step: Step = None,
    weights: Weights = None,
    names: Names = None,
    options: Options = "{}",
    trust: Trust = False,
    as_json: Json = False,
) -> int:
    """Show in which bits two training states differ."""
    return act(
        "diff",
        source=source,
        target=target,
        step=step,
        weights=weights,
        names=names,
        options=options,
        trust=trust,
        as_json=as_json,
    )


@command(
    checkpoint_app,
    "checkpoint convert run optimizer.pt --to torch",
    "checkpoint convert run model.safetensors --to safetensors --averages",
    "checkpoint convert adamw.pt run --to belief_dist --weights weights.pt --from_adam",
    "checkpoint convert ds/global_step200 run --to belief_dist --trust",
)
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="A run directory or checkpoint, a DeepSpeed tag, or a file with a state_dict.",
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(metavar="TARGET", help="A run directory, a new directory, or a file."),
    ],
    to: Annotated[Target, typer.Option("--to", help="The format of TARGET.")],
    step: Step = None,
    weights: Weights = None,
    names: Names = None,
    options: Options = "{}",
    trust: Trust = False,
    template: Annotated[
        Path | None,
        typer.Option("--template", help="A universal checkpoint of the same job."),
    ] = None,
    averages: Annotated[
        bool, typer.Option("--averages", help="Averaged weights; with --to safetensors.")
    ] = False,
    from_adam: Annotated[
        bool, typer.Option("--from_adam", help="Estimate s from Adam's v.")
    ] = False,
    eps: Annotated[
        float, typer.Option("--eps", help="AdaBelief's, with --from_adam.", **NUMBER)
    ] = 1e-16,
    as_json: Json = False,
) -> int:
    """Convert between formats."""
    return act(
        "convert",
        source=source,
        target=target,
        to=to,
        step=step,
        weights=weights,
        names=names,
        options=options,
        trust=trust,
        template=template,
        averages=averages,
        from_adam=from_adam,
        eps=eps,
        as_json=as_json,
    )


app.add_typer(checkpoint_app, name="checkpoint")
