"""The picture of updates: few lines, each named at its end, and nothing cut off or covered."""

from __future__ import annotations

import copy
import json
from itertools import combinations
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from benchmarks.update import ADAMW, OFFICIAL, Timing, Updates
from benchmarks.updates_picture import FLOAT32, SHOWN, updates_figure
from benchmarks.updates_report import updates_content
from tests.harness.paths import ROOT


@pytest.fixture
def recorded() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / "docs" / "update.json").read_text())
    return content


def with_more(content: dict[str, Any]) -> dict[str, Any]:
    """Return content with a contender that is not shown, and with fewer threads."""
    more = copy.deepcopy(content)
    for result in content["update"]:
        row = {"name": "plain pass: float32", "ms": 1.0}
        more["update"].append({**result, "threads": 1, "rows": [*result["rows"], row]})
    return more


def test_few_lines_and_each_is_named_at_its_end(recorded: dict[str, Any]) -> None:
    figure = updates_figure(with_more(recorded))
    (panel,) = figure.axes
    assert panel.get_legend() is None and len(panel.lines) == len(SHOWN) <= 5
    assert [text.get_color() for text in panel.texts] == [line.get_color() for line in panel.lines]
    assert len({to_hex(line.get_color()) for line in panel.lines}) == len(SHOWN)
    assert len({line.get_marker() for line in panel.lines}) == len(SHOWN)
    assert "log" in panel.get_xlabel() and "log" in panel.get_ylabel()
    assert "2 threads" in panel.get_xlabel()


def test_no_word_is_cut_off_or_covers_another(recorded: dict[str, Any]) -> None:
    figure = updates_figure(recorded)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (panel,) = figure.axes
    texts = [*panel.texts, panel.xaxis.label, panel.yaxis.label, panel._left_title]
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]


def test_the_title_tells_the_ratios() -> None:
    times = {FLOAT32: 0.02, ADAMW: 0.01, OFFICIAL: 0.1}
    timings = [Timing(name, 1 << 20, 1, None, None, [time]) for name, time in times.items()]
    (panel,) = updates_figure(updates_content(Updates(timings, []))).axes
    assert "2.00 times as long as AdamW" in panel.get_title("left")
    assert f"{OFFICIAL} takes 5.0 times as long" in panel.get_title("left")


def test_without_the_peers_the_picture_has_the_lines_that_are_left() -> None:
    timings = [Timing(FLOAT32, 1 << 20, 1, None, None, [0.02])]
    (panel,) = updates_figure(updates_content(Updates(timings, []))).axes
    assert len(panel.lines) == 1
