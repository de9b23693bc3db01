"""Commands about the files of a training: check, migrate, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from _belief_dist_cli.app import Json, act, app, command


@command(
    app,
    "check ds_config.json",
    "check hf.json --hf",
    "check hostfile",
    "check --schema >ds.schema.json",
    one="something was found",
)
def check(
    path: Annotated[Path | None, typer.Argument(metavar="[PATH]", help="The file.")] = None,
    as_schema: Annotated[
        bool, typer.Option("--schema", help="Print a JSON schema for editors.")
    ] = False,
    hf: Annotated[bool, typer.Option("--hf", help="The Transformers Trainer reads it.")] = False,
    accelerate: Annotated[bool, typer.Option("--accelerate", help="Accelerate reads it.")] = False,
    as_json: Json = False,
) -> int:
    """Find mistakes in a DeepSpeed configuration.

    It may be a configuration, a hostfile or a .deepspeed_env, which its name tells. It is shown
    corrected.
    """
    return act(
        "check", path=path, as_schema=as_schema, hf=hf, accelerate=accelerate, as_json=as_json
    )


@command(
    app, "migrate train.py", "migrate ds_config.json --json", one="there is nothing to replace"
)
def migrate(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The .py or .json file.")],
    as_json: Json = False,
) -> int:
    """Show how a script or DeepSpeed JSON takes AdaBelief.

    It is shown as a diff, with what to know, where the file has Adam, AdamW or adabelief-pytorch.
    The file is read and not run, and stays as it is.
    """
    return act("migrate", path=path, as_json=as_json)


@command(app, "report run", "report run/metrics.jsonl --out page.html")
def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run, or a file of records.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The page.", show_default="report.html in that folder"),
    ] = None,
    as_json: Json = False,
) -> int:
    """Draw what a run has logged, as one page of HTML.

    It draws the records that StepMonitor has written to metrics.jsonl in the folder of the run,
    which may go on meanwhile, and prints where the page is; with --json also what has happened.
    """
    return act("report", run=run, out=out, as_json=as_json)
