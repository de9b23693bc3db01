"""Language models of words: LSTMs of one, two and three layers, as in the paper, scaled down."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.evidence import words
from examples.evidence.optimizers import build
from examples.evidence.study import Cell, Contender, Points, Study

BATCH = 16
UNROLLED = 30  # words that gradients go back
VOCABULARY = 1000
CLIP = 0.25  # as in the paper's scripts

State = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Predict:
    """What to train.

    Attributes:
        layers: Of the LSTM.
        steps: The learning rate falls to a tenth after three quarters.
        width: Of all layers and of the words' vectors.
        points: How often to measure.
        measured: Steps' worth of text to measure with.
        validate: Measure with the part of the text that is for tuning.
        source: Of the text.
    """

    layers: int
    steps: int = 320
    width: int = 64
    points: int = 2
    measured: int = 30
    validate: bool = False
    source: words.Source = "bible"


class Model(nn.Module):
    """Predicts the next word; the state goes from one piece of text to the next."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        between = 0.1 if layers > 1 else 0.0
        self.lstm = nn.LSTM(width, width, layers, dropout=between)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Return logits for (length, batch) tokens, and the state after them."""
        x, state = self.lstm(self.dropout(self.embedding(tokens)), state)
        return self.head(self.dropout(x)), state


def pieces(tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Cut a text into BATCH columns, and these into inputs and targets of (UNROLLED, BATCH)."""
    columns = tokens[: len(tokens) // BATCH * BATCH].view(BATCH, -1).t()
    starts = range(0, len(columns) - UNROLLED, UNROLLED)
    return [(columns[at : at + UNROLLED], columns[at + 1 : at + 1 + UNROLLED]) for at in starts]


def predict(work: Predict, contender: Contender, lr: float, seed: int) -> Points:
    """Train on a stretch of the text that the seed chooses, and measure perplexity on another."""
    text = words.load(work.source, VOCABULARY)
    train = pieces(text.train)
    held_out = pieces(text.validation if work.validate else text.test)[: work.measured]
    torch.manual_seed(seed)
    model = Model(work.layers, work.width)
    optimizer = build(contender, model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [work.steps * 3 // 4])
    first = int(torch.randint(len(train), ()))
    state: State | None = None
    points: Points = []
    total = 0.0
    for step, (x, y) in enumerate(islice(cycle(train), first, first + work.steps), start=1):
        optimizer.zero_grad()
        logits, carried = model(x, state)
        state = (carried[0].detach(), carried[1].detach())
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        total += loss.item()
        every = max(1, work.steps // work.points)
        if step % every == 0 or step == work.steps:
            points.append(
                {
                    "step": step,
                    "train_perplexity": perplexity(total / (step % every or every)),
                    "test_perplexity": perplexity(measure(model, held_out)),
                }
            )
            total = 0.0
    return points


def perplexity(loss: float) -> float:
    """Return e^loss, infinity where that is too large to matter."""
    return math.exp(loss) if loss < 100 else math.inf


@torch.no_grad()
def measure(model: Model, held_out: list[tuple[Tensor, Tensor]]) -> float:
    """Return the mean loss per word."""
    model.eval()
    state: State | None = None
    total = 0.0
    for x, y in held_out:
        logits, state = model(x, state)
        total += F.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
    model.train()
    return total / len(held_out)


_DECAY = {"weight_decay": 1.2e-6}
_GRID = (3e-3, 1e-2, 3e-2)
CONTENDERS = (
    Contender("SGD", "SGD", (3.0, 10.0, 30.0), _DECAY),
    Contender("Adam", "Adam", _GRID, _DECAY),
    Contender("AdamW", "AdamW", _GRID, {"weight_decay": 1e-2}),
    Contender("EAdam, eps 1e-12", "EAdam", _GRID, {"eps": 1e-12, **_DECAY}),
    Contender(
        *("AdaBelief, eps 1e-12", "AdaBelief", _GRID),
        {"eps": 1e-12, "weight_decouple": False, **_DECAY},
    ),
)
LSTM = Study(
    name="lstm",
    question="Does AdaBelief predict words better, the more so with more layers?",
    train=predict,
    metrics=("train_perplexity", "test_perplexity"),
    score="test_perplexity",
    maximize=False,
    minutes=5,
    cells=tuple(
        Cell(f"{layers} layer{'s' * (layers > 1)}", contender, Predict(layers))
        for layers in (1, 2, 3)
        for contender in CONTENDERS
    ),
    seeds=3,
    tuning={"steps": 220, "points": 1, "validate": True},
    quick={"steps": 3, "width": 16, "points": 1, "measured": 1, "source": "topics"},
)
