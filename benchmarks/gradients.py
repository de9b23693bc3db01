"""Gradients to measure rounding on: synthetic ones of every size, and those of the main job.

Every contender sees the same ones, in float32, whatever its parameters are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from belief_dist import AdaBelief
from belief_dist.operands import BLOCK
from examples.gpt.data import global_batch, load_corpus
from examples.gpt.model import GPT, next_byte_loss

_CONFIG = Path(__file__).parent.parent / "configs" / "gpt.yaml"
_SMALLEST, _LARGEST = -12.0, 3.0  # powers of ten
_CALMEST, _NOISIEST = -2.0, 0.5  # likewise, standard deviation over mean


@dataclass
class Source:
    """Some parameters, and their gradients at every step.

    Attributes:
        title: Where they come from.
        steps: How many there are.
        options: Of the optimizer.
        start: The parameters before the first step, each (n,), float32.
        draw: Returns the gradients of a step, counted from 1, each (n,), float32.
        scale: (elements,), the size of each element's gradients, all parameters in a row.
        noise: (elements,), standard deviation over mean, or None where it is not known.
    """

    title: str
    steps: int
    options: dict[str, Any]
    start: list[Tensor]
    draw: Callable[[int], list[Tensor]]
    scale: Tensor
    noise: Tensor | None = None


def synthetic(
    elements: int, steps: int, decades: float, eps: float, smallest: float = _SMALLEST
) -> Source:
    """Return gradients of all sizes up to 1e3, each element with a mean and noise.

    Parameters start at zero, where float32 is as fine as their way is short: what errs are states.

    Args:
        elements: A multiple of 256.
        steps: That every element is asked to move in one direction.
        decades: Powers of ten that the elements of one block of 256 spread over.
        eps: Of the rule.
        smallest: Power of ten of the smallest gradients.
    """
    generator = torch.Generator().manual_seed(0)
    around = _uniform((elements // BLOCK, 1), smallest, _LARGEST - decades, generator)
    within = _uniform((elements // BLOCK, BLOCK), 0.0, decades, generator)
    scale = 10.0 ** (around + within).flatten()
    noise = 10.0 ** _uniform((elements,), _CALMEST, _NOISIEST, generator)
    mean = scale * torch.randn(elements, generator=generator).sign()

    def draw(step: int) -> list[Tensor]:
        own = torch.Generator().manual_seed(step)
        return [mean + scale * noise * torch.randn(elements, generator=own)]

    spread = f"{decades:g} decades" if decades else "one size"
    return Source(
        title=f"{spread} in a block",
        steps=steps,
        options={"lr": 1e-3, "eps": eps},
        start=[torch.zeros(elements)],
        draw=draw,
        scale=scale,
        noise=noise,
    )


def small_steps(elements: int, steps: int) -> Source:
    """Return gradients for weights of 0.5 to 2 at the end of a schedule, with lr 1e-6.

    Most steps are smaller than half of the last place of such a weight in 24 bits. The weights
    start as bfloat16 numbers, which every form of a master holds, and gradients are not so small
    beside the root of eps that steps are lost in float32, too.

    Args:
        elements: A multiple of 256.
        steps: As for `synthetic`.
    """
    source = synthetic(elements, steps, 0.0, 1e-16, smallest=-5.0)
    generator = torch.Generator().manual_seed(1)
    size = 2.0 ** _uniform((elements,), -1.0, 1.0, generator)
    start = size * torch.randn(elements, generator=generator).sign()
    options = {**source.options, "lr": 1e-6}
    return replace(source, title="small steps", options=options, start=[start.bfloat16().float()])


def recorded(steps: int, most: int) -> Source:
    """Train the main job's model in float32 and return what some parameters get.

    Args:
        steps: Of training.
        most: Elements of a parameter that are recorded, its first ones.
    """
    job = yaml.safe_load(_CONFIG.read_text())
    options = dict(job["optimizer"])
    max_grad_norm = options.pop("max_grad_norm")
    torch.manual_seed(1)
    model = GPT(job["layers"], job["width"], job["heads"], job["context"])
    watched = [
        model.embedding.weight,
        model.blocks[0].attention.query_key_value.weight,
        model.blocks[-1].perceptron[-1].weight,
        model.blocks[-1].perceptron_norm.weight,
        model.blocks[-1].perceptron[0].bias,
        model.head.weight,
    ]
    optimizer = AdaBelief(model.param_groups(), **options)
    text = load_corpus().train
    start = [param.detach().flatten()[:most].clone() for param in watched]
    taken: list[list[Tensor]] = []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = options["lr"] * min(1.0, step / job["warmup"])
        batch = global_batch(text, job["batch"], job["context"], 1, step)
        optimizer.zero_grad()
        next_byte_loss(model(batch[:, :-1]), batch[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        taken.append([p.grad.flatten()[:most].clone() for p in watched if p.grad is not None])
        optimizer.step()
    squares = sum(torch.cat(grads).double().square() for grads in taken)
    return Source(
        title="main job",
        steps=steps,
        options=options,
        start=start,
        draw=lambda step: taken[step - 1],
        scale=(squares / steps).sqrt(),
    )


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)
