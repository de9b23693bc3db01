"""Commands that measure what smaller states and masters do to results."""

from __future__ import annotations

from pathlib import Path

from benchmarks.accuracy import measure
from benchmarks.evidence import (
    accuracy_sheet,
    draw_accuracy,
    draw_training,
    overview,
    tell_sheets,
    training_sheet,
    write_markdown,
)
from benchmarks.gradients import recorded, small_steps, synthetic
from benchmarks.smallstates import MODES, train


def accuracy(
    elements: int = 16384,
    steps: int = 1000,
    decades: list[float] | None = None,
    eps: list[float] | None = None,
    recorded_steps: int = 300,
    recorded_elements: int = 8192,
    json: Path | None = None,
    markdown: Path | None = None,
    picture: Path | None = None,
) -> None:
    """Compare smaller states and masters with the rule in float64 (7 minutes).

    Args:
        elements: Of synthetic gradients, a multiple of 256.
        steps: Of synthetic gradients.
        decades: Powers of ten that the gradients of one block of 256 spread over; 0, 2, 4
            and 15 by default.
        eps: Of the rule; 1e-16 and 1e-8 by default.
        recorded_steps: Of the main job, whose gradients are recorded; 0 for none.
        recorded_elements: At most of one parameter.
        json: Also write all errors here.
        markdown: Also write an overview here.
        picture: Also draw errors by the size of the gradients here, PNG or SVG.
    """
    sources = [recorded(recorded_steps, recorded_elements)] if recorded_steps else []
    sources += [
        synthetic(elements, steps, spread, each)
        for each in eps or [1e-16, 1e-8]
        for spread in decades or [0.0, 2.0, 4.0, 15.0]
    ]
    sources.append(small_steps(elements, steps))
    cases = [measure(source) for source in sources]
    tell_sheets([accuracy_sheet(case) for case in cases], {"accuracy": cases}, json)
    if markdown is not None:
        write_markdown(markdown, overview(cases))
    if picture is not None:
        draw_accuracy(cases, picture)


def smallstates(
    steps: int = 200,
    seeds: int = 3,
    modes: list[str] | None = None,
    processes: int = 2,
    arguments: list[str] | None = None,
    json: Path | None = None,
    markdown: Path | None = None,
    picture: Path | None = None,
) -> None:
    """Train the main job with smaller states and masters, from several seeds.

    Args:
        steps: Of each training.
        seeds: How many.
        modes: Their names; all by default.
        processes: Trainings at the same time, each with one thread.
        arguments: Further ones of examples/train_gpt.py, like --layers=2.
        json: Also write all held-out losses here.
        markdown: Also write the table here.
        picture: Also draw held-out losses here, PNG or SVG.
    """
    found = train(modes or list(MODES), range(1, seeds + 1), steps, arguments or [], processes)
    sheet = training_sheet(found)
    tell_sheets([sheet], {"smallstates": found}, json)
    if markdown is not None:
        write_markdown(markdown, [sheet])
    if picture is not None:
        draw_training(found, picture)
