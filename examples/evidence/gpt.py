"""The GPT of the main job, scaled down, by the usual recipe: warm-up, a schedule, clipping."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from examples.evidence.optimizers import build
from examples.evidence.ranks import on_ranks
from examples.evidence.study import Cell, Contender, Points, Study
from examples.gpt.data import global_batch, load_corpus, windows
from examples.gpt.model import GPT as Network
from examples.gpt.model import next_byte_loss

HEADS = 4


@dataclass(frozen=True)
class Write:
    """What to train.

    Attributes:
        steps: Of the optimizer.
        schedule: The learning rate falls by a cosine to a tenth, or is constant until the last
            fifth, where it falls linearly to zero (warm-up, stable, decay).
        warmup: Steps in which it rises.
        batch: Sequences of a step.
        context: Bytes in each of them.
        layers: Of the model.
        width: Of the model.
        clip: Largest norm of the gradient.
        clip_value: Largest magnitude of its elements.
        dtype: Of the parameters.
        ranks: Processes; needs ShardedAdaBelief.
        points: How often to measure.
        measured: Windows of held-out text to measure with.
        validate: Measure with the first half of the held-out text instead of the second.
    """

    steps: int = 160
    schedule: Literal["cosine", "WSD"] = "cosine"
    warmup: int = 20
    batch: int = 16
    context: int = 48
    layers: int = 2
    width: int = 64
    clip: float | None = 1.0
    clip_value: float | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    ranks: int = 1
    points: int = 2
    measured: int = 300
    validate: bool = False


def factor(work: Write, step: int) -> float:
    """Return the share of the full learning rate at a step, counted from 0."""
    if step < work.warmup:
        return (step + 1) / work.warmup
    if work.schedule == "cosine":
        share = (step - work.warmup) / max(1, work.steps - work.warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * share))
    return min(1.0, (work.steps - step) / (work.steps / 5))


def write(work: Write, contender: Contender, lr: float, seed: int) -> Points:
    """Train, and measure nats per byte on text that was not seen."""
    if contender.rule == "ShardedAdaBelief":
        return on_ranks(work.ranks, _write, work, contender, lr, seed)
    return _write(work, contender, lr, seed)


def _write(work: Write, contender: Contender, lr: float, seed: int) -> Points:
    corpus = load_corpus()
    text = windows(corpus.held_out, work.context)
    half = len(text) // 2
    held_out = (text[:half] if work.validate else text[half:])[: work.measured]
    torch.manual_seed(seed)
    model = Network(work.layers, work.width, HEADS, work.context)
    model.to(getattr(torch, work.dtype))
    optimizer = build(contender, model.param_groups(), lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(work, step))
    rank = dist.get_rank() if dist.is_initialized() else 0
    share = work.batch // work.ranks
    points: Points = []
    for step in range(1, work.steps + 1):
        batch = global_batch(corpus.train, work.batch, work.context, seed, step)
        mine = batch[rank * share : (rank + 1) * share]
        optimizer.zero_grad()
        loss = next_byte_loss(model(mine[:, :-1]), mine[:, 1:])
        loss.backward()
        if work.clip is not None and contender.rule != "ShardedAdaBelief":
            nn.utils.clip_grad_norm_(model.parameters(), work.clip)
        if work.clip_value is not None:
            nn.utils.clip_grad_value_(model.parameters(), work.clip_value)
        optimizer.step()
        schedule.step()
        if step % max(1, work.steps // work.points) == 0 or step == work.steps:
            measured = {"train_loss": loss.item(), "test_loss": held_out_loss(model, held_out)}
            points.append({"step": step, **measured})
    return points


@torch.no_grad()
def held_out_loss(model: nn.Module, held_out: Tensor) -> float:
    """Return the mean loss per byte, in nats."""
    losses = [
        next_byte_loss(model(part[:, :-1]), part[:, 1:], "sum").item()
        for part in held_out.split(100)
    ]
    return sum(losses) / held_out[:, 1:].numel()


BETAS = {"betas": (0.9, 0.99)}
DECAY = {"weight_decay": 0.1}
GRID = (1e-3, 3e-3, 1e-2)
ADAMW = Contender("AdamW", "AdamW", GRID, {**BETAS, **DECAY})
BELIEF = Contender("AdaBelief, eps 1e-16", "AdaBelief", GRID, {**BETAS, **DECAY})
EADAM = Contender(
    *("EAdam, eps 1e-16", "EAdam", GRID), {"eps": 1e-16, "decoupled": True, **BETAS, **DECAY}
)
_COSINE = (
    Contender("SGD", "SGD", (0.03, 0.1, 0.3), {"momentum": 0.9}),
    Contender("Adam", "Adam", GRID, BETAS),
    ADAMW,
    EADAM,
    Contender("AdaBelief, eps 1e-8", "AdaBelief", GRID, {"eps": 1e-8, **BETAS, **DECAY}),
    BELIEF,
)
QUICK = {"steps": 2, "batch": 4, "context": 8, "layers": 1, "width": 32, "points": 1, "measured": 4}
GPT = Study(
    name="gpt",
    question="And transformers, beside a tuned AdamW, with two schedules?",
    train=write,
    metrics=("train_loss", "test_loss"),
    score="test_loss",
    maximize=False,
    minutes=4,
    cells=(
        *(Cell("cosine", each, Write()) for each in _COSINE),
        *(Cell("WSD", each, Write(schedule="WSD")) for each in (ADAMW, EADAM, BELIEF)),
    ),
    seeds=3,
    tuning={"validate": True, "points": 1},
    quick=QUICK,
)
