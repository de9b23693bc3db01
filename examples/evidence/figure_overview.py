"""The figure of docs/why.md: by how much AdaBelief's error is smaller than others', by task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from examples.evidence.findings import Findings
from examples.evidence.style import colour, picture
from examples.evidence.tasks import TASKS

_RIVALS = ("SGD", "Adam", "AdamW", "EAdam")
_SHOWN = 25.0  # percent; what lies outside is marked by its number


def draw_overview(findings: Mapping[str, Findings], path: Path) -> None:
    """Draw one panel for each rival, and a line for each task."""
    tasks = [task for task in TASKS if any(task.advantage(findings, r) for r in _RIVALS)]
    with picture(path, len(_RIVALS), len(_RIVALS), (2.2, 0.25 * len(tasks) + 1.2)) as panels:
        for panel, rival in zip(panels, _RIVALS, strict=True):
            panel.axvline(0, color="#888888", linewidth=1)
            for line, task in enumerate(tasks):
                found = task.advantage(findings, rival)
                if found is None:
                    continue
                if abs(found.mean) > _SHOWN:
                    side = 1 if found.mean > 0 else -1
                    text = {"ha": "right" if side > 0 else "left", "va": "center", "fontsize": 7}
                    panel.text(side * _SHOWN, line, f"{found.mean:+.0f} %", **text)
                    continue
                panel.plot(found.mean, line, "o", color=colour(rival), markersize=4)
                panel.plot([found.low, found.high], [line, line], color=colour(rival))
            panel.set_xlim(-_SHOWN, _SHOWN)
            panel.set_ylim(len(tasks) - 0.5, -0.5)
            panel.set_yticks(range(len(tasks)), [task.label for task in tasks])
            panel.set_title(f"against {rival}", color=colour(rival))
            panel.grid(axis="y", alpha=0.2)
        for panel in panels[1:]:
            panel.set_yticklabels([])
        panels[0].figure.supxlabel(
            "error of AdaBelief, % smaller (right) or larger (left), with 95 % intervals; "
            "all but GANs tuned alike",
            fontsize=8,
        )
