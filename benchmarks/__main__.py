"""`python -m benchmarks [update|step] [options]`; runs both if neither is named."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from benchmarks.report import Result, machine_line, save, show
from benchmarks.step import chosen_engines, run_step
from benchmarks.team import Workload
from benchmarks.update import run_update


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times belief_dist next to the closest alternatives, on the CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("which", nargs="?", choices=("update", "step"), help="default: both")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all timings here")

    update = parser.add_argument_group("update: one optimizer step in one process")
    update.add_argument("--elements", type=int, default=64 << 20, help="parameters")
    update.add_argument("--tensor", type=int, default=1 << 20, help="parameters in each tensor")
    update.add_argument("--repeats", type=int, default=9, help="of each contender")
    update.add_argument("--threads", type=int, help="instead of torch's own choice")

    step = parser.add_argument_group("step: whole training steps on several ranks")
    step.add_argument("--ranks", type=int, default=2, help="processes")
    step.add_argument("--rounds", type=int, default=5, help="how often engines take turns")
    step.add_argument("--steps", type=int, default=2, help="timed steps in each turn")
    step.add_argument("--layers", type=int, default=10, help="of the model")
    step.add_argument("--width", type=int, default=512, help="of the model, a multiple of 64")
    step.add_argument("--batch", type=int, default=1, help="sequences per rank")
    step.add_argument("--context", type=int, default=128, help="bytes in each sequence")
    step.add_argument("--only", nargs="+", default=[], metavar="WORD", help="in engines' names")
    args = parser.parse_args()
    if not chosen_engines(args.only):
        parser.error(f"--only matches none of: {'; '.join(chosen_engines([]))}")
    return args


def main() -> None:
    """Run what was asked for."""
    args = parse_arguments()
    console = Console()
    console.print(machine_line(), markup=False)
    results: dict[str, Result] = {}
    if args.which != "step":
        results["update"] = run_update(args.elements, args.tensor, args.repeats, args.threads)
        show(console, results["update"])
    if args.which != "update":
        work = Workload(
            ranks=args.ranks,
            steps=args.steps,
            layers=args.layers,
            width=args.width,
            batch=args.batch,
            context=args.context,
        )
        results["step"] = run_step(work, args.rounds, args.only)
        show(console, results["step"])
    if args.json is not None:
        save(args.json, results)


if __name__ == "__main__":
    main()
