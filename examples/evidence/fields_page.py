"""What the report says about the page: tables of its functions, its two tables, its formula."""

from __future__ import annotations

import math
from collections.abc import Mapping

from examples.evidence.direction import LEVELS
from examples.evidence.findings import Findings
from examples.evidence.tables import Step, regions, trace
from examples.evidence.toys import AVERAGED, CASES, HEAVY, Case, Seen
from examples.evidence.wording import number, spread, table

_NAMES = (HEAVY, AVERAGED, "Adam", "AdaBelief")
_CLOSE = 0.05  # of the video's frame, or of the way to the minimum


def fields(findings: Mapping[str, Findings]) -> dict[str, str]:
    """Return Markdown by the names that the template has for it."""
    same, tuned = findings["toys"], findings["toys-tuned"]
    return {
        **_videos(same),
        "toys": _steps(same, tuned),
        "trace": _trace(),
        "regions": _regions(),
        "direction": _direction(findings["direction"]),
    }


def reached(found: Findings, case: Case, name: str, seen: Seen) -> tuple[str, float]:
    """Return what a video and our run say, and how far apart they are.

    Frames as a share of the video's; ends by their distance, as a share of the way from the start.
    """
    points = found.store[next(iter(found.runs(case.name, name).values()))]
    if seen.frame is not None:
        near = points[-1]["near"]
        return f"{seen.frame} / {near:.0f}", abs(near - seen.frame) / seen.frame
    assert seen.end is not None
    at = next(point for point in points if point["step"] >= case.frames)
    place = (at["x"], at["y"])
    told = f"({seen.end[0]:g}, {seen.end[1]:g}) / ({place[0]:.2f}, {place[1]:.2f})"
    return told, math.dist(place, seen.end) / math.dist(case.start, seen.end)


def _videos(found: Findings) -> dict[str, str]:
    rows, far = [], []
    for case in CASES:
        cells = []
        for name, seen in (("AdaBelief", case.belief), ("Adam", case.adam)):
            told, deviation = reached(found, case, name, seen)
            cells.append(f"{told} ({100 * deviation:.0f} %)")
            if deviation > _CLOSE:
                far.append(f"{name} on *{case.name}*")
        rows.append([case.name, *cells])
    return {
        "videos": table(["", "AdaBelief", "Adam"], rows),
        "close": f"{2 * len(CASES) - len(far)} of {2 * len(CASES)}",
        "far": ", ".join(far) or "none",
    }


def _steps(same: Findings, tuned: Findings) -> str:
    rows = [
        [case.name]
        + [_settled(same, case, name) for name in _NAMES]
        + [f"{_settled(tuned, case, name)} ({tuned.lr(case.name, name):g})" for name in _NAMES]
        for case in CASES
    ]
    return table(["", *_NAMES, *(f"{name}, tuned" for name in _NAMES)], rows)


def _settled(found: Findings, case: Case, name: str) -> str:
    value = next(iter(found.values(case.name, name, "settled").values()))
    return "never" if math.isnan(value) else f"{value:.0f}"


def _trace() -> str:
    columns = ["step", *map(str, range(1, 6))]
    along = {"x": [1.0] * 5, "y": [-1.0, 1.0, -1.0, 1.0, -1.0]}
    rows = []
    for axis, gradients in along.items():
        steps = trace(gradients, (0.9, 0.999))
        for letter in Step._fields[1:]:
            values = (getattr(step, letter) for step in steps)
            rows.append([f"{letter} of {axis}", *(f"{value:.2f}" for value in values)])
    return table(columns, rows)


def _regions() -> str:
    columns = ["region", "mean", "swing", "ideal step", "SGD", "Adam", "AdaBelief"]
    rows = []
    for region in regions():
        steps = map(number, (region.sgd, region.adam, region.belief))
        rows.append(
            [region.name, f"{region.gradient:g}", f"{region.swing:g}", region.ideal, *steps]
        )
    return table(columns, rows)


def _direction(found: Findings) -> str:
    rows = []
    for kind in ("equal", "unequal"):
        for level in LEVELS:
            cells = [f"{kind}, {level:g}"]
            for rule in ("Adam", "AdaBelief"):
                setting = f"{kind}, noise {level:g}"
                for metric in ("gradient", "sign"):
                    measured = spread(found.interval(setting, rule, metric))
                    formula = found.interval(setting, rule, f"predicted_{metric}").mean
                    cells.append(f"{measured} ({formula:.3f})")
            rows.append(cells)
    columns = ["noise", "Adam, gradient", "Adam, sign", "AdaBelief, gradient", "AdaBelief, sign"]
    return table(columns, rows)
