"""What going over from AdamW to AdaBelief costs, with estimated states and with none."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch
from torch import nn

from belief_dist import AdaBelief
from belief_dist.checkpoint.formats.torch import (
    from_state_dict,
    to_state_dict,
    warm_start_from_adam,
)
from examples.gpt.data import global_batch, load_corpus
from examples.gpt.model import GPT, next_byte_loss

_CONTEXT, _BATCH, _CLIP = 128, 16, 1.0
_OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
AFTER = (5, 20)  # steps over which losses are averaged, besides all


def _train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, seed: int
) -> list[float]:
    corpus = load_corpus().train
    losses = []
    for step in steps:
        batch = global_batch(corpus, _BATCH, _CONTEXT, seed, step)
        optimizer.zero_grad()
        loss = next_byte_loss(model(batch[:, :-1]), batch[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizer.step()
        losses.append(loss.item())
    return losses


def _one(before: int, after: int, seed: int) -> dict[str, list[float]]:
    """Train with AdamW, then on in every way from there; return the losses after that."""
    torch.manual_seed(seed)
    model = GPT(2, 128, 4, _CONTEXT)
    adam = torch.optim.AdamW(model.parameters(), **_OPTIONS)
    _train(model, adam, range(before), seed)
    names = [name for name, _ in model.named_parameters()]
    saved = copy.deepcopy(adam.state_dict())
    found = {}
    for way in ("AdamW goes on", "AdaBelief, warm", "AdaBelief, states of zero"):
        other = copy.deepcopy(model)
        optimizer: torch.optim.Optimizer
        if way.startswith("AdamW"):
            optimizer = torch.optim.AdamW(other.parameters(), **_OPTIONS)
            optimizer.load_state_dict(saved)
        else:
            optimizer = AdaBelief(other.named_parameters(), **_OPTIONS)
            if way.endswith("warm"):
                whole = from_state_dict(saved, other.state_dict(), names=names)
                optimizer.load_state_dict(to_state_dict(warm_start_from_adam(whole)))
        found[way] = _train(other, optimizer, range(before, before + after), seed)
    return found


def run_warmstart(before: int, after: int, seeds: Sequence[int]) -> dict[str, dict[int, float]]:
    """Return, for every way to go on, its mean loss over so many steps, less that of AdamW.

    Args:
        before: Steps of AdamW.
        after: Steps of each way, from the same weights on the same batches.
        seeds: Of weights and data.
    """
    runs = [_one(before, after, seed) for seed in seeds]
    spans = sorted({min(span, after) for span in (*AFTER, after)})
    found: dict[str, dict[int, float]] = {}
    for way in runs[0]:
        found[way] = {
            span: mean(mean(run[way][:span]) - mean(run["AdamW goes on"][:span]) for run in runs)
            for span in spans
        }
    return found
