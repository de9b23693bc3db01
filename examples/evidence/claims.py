"""The first table of the report: what the page and the paper claim, and what was found."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from examples.evidence.direction import LEVELS
from examples.evidence.estimates import Comparison
from examples.evidence.findings import Findings, first
from examples.evidence.images import DEFAULT, FASHION, PUBLISHED
from examples.evidence.tasks import TASKS, Task
from examples.evidence.toys import AVERAGED, CASES, HEAVY
from examples.evidence.wording import chance, gap, verdict

All = Mapping[str, Findings]


class Claim(NamedTuple):
    """A row."""

    claim: str
    found: str
    sure: str


def claims(findings: All) -> list[Claim]:
    """Return all rows."""
    return [
        _toys(findings["toys"]),
        _tuned_toys(findings["toys-tuned"]),
        _direction(findings["direction"]),
        _speed(findings["fashion"]),
        _against(findings, "Generalizes as well as SGD (images)", "SGD", "60,000 2,000"),
        _against(findings, "Generalizes better than Adam (images)", "Adam", "60,000 2,000"),
        _against(findings, "Predicts words better than Adam, most with 3 layers", "Adam", "layer"),
        _against(findings, "Trains transformers better than AdamW", "AdamW", "cosine WSD"),
        _against(findings, "Trains GANs better than Adam (at one learning rate)", "Adam", "GAN"),
        _against(
            findings, "Trains GANs better than RMSProp (at one learning rate)", "RMSProp", "GAN"
        ),
        _against(findings, "The belief makes the difference, not where eps stands", "EAdam", ""),
    ]


def steps(found: Findings, case: str, name: str) -> float:
    """Return after how many steps an optimizer settled, infinity for never."""
    value = next(iter(found.values(case, name, "settled").values()))
    return math.inf if math.isnan(value) else value


def faster(found: Findings, rival: str) -> int:
    """Return on how many of the functions AdaBelief settled before a rival."""
    pairs = [(steps(found, c.name, "AdaBelief"), steps(found, c.name, rival)) for c in CASES]
    return sum(ours < theirs for ours, theirs in pairs)


def _toys(found: Findings) -> Claim:
    counts = {name: faster(found, name) for name in ("Adam", AVERAGED, HEAVY)}
    told = ", ".join(f"{name}: {count}" for name, count in counts.items())
    return Claim(
        "First at the minimum of all the page's functions, at the same learning rate",
        f"Of {len(CASES)} cases AdaBelief was before {told}.",
        "exact: nothing is random; depends on the form of SGD",
    )


def _tuned_toys(found: Findings) -> Claim:
    counts = {name: faster(found, name) for name in ("Adam", AVERAGED, HEAVY)}
    told = ", ".join(f"{name}: {count}" for name, count in counts.items())
    return Claim(
        "The same, if every optimizer has its best of six learning rates (not claimed)",
        f"Before {told}, of {len(CASES)}.",
        "exact, for this grid",
    )


def apart(found: Findings, rule: str, spread: str, levels: Sequence[float]) -> float:
    """Return the largest difference of a mean cosine from the formula's."""
    settings = [f"{spread}, noise {level:g}" for level in levels]
    return max(
        abs(found.interval(s, rule, m).mean - found.interval(s, rule, f"predicted_{m}").mean)
        for s in settings
        for m in ("gradient", "sign")
    )


def _direction(found: Findings) -> Claim:
    enough = [level for level in LEVELS if level >= 0.03]
    ours = max(apart(found, "AdaBelief", spread, enough) for spread in ("equal", "unequal"))
    theirs = max(apart(found, "Adam", spread, LEVELS) for spread in ("equal", "unequal"))
    return Claim(
        "With little noise Adam follows the sign of the gradient, AdaBelief the gradient",
        f"Yes where all elements have the same noise; cosines are within {theirs:.3f} of the "
        f"page's formula for Adam, and {ours:.3f} for AdaBelief from noise 0.03 on (below, its "
        "start is remembered longer than the noise is large).",
        f"{found.study.seeds} seeds, synthetic gradients",
    )


def _speed(found: Findings) -> Claim:
    setting = FASHION.cells[0].setting
    told, sure = [], []
    for ours in (PUBLISHED, DEFAULT):
        for rival in ("Adam", "SGD"):
            compared = None
            if {ours, rival} <= set(found.contenders(setting)):
                compared = found.compare(setting, ours, rival, "running_loss", pick=first)
            told.append(f"{ours} against {rival}: {gap(compared)}, {verdict(compared)}")
            sure.append(chance(compared.p) if compared else "-")
    seeds = len(found.runs(setting, PUBLISHED))
    return Claim(
        "Fast as adaptive methods (training loss in the first epoch of Fashion-MNIST)",
        "; ".join(told) + ".",
        f"{seeds} seeds; " + ", ".join(sure),
    )


def compared_tasks(findings: All, rival: str, words: str) -> list[tuple[Task, Comparison]]:
    """Return what was measured of the tasks whose setting has one of some words, all for none."""
    found = []
    for task in TASKS:
        compared = task.compare(findings, rival)
        wanted = not words or any(word in task.setting for word in words.split())
        if compared is not None and wanted:
            found.append((task, compared))
    return found


def _against(findings: All, claim: str, rival: str, words: str) -> Claim:
    found = compared_tasks(findings, rival, words)
    if not found:
        return Claim(claim, "Not run.", "-")
    told = [f"{task.label} {gap(compared)}" for task, compared in found]
    counts = Counter(verdict(compared) for _, compared in found)
    summary = ", ".join(f"{text} in {count}" for text, count in counts.items())
    seeds = {compared.difference.seeds for _, compared in found}
    seen = f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    chances = ", ".join(chance(compared.p) for _, compared in found)
    return Claim(
        claim, f"{summary[0].upper()}{summary[1:]}: {'; '.join(told)}.", f"{seen} seeds; {chances}"
    )
