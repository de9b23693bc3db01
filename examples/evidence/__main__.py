"""`python -m examples.evidence` lists the experiments; `run NAME`, `run all`, `report`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from examples.evidence.catalog import PAGE, STUDIES
from examples.evidence.findings import load, store_of
from examples.evidence.runner import complete

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[2] / "docs"


def overview(folder: Path) -> None:
    """List the experiments, their cost and their state."""
    table = Table(Column("name", no_wrap=True), "question", "minutes", "runs", "took")
    for study in STUDIES.values():
        store = store_of(study, folder)
        took = sum(store.seconds.values()) / 60
        numbers = (f"{study.minutes:g}", f"{len(store)} of {study.count}", f"{took:.1f}")
        table.add_row(study.name, study.question, *numbers)
    Console().print(table)
    print("Minutes are of one core. To go on: run NAME, run all, report. Options: --help")


def run(names: list[str], folder: Path, quick: bool, jobs: int) -> None:
    """Run what is missing of some experiments."""
    for name in names:
        study = STUDIES[name].shortened() if quick else STUDIES[name]
        complete(study, store_of(study, folder), jobs)


def report(folder: Path, docs: Path) -> None:
    """Write the page and its figures."""
    from examples.evidence.report import draw, text  # matplotlib and scipy load slowly

    findings = load(folder)
    lacking = [study.name for study in PAGE if findings[study.name].missing]
    if lacking:
        sys.exit(f"First run {', '.join(lacking)}, a matter of minutes; all else may be missing.")
    (docs / "evidence.md").write_text(text(findings))
    draw(findings, docs)


def samples(folder: Path, docs: Path) -> None:
    """Draw what the GANs make up."""
    from examples.evidence.samples import draw_samples

    draw_samples(load(folder)["gan"], docs / "evidence-gan-samples.png")


def main(arguments: list[str] | None = None) -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser("python -m examples.evidence", description=__doc__)
    parser.add_argument("--results", type=Path, help="folder of runs; default: the repository's")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("list", help="experiments, their cost and state (the default)")
    running = commands.add_parser("run", help="do what is missing; may be stopped at any time")
    running.add_argument("name", choices=["all", *STUDIES])
    running.add_argument("--quick", action="store_true", help="a moment of each, into runs/")
    running.add_argument("--jobs", type=int, default=1, help="processes, each with one thread")
    reporting = commands.add_parser("report", help="write docs/evidence.md and its figures")
    reporting.add_argument("--docs", type=Path, default=DOCS, help="folder to write to")
    sampling = commands.add_parser("samples", help="train the GANs' seed 0 again and draw")
    sampling.add_argument("--docs", type=Path, default=DOCS, help="folder to write to")
    options = parser.parse_args(arguments)

    folder = options.results or RESULTS
    if options.command == "run":
        if options.quick and options.results is None:
            folder = Path("runs/evidence-quick")
        names = list(STUDIES) if options.name == "all" else [options.name]
        try:
            run(names, folder, options.quick, options.jobs)
        except FileNotFoundError as error:
            sys.exit(str(error))
    elif options.command == "samples":
        samples(folder, options.docs)
    elif options.command == "report":
        report(folder, options.docs)
    else:
        overview(folder)


if __name__ == "__main__":
    main()
