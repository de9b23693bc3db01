"""What the report says about images, language, GANs and settings: tables of all contenders."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from examples.evidence.findings import Findings, highest, last
from examples.evidence.tasks import TASKS
from examples.evidence.wording import chance, gap, spread, table, verdict

_TUNED = ("fashion", "few", "few-plain", "lstm", "gpt")


def fields(findings: Mapping[str, Findings]) -> dict[str, str]:
    """Return Markdown by the names that the template has for it."""
    return {
        "fashion": _images(findings["fashion"]),
        "few": _images(findings["few"]),
        "few_plain": _images(findings["few-plain"]),
        "lstm": _scores(findings["lstm"], {"test_perplexity": "test perplexity"}),
        "gpt": _scores(findings["gpt"], {"test_loss": "held-out loss, nats per byte"}),
        "gan": _scores(
            findings["gan"],
            {"frechet": "Frechet distance", "classes": "classes of 10", "entropy": "their entropy"},
        ),
        "settings_text": _scores(findings["settings-text"], {"test_loss": "held-out loss"}),
        "settings_images": _scores(
            findings["settings-images"],
            {"test_accuracy": "test accuracy, %", "like_sgd": "cosine of the update with SGD's"},
        ),
        "comparisons": _comparisons(findings),
        **{f"run_{name.replace('-', '_')}": _caption(found) for name, found in findings.items()},
        **_counts(findings),
    }


def _caption(found: Findings) -> str:
    """Return what belongs below a figure: command, seeds, time, hardware."""
    if not found.store:
        return ""
    minutes = sum(found.store.seconds.values()) / 60
    machines = " and ".join(found.store.machines)
    seeds = {len(found.runs(*key)) for key in found.cells}
    told = f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    plural = "" if told == "1" else "s"
    command = f"`python -m examples.evidence run {found.study.name}`"
    return f"*{command}: {told} seed{plural}, {minutes:.1f} minutes of one core, {machines}.*"


def _images(found: Findings) -> str:
    rows = []
    for setting in found.settings:
        for name in found.contenders(setting):
            test = found.interval(setting, name, "test_accuracy")
            best = found.interval(setting, name, "test_accuracy", highest)
            train = found.values(setting, name, "train_accuracy")
            tested = found.values(setting, name, "test_accuracy")
            beyond = sum(train[seed] - tested[seed] for seed in train) / len(train)
            loss = found.interval(setting, name, "running_loss")
            cells = [spread(test), spread(best), f"{beyond:.2f}", f"{loss.mean:.4f}"]
            lr = f"{found.lr(setting, name):g}"
            rows.append([f"{setting}: {name}", lr, str(test.seeds), *cells])
    columns = ["", "lr", "seeds", "test accuracy, last", "best epoch", "gap", "training loss"]
    return _or_nothing(table(columns, rows), rows)


def _scores(found: Findings, metrics: Mapping[str, str]) -> str:
    rows = []
    for setting in found.settings:
        for name in found.contenders(setting):
            cells = [spread(found.interval(setting, name, metric, last)) for metric in metrics]
            seeds = str(len(found.runs(setting, name)))
            rows.append([f"{setting}: {name}", f"{found.lr(setting, name):g}", seeds, *cells])
    return _or_nothing(table(["", "lr", "seeds", *metrics.values()], rows), rows)


def _or_nothing(text: str, rows: list[list[str]]) -> str:
    return text if rows else "*Not run.*"


def _comparisons(findings: Mapping[str, Findings]) -> str:
    rows = []
    for task in TASKS:
        for rival in task.rivals:
            compared = task.compare(findings, rival)
            if compared is None:
                continue
            effect = "-" if math.isnan(compared.effect) else f"{-compared.effect:+.1f}"
            cells = [gap(compared), task.unit, chance(compared.p), effect, verdict(compared)]
            rows.append([f"{task.label}: against {rival}", *cells])
    columns = ["AdaBelief", "advantage", "of", "", "effect", "it is"]
    return _or_nothing(table(columns, rows), rows)


def _counts(findings: Mapping[str, Findings]) -> dict[str, str]:
    rows, absent = [], []
    for name, found in findings.items():
        minutes = sum(found.store.seconds.values()) / 60
        done = f"{found.study.count - found.missing} of {found.study.count}"
        command = f"`run {name}`"
        grid = max(len(cell.contender.lrs) for cell in found.study.cells)
        tried = str(grid) if grid > 1 else "fixed"
        rows.append([command, done, str(found.study.seeds), tried, f"{minutes:.1f}"])
        absent += [f"- {line}" for line in _missing(found)]
    machines = dict.fromkeys(each for found in findings.values() for each in found.store.machines)
    columns = ["`python -m examples.evidence`", "runs", "seeds", "learning rates", "minutes"]
    return {
        "studies": table(columns, rows),
        "missing": "\n".join(absent) or "- Of the planned runs, none is missing.",
        "edges": "\n".join(each for name in _TUNED for each in _edges(findings[name])) or "- None.",
        "machines": "; ".join(machines),
    }


def _edges(found: Findings) -> Iterator[str]:
    """Give who would perhaps have liked a learning rate beyond the tried ones."""
    for setting in found.settings:
        names = []
        for name in found.contenders(setting):
            lrs = found.cells[setting, name].contender.lrs
            if len(lrs) > 2 and found.lr(setting, name) in (lrs[0], lrs[-1]):
                names.append(name)
        if names:
            yield f"- {setting}: {'; '.join(names)}."


def _missing(found: Findings) -> Iterator[str]:
    by_setting: dict[str, dict[str, int]] = {}
    for setting, name in found.cells:
        lacking = found.study.seeds - len(found.runs(setting, name))
        if lacking:
            by_setting.setdefault(setting, {})[name] = lacking
    for setting, names in by_setting.items():
        told = ", ".join(f"{name} ({count})" for name, count in names.items())
        yield f"`{found.study.name}`, {setting}, seeds lacking: {told}."
