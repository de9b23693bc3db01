"""The command: `python -m benchmarks.gpu [--only NAME,NAME] [--seconds N] [--out FOLDER]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.gpu import report
from benchmarks.gpu.runner import Ran, Section, run_sections
from benchmarks.gpu.sections import SECTIONS


def choose(only: str | None) -> list[Section]:
    """Return the sections with these names, all if there are none.

    Raises:
        ValueError: A name is unknown.
    """
    known = {section.name: section for section in SECTIONS}
    names = list(known) if only is None else only.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"--only has {', '.join(unknown)}; sections are {', '.join(known)}.")
    return [known[name] for name in names]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", help=f"some of {','.join(s.name for s in SECTIONS)}")
    parser.add_argument("--seconds", type=float, default=460, help="that all may take")
    parser.add_argument("--patience", type=float, default=1, help="times the limits of sections")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="where to write")
    parser.add_argument("--commit", help="of the repository, where git cannot tell it")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal"
    )
    parser.add_argument("--size", choices=["full", "small"], default="full")
    options = parser.parse_args(arguments)
    try:
        sections = choose(options.only)
    except ValueError as error:
        parser.error(str(error))
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA GPU; torch sees none.", file=sys.stderr)
        return 2
    many = options.patience
    sections = [
        s._replace(seconds=many * s.seconds, case_seconds=many * s.case_seconds) for s in sections
    ]
    return run(sections, options)


def run(sections: list[Section], options: argparse.Namespace) -> int:
    """Run sections, print and write what comes; return the exit code."""
    folder: Path = options.out
    folder.mkdir(parents=True, exist_ok=True)
    about = report.describe_machine(options.device, options.commit)
    print("; ".join(f"{name} {value}" for name, value in about.items()))
    missing = [name for name, version in report.packages().items() if version is None]
    if missing:
        print(f"Not installed: {', '.join(missing)}; rows that need them say so.")

    def save(found: list[Ran]) -> None:
        report.write(folder, about, found)

    def tell(line: str) -> None:
        print(line, flush=True)

    found = run_sections(
        sections, options.device, options.size, folder, options.seconds, tell, save
    )
    failed = [ran.section.name for ran in found if ran.failed]
    print(f"\n{folder / 'gpu.md'}, {folder / 'gpu.json'}")
    if failed:
        print(f"Failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
