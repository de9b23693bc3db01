"""Image classification: all of Fashion-MNIST, and so few of its pictures that networks overfit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from examples.evidence import pictures
from examples.evidence.optimizers import MATCHED, build
from examples.evidence.pictures import Pictures
from examples.evidence.study import Cell, Contender, Point, Points, Study

BATCH = 128
CLASSES = 10


@dataclass(frozen=True)
class Classify:
    """What to train.

    Attributes:
        network: "plain", or "batch norm".
        epochs: Passes over the pictures; the learning rate falls to a tenth after three quarters.
        count: Pictures to train on, drawn by the seed; None for all.
        every: Epochs between points.
        validate: Test with pictures held back from training instead of the test set.
        source: Of the pictures.
    """

    network: Literal["plain", "batch norm"]
    epochs: int
    count: int | None = None
    every: int = 1
    validate: bool = False
    source: pictures.Source = "fashion"


def network(kind: str) -> nn.Module:
    """Return three convolutions and a linear layer: 11,000 parameters."""
    layers: list[nn.Module] = []
    for inputs, outputs, size in ((1, 8, 5), (8, 16, 3), (16, 32, 3)):
        normed = kind == "batch norm"
        layers.append(nn.Conv2d(inputs, outputs, size, 2, size // 2, bias=not normed))
        layers += [nn.BatchNorm2d(outputs)] if normed else []
        layers.append(nn.ReLU())
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 4 * 4, CLASSES))
    return net.to(memory_format=torch.channels_last)


def data(work: Classify, seed: int) -> tuple[Pictures, Pictures]:
    """Return what to train on and what to test with."""
    train, test = pictures.load(work.source)
    if work.validate:
        held_back = slice(-pictures.VALIDATION, None)
        train, test = train.take(slice(0, -pictures.VALIDATION)), train.take(held_back)
    if work.count is not None:
        # Not of the pictures that tuning is tested with, in any run.
        known = (
            len(train.y) if work.validate else max(work.count, len(train.y) - pictures.VALIDATION)
        )
        order = torch.randperm(known, generator=torch.Generator().manual_seed(seed))
        train = train.take(order[: work.count])
    return train, test


def classify(work: Classify, contender: Contender, lr: float, seed: int) -> Points:
    """Train a network, and measure it on what it was trained on and on what it has not seen."""
    return fit(work, contender, lr, seed)[0]


def fit(
    work: Classify, contender: Contender, lr: float, seed: int
) -> tuple[Points, nn.Module, Optimizer]:
    """Train; also return the network and its optimizer."""
    train, test = data(work, seed)
    torch.manual_seed(seed)
    net = network(work.network)
    optimizer = build(contender, net.parameters(), lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [max(1, work.epochs * 3 // 4)])
    points: Points = []
    for epoch in range(1, work.epochs + 1):
        net.train()
        running, steps = torch.zeros(()), 0
        for x, y in batches(train):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            running += loss.detach()
            steps += 1
        schedule.step()
        if epoch % work.every == 0 or epoch == work.epochs:
            point: Point = {"step": epoch, "running_loss": running.item() / steps}
            for name, (x, y) in (("train", train.take(slice(0, 10_000))), ("test", test)):
                measured = measure(net, x, y)
                point |= {f"{name}_loss": measured[0], f"{name}_accuracy": measured[1]}
            points.append(point)
    return points, net, optimizer


def batches(data: Pictures) -> Iterator[tuple[Tensor, Tensor]]:
    """Give all full batches of an epoch in random order, half of the pictures mirrored."""
    order = torch.randperm(len(data.y))
    for chosen in order.split(BATCH):
        if len(chosen) < BATCH and len(data.y) >= BATCH:
            return
        x = data.x[chosen]
        mirrored = torch.rand(len(chosen), 1, 1, 1) < 0.5
        x = torch.where(mirrored, x.flip(3), x)
        yield x.contiguous(memory_format=torch.channels_last), data.y[chosen]


@torch.no_grad()
def measure(net: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return the mean loss, and the percentage of correct classes."""
    net.eval()
    logits = torch.cat([net(part) for part in x.split(1000)])
    correct = (logits.argmax(1) == y).double().mean().item()
    return F.cross_entropy(logits, y).item(), 100 * correct


_COUPLED = {"weight_decay": 5e-4}
_SGD = {"momentum": 0.9, **_COUPLED}
_LARGE = (1e-3, 3e-3, 1e-2, 3e-2)  # for denominators that eps keeps from becoming small
_SMALL = (3e-4, 1e-3, 3e-3, 1e-2)
PUBLISHED = "AdaBelief, eps 1e-8"
DEFAULT = "AdaBelief, eps 1e-16"
CONTENDERS = (
    Contender("SGD", "SGD", (0.01, 0.03, 0.1, 0.3), _SGD),
    Contender("Adam", "Adam", _SMALL, _COUPLED),
    Contender("AdamW", "AdamW", _SMALL, {"weight_decay": 1e-2}),
    Contender("RAdam", "RAdam", _SMALL, _COUPLED),
    Contender("Adam, eps 3.2e-3", "Adam", _LARGE, {"eps": MATCHED, **_COUPLED}),
    Contender("EAdam, eps 1e-8", "EAdam", _LARGE, {"eps": 1e-8, **_COUPLED}),
    Contender(PUBLISHED, "AdaBelief", _LARGE, {"eps": 1e-8, "weight_decouple": False, **_COUPLED}),
    Contender(DEFAULT, "AdaBelief", _SMALL, {"weight_decay": 1e-2}),
)
_METRICS = ("running_loss", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
_QUICK = {"epochs": 2, "count": 256, "source": "digits"}

FASHION = Study(
    name="fashion",
    question="Does AdaBelief classify as well as SGD, and learn as fast as Adam?",
    train=classify,
    metrics=_METRICS,
    score="test_accuracy",
    maximize=True,
    minutes=15,
    cells=tuple(Cell("60,000 pictures", each, Classify("batch norm", 5)) for each in CONTENDERS),
    seeds=5,
    tuning={"epochs": 2, "validate": True},
    quick=_QUICK,
)


def _few(name: str, kind: Literal["plain", "batch norm"]) -> Study:
    work = Classify(kind, 12, count=2000, every=6)
    setting = f"2,000 pictures, {kind} network"
    return Study(
        name=name,
        question=f"And where a {kind} network overfits, with 2,000 pictures?",
        train=classify,
        metrics=_METRICS,
        score="test_accuracy",
        maximize=True,
        minutes=2,
        cells=tuple(Cell(setting, each, work) for each in CONTENDERS),
        seeds=5,
        tuning={"validate": True},
        quick=_QUICK,
    )


FEW, FEW_PLAIN = _few("few", "batch norm"), _few("few-plain", "plain")
