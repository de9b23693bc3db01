"""The command, its groups, and how it answers: help, a status, or an error in one line."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Annotated, Any, TypeVar

import typer
from typer.main import get_command

PROGRAM = "belief-dist"
# The base of all errors in a command line, which typer has in a private module.
_UsageError: Any = typer.BadParameter.__base__
Function = TypeVar("Function", bound=Callable[..., int])

app = typer.Typer(
    help="Works on checkpoints, checks configurations and environments.\n\n"
    "Exit status of every command: 0 if all is well, 1 if something was found, 2 after an error.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
checkpoint_app = typer.Typer(help="Inspect, verify, compare and convert checkpoints.")


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number") from None


# Typer's own answers do not tell the value that they refuse.
WHOLE: dict[str, Any] = {"parser": _whole, "metavar": "INTEGER"}
NUMBER: dict[str, Any] = {"parser": _number, "metavar": "NUMBER"}
Json = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 if something was found, 2 after an error."""
    try:
        status = _command(sys.stdout.isatty()).main(
            args=arguments, prog_name=PROGRAM, standalone_mode=False
        )
    except _UsageError as error:
        return fail(PROGRAM, _sentence(error))
    except typer.Abort:
        return 130  # Ctrl-C
    return int(status or 0)


def fail(program: str, sentence: str) -> int:
    """Say why in one line, and return the exit status of errors."""
    line = " ".join(sentence.split())
    line = line if len(line) <= 900 else f"{line[:900]}..."
    print(f"{program}: {line.rstrip('.')}.", file=sys.stderr)
    return 2


def act(action: str, **arguments: Any) -> int:
    """Do what a command says, and return its exit status."""
    from belief_dist.commands import run

    return run(action, arguments)


def command(group: typer.Typer, *examples: str, one: str = "") -> Callable[[Function], Function]:
    """Make a function a command of its name, whose help is its docstring and what follows here.

    Args:
        group: Of which commands it is.
        examples: Command lines.
        one: What the exit status 1 means, if the command has it.
    """
    lines = "\n".join(f"  {PROGRAM} {example}" for example in examples)
    status = f"Exit status: 0{f', 1 if {one}' if one else ''}, 2 after an error."

    def register(function: Function) -> Function:
        what = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(function) or "")
        # Lines after \b stay as they are.
        text = f"{what}\n\n\b\nExamples:\n{lines}\n\n{status}"
        return group.command(help=text)(function)

    return register


def _tell_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"{PROGRAM} {version(PROGRAM)}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Tell the version that is installed.",
            callback=_tell_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    pass


@lru_cache
def _command(is_terminal: bool) -> Any:
    """Return the parser; its help is for a terminal, or plain text for whatever else reads it."""
    for group in (app, checkpoint_app):
        group.rich_markup_mode = "rich" if is_terminal else None
    return get_command(app)


def _sentence(error: Any) -> str:
    """Return what is wrong with a command line, what would be right, and where help is."""
    # "Value error" is what pydantic, which newer typer converts by, says first.
    said = error.format_message().rstrip(".").replace("Value error, ", "")
    if error.ctx is None:
        return f"{said} (see {PROGRAM} --help)"
    known = getattr(error.ctx.command, "commands", ())
    if known and "Did you mean" not in said:
        said += f"; there are {', '.join(known)}"
    return f"{said} (see {error.ctx.command_path} --help)"
