"""torch's own database of optimizer inputs, over both classes, on one rank.

torch ships the inputs (`torch.testing._internal.common_optimizers`), and not the tests that use
them; these follow those of its repository, `test/test_optim.py`. What does not apply:

* complex parameters, sparse gradients that must stay sparse, mixed devices: refused, or made dense;
* `capturable` and CUDA graphs: see `test_capturable.py`;
* `differentiable`, `foreach` and `fused` at once: no such options for a sharded update;
* deepcopy of a ShardedAdaBelief: refused, see `test_drop_in.py`.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import (
    get_error_inputs_for_all_optims,
    optim_error_inputs_func_adam,
    optim_inputs_func_adamw,
)

from belief_dist import AdaBelief, ShardedAdaBelief

KINDS = [AdaBelief, ShardedAdaBelief]
INPUTS = [
    *optim_inputs_func_adamw(device="cpu"),
    *optim_inputs_func_adamw(device="mps"),  # which has a learning rate as a tensor
]
# Said of combinations of options that only torch's classes have.
ONLY_TORCHS = ("foreach", "fused", "differentiable", "Tensors", "1-element", "capturable")
ERRORS = [
    each
    for each in optim_error_inputs_func_adam(device="cpu", dtype=torch.float32)
    if not any(word in each.optimizer_error_input.desc for word in ONLY_TORCHS)
]

every_kind = pytest.mark.parametrize("kind", KINDS)
every_input = pytest.mark.parametrize("case", INPUTS, ids=lambda case: case.desc)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def problem(seed: int = 0) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.randn(2, 3, generator=generator))
    bias = nn.Parameter(torch.randn(2, generator=generator))
    inputs = torch.randn(5, 3, generator=generator)
    return [weight, bias], lambda: (inputs @ weight.t() + bias).square().sum()


def run(
    optimizer: Any, loss_of: Callable[[], Tensor], steps: int, sign: float = 1.0
) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of()
        (sign * loss).backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


@every_kind
@every_input
def test_goes_the_right_way(kind: Any, case: Any) -> None:
    params, loss_of = problem()
    losses = run(kind(params, **case.kwargs), loss_of, 20)
    rises = bool(case.kwargs.get("maximize"))
    assert (losses[-1] > losses[0]) == rises


SCHEDULES: list[Callable[[Any], list[Any]]] = [
    lambda o: [schedules.StepLR(o, gamma=0.9, step_size=3)],
    lambda o: [schedules.LinearLR(o, start_factor=0.4, total_iters=4)],
    lambda o: [schedules.ExponentialLR(o, gamma=0.9), schedules.StepLR(o, step_size=3)],
    lambda o: [schedules.OneCycleLR(o, max_lr=0.01, total_steps=30)],
    lambda o: [schedules.CosineAnnealingWarmRestarts(o, T_0=4)],
    lambda o: [schedules.ReduceLROnPlateau(o)],
]


@every_kind
@every_input
@pytest.mark.parametrize("schedule", range(len(SCHEDULES)))
def test_schedules(kind: Any, case: Any, schedule: int) -> None:
    """Step by step the numbers that AdamW gets, and a tensor stays the same tensor."""
    params, loss_of = problem()
    optimizer = kind(params, **copy.deepcopy(case.kwargs))
    twin = torch.optim.AdamW(problem()[0], **copy.deepcopy(case.kwargs))
    before = optimizer.param_groups[0]["lr"]
    ours, theirs = SCHEDULES[schedule](optimizer), SCHEDULES[schedule](twin)
    for _ in range(8):
        loss = run(optimizer, loss_of, 1)[0]
        twin.step()
        for pair in zip(ours, theirs, strict=True):
            for each in pair:
                each.step(loss) if schedule == 5 else each.step()
        mine, others = (float(o.param_groups[0]["lr"]) for o in (optimizer, twin))
        assert mine == pytest.approx(others, rel=1e-6)
    if isinstance(before, Tensor):
        assert optimizer.param_groups[0]["lr"] is before


@every_kind
@every_input
def test_a_tensor_as_learning_rate_is_its_number(kind: Any, case: Any) -> None:
    ways = []
    for lr in (0.01, torch.tensor(0.01, dtype=torch.float64)):
        params, loss_of = problem()
        run(kind(params, **{**case.kwargs, "lr": lr}), loss_of, 5)
        ways.append(params)
    assert all(map(torch.equal, *ways))


@every_kind
@every_input
def test_groups_override_defaults(kind: Any, case: Any) -> None:
    params, loss_of = problem()
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.0, "weight_decay": 0.0}]
    optimizer = kind(groups, **case.kwargs)
    before = [param.detach().clone() for param in params]
    run(optimizer, loss_of, 2)
    assert not torch.equal(before[0], params[0])
    assert torch.equal(before[1], params[1])


@every_kind
@every_input
def test_nothing_happens_without_gradients(kind: Any, case: Any) -> None:
    params, _ = problem()
    optimizer = kind(params, **case.kwargs)
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert all(map(torch.equal, before, params))


@every_kind
@every_input
def test_nothing_but_decay_happens_at_zero_gradients(kind: Any, case: Any) -> None:
    params, _ = problem()
    optimizer = kind(params, **case.kwargs)
    group = optimizer.param_groups[0]
    kept = 1.0 - float(group["lr"]) * group["weight_decay"]
    before = [param.detach() * kept for param in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for param, right in zip(params, before, strict=True):
        torch.testing.assert_close(param.detach(), right)


@every_kind
@every_input
def test_state_dict_goes_on_where_it_was_saved(kind: Any, case: Any) -> None:
    """Through a file that torch.load opens with weights_only, with the same bits afterwards."""
    params, loss_of = problem()
    optimizer = kind(params, **case.kwargs)
    run(optimizer, loss_of, 4)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others, other_loss = problem()
    twin = kind(others, **case.kwargs)
    with torch.no_grad():
        for mine, theirs in zip(params, others, strict=True):
            theirs.copy_(mine)
    twin.load_state_dict(torch.load(file, weights_only=True))
    run(optimizer, loss_of, 3)
    run(twin, other_loss, 3)
    assert all(map(torch.equal, params, others))
    assert all(optimizer.state[param] for param in params)


@every_kind
def test_hooks_run_in_their_order(kind: Any) -> None:
    """Of steps and of state_dicts, global ones included, before and after, first and last."""
    params, loss_of = problem()
    optimizer = kind(params)
    said: list[str] = []

    def note(what: str) -> Callable[..., None]:
        return lambda *args, **kwargs: said.append(what)

    everywhere = register_optimizer_step_pre_hook(note("all before"))
    optimizer.register_step_pre_hook(note("before"))
    optimizer.register_step_post_hook(note("after"))
    optimizer.register_state_dict_pre_hook(note("saving"))
    optimizer.register_state_dict_pre_hook(note("saving first"), prepend=True)
    optimizer.register_state_dict_post_hook(note("saved"))
    optimizer.register_load_state_dict_pre_hook(note("loading"))
    optimizer.register_load_state_dict_post_hook(note("loaded"))
    try:
        run(optimizer, loss_of, 1)
        optimizer.load_state_dict(optimizer.state_dict())
    finally:
        everywhere.remove()
    run(optimizer, loss_of, 1)
    assert said[:3] == ["all before", "before", "after"]
    assert said[3:8] == ["saving first", "saving", "saved", "loading", "loaded"]
    assert said[8:] == ["before", "after"]


@every_kind
def test_closures(kind: Any) -> None:
    params, loss_of = problem()
    optimizer = kind(params, lr=0.01)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(5)]
    assert losses == sorted(losses, reverse=True)


@every_kind
@pytest.mark.parametrize("case", ERRORS, ids=lambda case: case.optimizer_error_input.desc)
def test_what_torch_refuses_is_refused(kind: Any, case: Any) -> None:
    given = case.optimizer_error_input
    params = given.params if given.params is not None else problem()[0]
    with pytest.raises((TypeError, ValueError)) as caught:
        optimizer = kind(params, **given.kwargs)
        if case.error_on.name == "STEP_ERROR":
            optimizer.step()
    assert len(str(caught.value)) > 20


def test_the_database_has_what_is_tested_here() -> None:
    """A new torch may have other inputs; at least these are among them."""
    assert {"default", "amsgrad", "maximize", "Tensor lr"} <= {case.desc for case in INPUTS}
    assert len(ERRORS) > len(get_error_inputs_for_all_optims("cpu", torch.float32)) > 3
