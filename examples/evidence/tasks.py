"""What AdaBelief is compared in: a task is a setting of a study, with its error and its rivals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from examples.evidence import adversarial, gpt, images, lstm
from examples.evidence.estimates import Comparison, Interval
from examples.evidence.findings import Findings


@dataclass(frozen=True)
class Task:
    """One setting.

    Attributes:
        label: In figures and tables.
        study: Its name.
        setting: Of the study.
        ours: The contender with the paper's settings for such a task.
        rivals: Contenders, by the short names SGD, Adam, AdamW, EAdam, ...
        metric: That is recorded.
        unit: Of the error.
        error: Of a recorded value; less is better.
    """

    label: str
    study: str
    setting: str
    ours: str
    rivals: Mapping[str, str]
    metric: str
    unit: str
    error: Callable[[float], float]

    def compare(self, findings: Mapping[str, Findings], rival: str) -> Comparison | None:
        """Compare our error with a rival's, None where one was not measured."""
        found, theirs = findings[self.study], self.rivals.get(rival)
        if theirs is None or theirs not in found.contenders(self.setting):
            return None
        return found.compare(self.setting, self.ours, theirs, self.metric, self.error)

    def advantage(self, findings: Mapping[str, Findings], rival: str) -> Interval | None:
        """Return by how many percent of the rival's error ours is smaller."""
        compared = self.compare(findings, rival)
        if compared is None:
            return None
        theirs = findings[self.study].values(self.setting, self.rivals[rival], self.metric)
        level = sum(map(self.error, theirs.values())) / len(theirs) / -100
        mean, low, high, count = compared.difference
        return Interval(mean / level, high / level, low / level, count)


def _wrong(accuracy: float) -> float:
    return 100 - accuracy


def _named(contenders: tuple[str, ...]) -> dict[str, str]:
    return {name.split(",")[0]: name for name in contenders}


_IMAGES = _named(("SGD", "Adam", "AdamW", "RAdam", "EAdam, eps 1e-8")) | {
    "Adam with the same floor": "Adam, eps 3.2e-3"
}
_WORDS = _named(("SGD", "Adam", "AdamW", "EAdam, eps 1e-12"))
_BYTES = _named(("SGD", "Adam", "AdamW", "EAdam, eps 1e-16"))
_PLAYERS = _named(("Adam", "RMSProp"))

TASKS: tuple[Task, ...] = (
    *(
        Task(
            *(label, study.name, setting, images.PUBLISHED, _IMAGES),
            *("test_accuracy", "points of accuracy", _wrong),
        )
        for label, study, setting in (
            ("Fashion-MNIST", images.FASHION, "60,000 pictures"),
            ("2,000 pictures, batch norm", images.FEW, "2,000 pictures, batch norm network"),
            ("2,000 pictures, plain", images.FEW_PLAIN, "2,000 pictures, plain network"),
        )
    ),
    *(
        Task(
            *(f"LSTM, {layers}", "lstm", layers, "AdaBelief, eps 1e-12", _WORDS),
            *("test_perplexity", "nats per word", math.log),
        )
        for layers in dict.fromkeys(cell.setting for cell in lstm.LSTM.cells)
    ),
    *(
        Task(
            *(f"GPT, {schedule}", "gpt", schedule, gpt.BELIEF.name, _BYTES),
            *("test_loss", "nats per byte", float),
        )
        for schedule in dict.fromkeys(cell.setting for cell in gpt.GPT.cells)
    ),
    *(
        Task(
            *(kind, "gan", kind, "AdaBelief", _PLAYERS),
            *("frechet", "of Frechet distance", float),
        )
        for kind in dict.fromkeys(cell.setting for cell in adversarial.GAN.cells)
    ),
)
