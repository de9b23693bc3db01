"""What users ask about AdaBelief's settings, answered with the GPT, one after the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from examples.evidence.gpt import ADAMW, BELIEF, BETAS, DECAY, QUICK, Write, write
from examples.evidence.study import Cell, Contender, Study

_WORK = Write(steps=100, warmup=10, points=1, measured=200)
_LARGE = replace(_WORK, batch=4 * _WORK.batch, steps=_WORK.steps // 4, warmup=3)
_LR = (3e-3,)  # the best one of the study with the GPT, for every contender but SGD

EPS, WARMUP, CLIPPING, BATCH, BETA1, PRECISION = (
    "which eps",
    "warm-up or rectify",
    "clipping",
    "batches four times as large",
    "beta1",
    "precision and ranks",
)


def _belief(name: str, **options: Any) -> Contender:
    return Contender(name, "AdaBelief", _LR, {**BETAS, **DECAY, **options})


def _sharded(name: str, **options: Any) -> Contender:
    more = {**BETAS, **DECAY, "max_grad_norm": 1.0, **options}
    return Contender(name, "ShardedAdaBelief", _LR, more)


_CELLS = (
    *(Cell(EPS, _belief(f"eps {eps:g}", eps=eps), _WORK) for eps in (1e-16, 1e-12, 1e-10, 1e-8)),
    Cell(WARMUP, _belief("neither"), replace(_WORK, warmup=0)),
    Cell(WARMUP, _belief("warm-up of 10 steps"), _WORK),
    Cell(WARMUP, _belief("rectify", rectify=True), replace(_WORK, warmup=0)),
    Cell(CLIPPING, _belief("none"), replace(_WORK, clip=None)),
    Cell(CLIPPING, _belief("norm 1"), _WORK),
    Cell(CLIPPING, _belief("elements 0.0001"), replace(_WORK, clip=None, clip_value=1e-4)),
    Cell(BATCH, replace(ADAMW, lrs=_LR), _LARGE),
    Cell(BATCH, replace(BELIEF, lrs=_LR), _LARGE),
    *(
        Cell(BETA1, _belief(f"beta1 {beta1:g}", betas=(beta1, 0.99)), _WORK)
        for beta1 in (0.0, 0.5, 0.9)
    ),
    Cell(PRECISION, _belief("AdaBelief, float32"), _WORK),
    Cell(PRECISION, _sharded("ShardedAdaBelief, float32"), _WORK),
    Cell(PRECISION, _sharded("8-bit states", state_dtype="uint8"), _WORK),
    Cell(PRECISION, _sharded("bfloat16 model"), replace(_WORK, dtype="bfloat16")),
    Cell(PRECISION, _sharded("4 ranks, float32"), replace(_WORK, ranks=4)),
)
SETTINGS_TEXT = Study(
    name="settings-text",
    question="With a GPT: which eps, warm-up, clipping, batch, beta1, precision?",
    train=write,
    metrics=("train_loss", "test_loss"),
    score="test_loss",
    maximize=False,
    minutes=3,
    cells=_CELLS,
    seeds=3,
    quick=QUICK,
)
