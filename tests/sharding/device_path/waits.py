"""No step makes the host wait for a GPU, and a verdict is read one step later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, OneCycleLR

from belief_dist import ShardedAdaBelief
from benchmarks.gpu.one_of_eight import alone
from tests.harness.device_path import Waits, Watch

STEPS, WARM = 5, 2


def build(ranks: int = 1, dtype: torch.dtype = torch.float32, **options: Any) -> ShardedAdaBelief:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(100).to(dtype)) for _ in range(4)]
    named = [(f"p{index}", param) for index, param in enumerate(params)]
    groups = [{"params": named[:2]}, {"params": named[2:], "clip": options.pop("clip", True)}]
    with alone(ranks) if ranks > 1 else nullcontext():
        return ShardedAdaBelief(groups, **{"lr": 0.01, "bucket_bytes": 800, **options})


def backward(optimizer: ShardedAdaBelief, factor: float | Tensor = 1.0) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    grads = [torch.ones_like(param) * factor for param in params]
    torch.autograd.backward(params, grads)


@pytest.fixture
def watch() -> Iterator[Watch]:
    """Watch what does not depend on values: kernels need not compute."""
    with Watch(computes=False) as watch:
        yield watch


@pytest.fixture
def computing() -> Iterator[Watch]:
    with Watch() as watch:
        yield watch


def train(
    watch: Watch,
    optimizer: ShardedAdaBelief,
    *,
    micro_batches: int = 1,
    bad: tuple[int, ...] = (),
    after: Callable[[], object] = lambda: None,
    step: Callable[[], object] | None = None,
    scale: Callable[[], float | Tensor] = lambda: 1.0,
) -> None:
    """Train; `bad` steps have an infinite gradient."""
    optimizer.refresh_masters()  # notes checksums of this watch
    for number in range(STEPS):
        watch.refuses = number >= WARM
        watch.next_step()
        for micro in range(micro_batches):
            is_last = micro == micro_batches - 1
            with nullcontext() if is_last else optimizer.no_sync():
                backward(optimizer, torch.inf if number in bad else scale())
        (step or optimizer.step)()
        optimizer.zero_grad(set_to_none=number % 2 == 0)
        after()
    watch.refuses = False
    # Every step has read that of the step before, and nobody anything else.
    assert watch.late_reads == STEPS - 1
    assert optimizer.skipped_steps == len(bad)


BOTH = pytest.mark.parametrize("ranks", [1, 8])


@BOTH
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stage": 2},
        {"max_grad_norm": 1.0},
        {"max_grad_value": 0.5},
        {"clip": False, "max_grad_norm": 1.0},
        {"spike_guard": 2.0},
        {"overlap": False},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "master": "remainder8", "state_dtype": torch.uint8},
        {"dtype": torch.float64},
        {"reduce_dtype": torch.bfloat16, "stage": 2},
        {"rectify": True},
        {"amsgrad": True},
    ],
    ids=str,
)
def test_steps(watch: Watch, ranks: int, options: dict[str, Any]) -> None:
    train(watch, build(ranks, **options))


@BOTH
@pytest.mark.parametrize("stage", [1, 2])
def test_accumulation(watch: Watch, ranks: int, stage: Any) -> None:
    train(watch, build(ranks, stage=stage, max_grad_norm=1.0), micro_batches=3)


@BOTH
@pytest.mark.parametrize("stage", [1, 2])
def test_skipped_steps(computing: Watch, ranks: int, stage: Any) -> None:
    train(computing, build(ranks, stage=stage, max_grad_norm=1.0), bad=(0, 3))


SCHEDULERS: dict[str, Callable[[ShardedAdaBelief], Any]] = {
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (step + 1)),
    "exponential": lambda optimizer: ExponentialLR(optimizer, 0.9),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 10),
    "one cycle": lambda optimizer: OneCycleLR(
        optimizer, max_lr=0.1, total_steps=10, cycle_momentum=False
    ),
}


@BOTH
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_of_a_float(watch: Watch, ranks: int, name: str) -> None:
    optimizer = build(ranks)
    train(watch, optimizer, after=SCHEDULERS[name](optimizer).step)


@BOTH
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_of_a_tensor(watch: Watch, ranks: int, name: str) -> None:
    optimizer = build(ranks, lr=torch.tensor(0.01))
    train(watch, optimizer, after=SCHEDULERS[name](optimizer).step)
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor)


@BOTH
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.filterwarnings("ignore:GradScaler is going to stop:FutureWarning")
def test_a_grad_scaler(computing: Watch, ranks: int, stage: Any) -> None:
    optimizer = build(ranks, stage=stage, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    scaler.scale(torch.zeros(()))  # makes its tensors, as the first loss does

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()

    train(computing, optimizer, step=step, bad=(3,), scale=lambda: scaler._get_scale_async())


# - That the watch sees what it is there for


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.item(),
        lambda x: bool(x.sum() > 0),
        lambda x: float(x[0]),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.numpy(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x.copy_(torch.zeros(1)),
        lambda x: torch.unique(x),
    ],
)
def test_a_wait_is_refused(watch: Watch, wait: Callable[[Tensor], object]) -> None:
    values = torch.ones(1)
    wait(values)
    watch.refuses = True
    with pytest.raises(Waits):
        wait(values)


def test_a_verdict_that_is_read_at_once_is_refused(watch: Watch) -> None:
    optimizer = build()
    train(watch, optimizer)
    watch.refuses = True
    watch.next_step()
    backward(optimizer)
    optimizer.step()
    with pytest.raises(Waits, match="0 steps old"):
        optimizer.skipped_steps  # noqa: B018
