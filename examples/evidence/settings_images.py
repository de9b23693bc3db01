"""Which eps and which form of weight decay for images, and when AdaBelief moves as SGD does."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim import Optimizer

from examples.evidence.images import Classify, fit
from examples.evidence.study import Cell, Contender, Points, Study

EPS, DECAY = "which eps", "weight decay"
_WORK = Classify("plain", 12, count=2000, every=12)


def classify(work: Classify, contender: Contender, lr: float, seed: int) -> Points:
    """Train a network; also tell how alike the last update is to that of SGD with momentum."""
    points, _, optimizer = fit(work, contender, lr, seed)
    points[-1]["like_sgd"] = likeness(optimizer)
    return points[-1:]


def likeness(optimizer: Optimizer) -> float:
    """Return the cosine between AdaBelief's last update and m, along which SGD would go."""
    updates, momenta = [], []
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state[param]
            correction = 1 - group["betas"][1] ** state["step"]
            root = state["exp_avg_sq"].sqrt() / math.sqrt(correction)
            updates.append((state["exp_avg"] / (root + group["eps"])).flatten())
            momenta.append(state["exp_avg"].flatten())
    return torch.cosine_similarity(torch.cat(updates), torch.cat(momenta), dim=0).item()


def _belief(name: str, lrs: tuple[float, ...], **options: Any) -> Contender:
    return Contender(name, "AdaBelief", lrs, options)


_SMALL, _MIDDLE, _LARGE = (3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2)
_GRIDS = {1e-16: _SMALL, 1e-12: _SMALL, 1e-10: _MIDDLE, 1e-8: _LARGE, 1e-6: (3e-2, 1e-1, 3e-1)}
SETTINGS_IMAGES = Study(
    name="settings-images",
    question="With 2,000 pictures: which eps, and which form of weight decay?",
    train=classify,
    metrics=("test_loss", "test_accuracy", "train_accuracy", "like_sgd"),
    score="test_accuracy",
    maximize=True,
    minutes=2,
    cells=(
        *(Cell(EPS, _belief(f"eps {eps:g}", lrs, eps=eps), _WORK) for eps, lrs in _GRIDS.items()),
        Cell(DECAY, _belief("none", _SMALL), _WORK),
        Cell(
            DECAY,
            _belief("coupled 0.0005", _SMALL, weight_decay=5e-4, weight_decouple=False),
            _WORK,
        ),
        Cell(DECAY, _belief("decoupled 0.01", _SMALL, weight_decay=0.01), _WORK),
        Cell(DECAY, _belief("decoupled 0.1", _SMALL, weight_decay=0.1), _WORK),
    ),
    seeds=3,
    tuning={"validate": True},
    quick={"epochs": 1, "count": 256, "source": "digits"},
)
