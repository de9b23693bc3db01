"""Pictures of the pages show their records: every value, nothing cut off, no word over another."""

from __future__ import annotations

import json
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from benchmarks.any_world_size import OURS, Run
from benchmarks.any_world_size_picture import any_world_size_figure
from benchmarks.concepts import bytes_figure, draw_concepts, leaves, step_figure, sum_figure
from benchmarks.pictures import apart
from benchmarks.plot import step_results
from benchmarks.resume import compare_runs, resume_figure
from benchmarks.step_picture import SHOWN, steps_figure
from benchmarks.step_trace import ranges_of
from benchmarks.step_trace_picture import LANES, trace_figure
from tests.harness.paths import ROOT

DOCS = ROOT / "docs"
STEPS = (DOCS / "step-host.json", DOCS / "step-link.json")


def any_world_size() -> tuple[dict[str, dict[int, Run]], Figure]:
    content = json.loads((DOCS / "any-world-size.json").read_text())["any world size"]
    found = {
        name: {int(ranks): Run(**run) for ranks, run in runs.items()}
        for name, runs in content.items()
    }
    return found, any_world_size_figure(found)


def resumed() -> tuple[dict[str, list[dict[str, Any]]], Figure]:
    runs = json.loads((DOCS / "resume.json").read_text())
    return runs, resume_figure(runs)


def traced() -> tuple[dict[str, list[tuple[str, float, float]]], Figure]:
    content = json.loads((DOCS / "step-trace.json").read_text())["step trace"]
    found = {stage: [(r[0], r[1], r[2]) for r in ranges] for stage, ranges in content.items()}
    return found, trace_figure(found)


FIGURES = {
    "any-world-size": lambda: any_world_size()[1],
    "resume": lambda: resumed()[1],
    "performance": lambda: steps_figure(step_results(STEPS)),
    "step-trace": lambda: traced()[1],
    "concepts-bytes": bytes_figure,
    "concepts-step": step_figure,
    "concepts-sum": sum_figure,
}


@pytest.mark.parametrize("name", FIGURES)
def test_no_word_is_cut_off_or_covers_another(name: str) -> None:
    figure = FIGURES[name]()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = []
    for panel in figure.axes:
        texts = [*panel.texts, panel._left_title]
        if panel.axison:
            low, high = sorted(panel.get_ylim())
            ticks = panel.get_yticklabels()
            texts += [panel.xaxis.label, panel.yaxis.label]
            texts += [tick for tick in ticks if low <= tick.get_position()[1] <= high]
        for text in texts:
            if text.get_text():
                # Of an annotation its words alone, without the line that leads to them.
                box = Text.get_window_extent(text, canvas.get_renderer())
                boxes.append((text.get_text(), box))
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0, text
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
    covered = [(a, b) for (a, one), (b, two) in combinations(boxes, 2) if one.overlaps(two)]
    assert not covered


def test_runs_at_several_numbers_of_ranks_are_those_of_the_record() -> None:
    found, figure = any_world_size()
    losses, differences = figure.axes
    drawn = [list(line.get_ydata()) for line in losses.lines if len(line.get_ydata()) > 2]
    assert drawn == [run.losses for run in found[OURS].values()]
    *peers, ours = differences.lines
    names = [name for name in found if name != OURS]
    for line, name in zip(peers, names, strict=True):
        several = [run.largest for ranks, run in found[name].items() if ranks > 1]
        assert list(line.get_ydata()) == [max(values) for values in zip(*several, strict=True)]
    assert len(set(ours.get_ydata())) == 1  # the line of 0
    assert not any(any(run.largest) for run in found[OURS].values())


def test_a_resumed_run_is_that_of_the_record_and_of_the_page() -> None:
    runs, figure = resumed()
    above, below = figure.axes
    drawn = [list(line.get_ydata()) for line in above.lines if len(line.get_ydata()) > 2]
    assert drawn == [[row["loss"] for row in runs[name]] for name in ("uninterrupted", "resumed")]
    page = (DOCS / "checkpoints.md").read_text()
    for part in compare_runs(runs):
        gap = f"{part.largest_difference:.1e}".replace("e-0", "e-").replace("0.0e+00", "0")
        row = f"| {part.first} to {part.last} | {part.ranks} | {part.equal} | {gap} |"
        assert row in page
        # In units of 1e-7, to the rounding of the product.
        gaps = below.lines[0].get_ydata()[part.first - 1 : part.last]
        assert max(gaps) == pytest.approx(part.largest_difference * 1e7)


def test_steps_are_those_of_the_record_and_of_the_page() -> None:
    results = step_results(STEPS)
    page = (DOCS / "performance.md").read_text()
    for panel, result in zip(steps_figure(results).axes, results, strict=True):
        medians = {row["name"]: row["median_ms"] for row in result["rows"]}
        shown = [medians[name] for name in SHOWN if name in medians]
        assert [bar.get_width() for bar in panel.patches] == shown
        for row in result["rows"]:
            start = f"{row['median_ms']} | {row['ratios']['DDP + AdamW']:.2f} |"
            assert f"| {row['name']} | {start}" in page.replace("**", "")


def test_a_traced_step_is_that_of_the_record() -> None:
    found, figure = traced()
    for panel, (stage, ranges) in zip(figure.axes, found.items(), strict=True):
        assert panel._left_title.get_text() == stage  # type: ignore[attr-defined]
        lanes = {kind: lane for lane, each in enumerate(LANES.values()) for kind in each}
        expected = [(lanes[name], *at) for name, *at in ranges if name in lanes]
        bars = [bar.get_bbox() for bar in panel.patches if bar.get_height() < 0.9]
        drawn = [(round(bar.y0 + 0.36), bar.x0, bar.x1) for bar in bars]
        for one, other in zip(sorted(drawn), sorted(expected), strict=True):
            assert one == pytest.approx(other, abs=1e-9)  # an end is a start and a length
        assert {"forward", "backward", "step", "reduce", "consensus", "update", "gather"} <= {
            name for name, _, _ in ranges
        }


def test_phases_are_read_from_a_chrome_trace() -> None:
    """Of the shortest of several iterations, with nothing of torch's own and nothing too short."""
    events = [("forward", 0, 100), ("aten::mm", 10, 20)]
    for begin in (1500, 3000, 4000):  # the second lasts 1 ms
        events += [("forward", begin, 200), ("belief_dist::step", begin + 600, 300)]
        update, gather = (f"belief_dist::{name}" for name in ("update", "gather"))
        events += [(update, begin + 650, 100), (gather, begin + 760, 9)]
    categories = {"aten::mm": "cpu_op"}
    trace = {
        "traceEvents": [
            {"name": name, "ts": ts, "dur": dur, "cat": categories.get(name, "user_annotation")}
            for name, ts, dur in events
        ]
    }
    assert ranges_of(trace) == [("forward", 0.0, 0.2), ("step", 0.6, 0.9), ("update", 0.65, 0.75)]


def test_drawings_are_those_of_the_page_and_the_same_each_time(tmp_path: Path) -> None:
    names = [path.name for path in draw_concepts(tmp_path)]
    page = (DOCS / "concepts.md").read_text()
    first = {name: (tmp_path / name).read_bytes() for name in names}
    draw_concepts(tmp_path)
    for name in names:
        assert f"]({name})" in page and (DOCS / name).exists()
        assert (tmp_path / name).read_bytes() == first[name]


def test_labels_keep_apart_and_sums_their_order() -> None:
    assert leaves((((0, 1), 2), 3)) == [0, 1, 2, 3] and leaves(((0, 2), (1, 3))) == [0, 2, 1, 3]
    placed = sorted(apart([0.5, 0.52, 0.1], 0.1))
    assert all(b - a >= 0.1 - 1e-12 for a, b in pairwise(placed)) and placed[0] == 0.1
