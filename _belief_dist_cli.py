"""The command line of `belief-dist`: what may be said, without the code that does it.

Importing anything below belief_dist imports torch, which takes seconds. So this module lives
outside the package, and imports it when a command runs: help and wrong command lines are answered
at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

_WHAT = "The command `belief-dist`: works on checkpoints, checks configurations and environments."
# What `belief_dist.checkpoint.formats.convert` writes; a test compares the two.
TARGETS = ("belief_dist", "torch", "official", "universal", "safetensors")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 if things differ, 2 after an error."""
    args = _parser().parse_args(arguments)
    from belief_dist.commands import run

    return run(args)


def fail(program: str, sentence: str) -> int:
    """Say why in one line, and return the exit status of errors."""
    line = " ".join(sentence.split())
    line = line if len(line) <= 900 else f"{line[:900]}..."
    print(f"{program}: {line.rstrip('.')}.", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line."""

    def error(self, message: str) -> NoReturn:
        sys.exit(fail(self.prog, f"{message} (see {self.prog} --help)"))


class _Version(argparse.Action):
    """Tells the version that is installed."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import version

        print(f"belief-dist {version('belief-dist')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="belief-dist", description=_WHAT)
    parser.add_argument("--version", action=_Version, nargs=0, help="tell it, and end")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, in_short: str, what: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=in_short, description=what)
        made.set_defaults(action=name)
        return made

    checkpoints = commands.add_parser("checkpoint", help="inspect, convert, verify, diff")
    tools = checkpoints.add_subparsers(required=True, metavar="ACTION")

    def action(name: str, what: str) -> argparse.ArgumentParser:
        made = tools.add_parser(name, help=what, description=what)
        made.set_defaults(action=name)
        made.add_argument("--step", type=int, help="of a run directory; default: the newest")
        return made

    made = action("inspect", "Show what a checkpoint holds.")
    made.add_argument("path", type=Path)
    made = action("verify", "Compare all files with their checksums.")
    made.add_argument("path", type=Path)
    for name, what in (
        ("diff", "Show in which bits two training states differ."),
        ("convert", "Convert between formats."),
    ):
        made = action(name, what)
        made.add_argument("source", type=Path)
        made.add_argument("target", type=Path)
        made.add_argument("--weights", type=Path, help="the model's, where source is a state_dict")
        made.add_argument(
            "--names", type=Path, help="file with the parameters' names in order, one a line"
        )
        made.add_argument("--options", default="{}", help="JSON: options that source does not tell")
        made.add_argument("--trust", action="store_true", help="run code in DeepSpeed's pickles")
    made.add_argument("--to", choices=TARGETS, required=True)
    made.add_argument("--template", type=Path, help="a universal checkpoint of the same job")
    made.add_argument(
        "--averages", action="store_true", help="averaged weights; with --to safetensors"
    )
    made.add_argument("--from_adam", action="store_true", help="estimate s from Adam's v")
    made.add_argument("--eps", type=float, default=1e-16, help="AdaBelief's, with --from_adam")
    made = command(
        "doctor",
        "tell what serves here, and what to mend",
        "Tell what serves here, what is slow or broken, and what to do. On the ranks "
        "of a launcher (torchrun -m belief_dist.cli doctor) it tries the collectives, too. The "
        "exit status is 1 if there is something to do.",
    )
    made.add_argument("--json", action="store_true", help="print everything as JSON")
    made = command(
        "plan",
        "tell what every rank of a job will hold",
        "Tell what parameters, gradients, masters and states take of every rank, in "
        "each way to train, and the call for the fastest one that fits. Activations come on top. "
        "The exit status is 1 if none fits.",
    )
    made.add_argument(
        "model",
        help="a number of parameters (7e9), module:function that builds a model, or the folder or "
        "name of a Hugging Face model",
    )
    made.add_argument("--ranks", type=int, required=True, help="devices of the job")
    made.add_argument("--memory", type=float, help="GiB of each that these may take")
    made.add_argument(
        "--link", type=float, help="GB/s that each can send: tells how long that takes"
    )
    made.add_argument(
        "--picture", type=Path, help="draw memory for all numbers of ranks up to these, as PNG"
    )
    made.add_argument(
        "--averages",
        choices=("float32", "bfloat16"),
        help="of the weights, which our ways shall keep in this dtype",
    )
    made.add_argument("--json", action="store_true", help="print everything as JSON")
    made = command(
        "bench",
        "measure the update here",
        "Measure the update in each form on this machine, beside a plain pass over as many bytes.",
    )
    made.add_argument(
        "--elements", type=float, default=2.0**24, help="parameters of an update; default: 2**24"
    )
    made.add_argument("--picture", type=Path, help="draw it, as PNG")
    made.add_argument("--json", action="store_true", help="print everything as JSON")
    made = command(
        "migrate",
        "show how a script or DeepSpeed JSON takes AdaBelief",
        "Show how a training script, or a DeepSpeed JSON, takes AdaBelief where it has "
        "Adam, AdamW or adabelief-pytorch: as a diff, with what to know. It is read and not run, "
        "and stays as it is. The exit status is 1 if there is nothing to replace.",
    )
    made.add_argument("path", type=Path, help="the .py or .json file")
    made.add_argument("--json", action="store_true", help="print notes and diff as JSON")
    made = command(
        "report",
        "draw what a run has logged",
        "Draw the records that StepMonitor has written to metrics.jsonl in the folder "
        "of a run, as one page of HTML. The run may go on meanwhile.",
    )
    made.add_argument("run", type=Path, help="the folder of a run, or a file of records")
    made.add_argument("--out", type=Path, help="the page; default: report.html in that folder")
    made = command(
        "check",
        "find mistakes in a DeepSpeed configuration",
        "Say what is wrong in a DeepSpeed configuration, a hostfile or a .deepspeed_env, and show "
        "it corrected. Which of them a file is, its name tells. The exit status is 1 if something "
        "was found.",
    )
    made.add_argument("path", type=Path, nargs="?", help="the file")
    made.add_argument("--schema", action="store_true", help="print a JSON schema for editors")
    made.add_argument("--hf", action="store_true", help="the Transformers Trainer reads it")
    made.add_argument("--accelerate", action="store_true", help="Accelerate reads it")
    made.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser
