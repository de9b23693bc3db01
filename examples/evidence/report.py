"""Writes docs/evidence.md and its figures from recorded runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Template

from examples.evidence import fields_page, fields_paper
from examples.evidence.claims import claims
from examples.evidence.figure_overview import draw_overview
from examples.evidence.figures_page import animate, draw_direction, draw_toys
from examples.evidence.figures_paper import draw_ends, draw_images, draw_learning_rates
from examples.evidence.findings import Findings
from examples.evidence.wording import table

_TEMPLATE = Path(__file__).parent / "report_template.md"
_ENDS = {  # of a study: its metric, and what that is called
    "lstm": ("test_perplexity", "test perplexity"),
    "gpt": ("test_loss", "held-out loss, nats per byte"),
    "gan": ("frechet", "Frechet distance in our features"),
    "settings-text": ("test_loss", "held-out loss, nats per byte"),
    "settings-images": ("test_accuracy", "test accuracy, %"),
}


def text(findings: Mapping[str, Findings]) -> str:
    """Return the page in Markdown."""
    first = table(["Claim", "What we found", "How sure"], claims(findings), numbers=False)
    fields = {"claims": first, **fields_page.fields(findings), **fields_paper.fields(findings)}
    for name, (_, label) in _ENDS.items():
        picture = f"![{label}](evidence-{name}.png)" if findings[name].settings else ""
        fields[f"figure_{name.replace('-', '_')}"] = picture
    return Template(_TEMPLATE.read_text()).substitute(fields)


def draw(findings: Mapping[str, Findings], folder: Path) -> None:
    """Draw all figures for which something was recorded."""
    same, tuned = findings["toys"], findings["toys-tuned"]
    draw_toys(same, tuned, folder / "evidence-toys.png")
    animate(same, folder / "evidence-toys.gif")
    draw_direction(findings["direction"], folder / "evidence-direction.png")
    draw_overview(findings, folder / "evidence.png")
    if findings["fashion"].settings:
        sets = [findings[name] for name in ("fashion", "few", "few-plain")]
        draw_images(sets, folder / "evidence-images.png")
    for name, (metric, label) in _ENDS.items():
        shown = [(findings[name], setting, metric) for setting in findings[name].settings]
        if shown:
            draw_ends(shown, label, min(2, len(shown)), folder / f"evidence-{name}.png")
    if findings["gpt"].settings:
        draw_learning_rates(findings["gpt"], "cosine", folder / "evidence-learning-rates.png")
