"""What users really do to an optimizer: it counts, or is an error on all ranks."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.overrides import TorchFunctionMode

from belief_dist import ShardedAdaBelief
from belief_dist.options import DEFAULTS
from belief_dist.sharding.rank_checks import _first_difference
from tests.harness.models import HYPER, SHAPES, make_grad, make_params
from tests.harness.ranks import run_ranks
from tests.harness.reference import Reference, backward, compare

Stage = Literal[1, 2]
Params = list[nn.Parameter]
OPTIONS = {**DEFAULTS, **HYPER}


def own_grads(step: int) -> list[Tensor | None]:
    return [make_grad(s, step, dist.get_rank(), i) for i, s in enumerate(SHAPES)]


def all_grads(step: int) -> list[list[Tensor | None]]:
    ranks = range(dist.get_world_size())
    return [[make_grad(s, step, rank, i) for i, s in enumerate(SHAPES)] for rank in ranks]


def snapshot(params: Params) -> list[Tensor]:
    return [param.detach().clone() for param in params]


# - Gradients


def steps_on_one_gradient(overlap: bool, stage: Stage) -> None:
    """A second step without a new gradient takes the same gradient again."""
    params = make_params()
    optimizer = ShardedAdaBelief(params, bucket_bytes=600, overlap=overlap, stage=stage, **HYPER)
    reference = Reference(make_params(), [OPTIONS] * len(params))
    for step in range(2):
        backward(params, own_grads(step))
        for _ in range(3):
            optimizer.step()
            reference.step(all_grads(step), None, dist.get_world_size())
            assert optimizer.grad_norm.item() == reference.norm.item()
            compare(optimizer, reference, f"overlap {overlap}, step {step}")
        optimizer.zero_grad()


def scale(params: Params) -> None:
    for param in params:
        assert param.grad is not None
        param.grad.mul_(0.5)


def mask(params: Params) -> None:
    assert params[7].grad is not None
    params[7].grad[:3] = 0


def add_noise(params: Params) -> None:
    torch._foreach_add_([param.grad for param in params if param.grad is not None], 0.1)


CHANGES: dict[str, Callable[[Params], Any]] = {
    "clip_grad_norm_": lambda params: nn.utils.clip_grad_norm_(params, 0.1),
    "clip_grad_value_": lambda params: nn.utils.clip_grad_value_(params, 0.01),
    "mul_": scale,
    "mask": mask,
    "noise": add_noise,
}


def gradients_changed_after_reduction(name: str) -> None:
    """All ranks are told, nothing is updated, and zero_grad leads back."""
    params = make_params()
    optimizer = ShardedAdaBelief(params, bucket_bytes=600, **HYPER)
    before = snapshot(params)
    backward(params, own_grads(0))
    CHANGES[name](params)
    with pytest.raises(
        RuntimeError, match=r"rank 0: .* changed after it was summed.*max_grad_norm"
    ):
        optimizer.step()
    assert all(map(torch.equal, before, params)), name
    optimizer.zero_grad()
    reference = Reference(make_params(), [OPTIONS] * len(params))
    backward(params, own_grads(1))
    optimizer.step()
    reference.step(all_grads(1), None, dist.get_world_size())
    compare(optimizer, reference, name)


def gradients_changed_on_one_rank() -> None:
    params = make_params()
    optimizer = ShardedAdaBelief(params, bucket_bytes=600, **HYPER)
    backward(params, own_grads(0))
    last = dist.get_world_size() - 1
    if dist.get_rank() == last:
        mask(params)
    with pytest.raises(RuntimeError, match=f"rank {last}: the gradient of parameter number 7 "):
        optimizer.step()


def gradients_changed_before_reduction() -> None:
    """Without overlap nothing is reduced before step: what users make of gradients counts."""
    params = make_params()
    optimizer = ShardedAdaBelief(params, bucket_bytes=600, overlap=False, **HYPER)
    reference = Reference(make_params(), [OPTIONS] * len(params))
    backward(params, own_grads(0))
    scale(params)
    optimizer.step()
    halves = [[None if g is None else g * 0.5 for g in grads] for grads in all_grads(0)]
    reference.step(halves, None, dist.get_world_size())
    compare(optimizer, reference, "overlap=False")


def told_late() -> None:
    """Where the host must not wait, the next step tells, although zero_grad came in between."""
    params = make_params()
    optimizer = ShardedAdaBelief(params, bucket_bytes=600, **HYPER)
    before = snapshot(params)
    optimizer._engine.consensus.defers = True  # as on a CUDA device
    backward(params, own_grads(0))
    scale(params)
    optimizer.step()
    assert all(map(torch.equal, before, params))
    optimizer.zero_grad()
    backward(params, own_grads(1))
    with pytest.raises(RuntimeError, match=r"rank 0: .* was changed after it was summed"):
        optimizer.step()


def zeroed_in_place(idle_rank: bool) -> None:
    """Gradients that the model zeroes in place are zeros, also of parameters that go unused."""
    params = make_params()
    optimizer = ShardedAdaBelief(params, bucket_bytes=600, **HYPER)
    reference = Reference(make_params(), [OPTIONS] * len(params))
    backward(params, own_grads(0))
    optimizer.step()
    reference.step(all_grads(0), None, dist.get_world_size())
    for param in params:
        assert param.grad is not None
        param.grad.zero_()
    grads = all_grads(1)
    for rank, each in enumerate(grads):
        for index in range(len(each)):
            if index % 2 or (idle_rank and rank == 1):
                each[index] = torch.zeros(SHAPES[index])
    if not (idle_rank and dist.get_rank() == 1):
        own = grads[dist.get_rank()]
        backward(params, [None if index % 2 else grad for index, grad in enumerate(own)])
    optimizer.step()
    reference.step(grads, None, dist.get_world_size())
    compare(optimizer, reference, f"idle rank: {idle_rank}")


# - Parameters


def assign(model: nn.Linear) -> None:
    for param in model.parameters():
        param.data = param.data.clone()


def flatten(model: nn.Linear) -> None:
    vector_to_parameters(parameters_to_vector(model.parameters()), model.parameters())


STORAGES: dict[str, Callable[[nn.Linear], Any]] = {
    "p.data = x": assign,
    "vector_to_parameters": flatten,
    "double().float()": lambda model: model.double().float(),
    "_apply": lambda model: model._apply(torch.clone),
    "swapped and swapped back": lambda model: [assign(model), assign(model)],
    "channels_last of a view": lambda model: model.to(memory_format=torch.contiguous_format),
}


def train_with_other_storage(change: Callable[[nn.Linear], Any] | None, stage: Stage) -> Params:
    torch.manual_seed(0)
    model = nn.Linear(5, 7)
    params = list(model.parameters())
    optimizer = ShardedAdaBelief(params, bucket_bytes=64, stage=stage, lr=0.1, eps=1e-2)
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(dist.get_rank()))
    for step in range(4):
        if step == 2 and change is not None:
            change(model)
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        if step == 3 and change is not None:
            assign(model)  # between backward and step
        optimizer.step()
    optimizer.wait_pending()
    return params


def storage_that_was_replaced(stage: Stage) -> None:
    """A parameter that lies elsewhere now goes on training, with its values."""
    right = train_with_other_storage(None, stage)
    for name, change in STORAGES.items():
        ours = train_with_other_storage(change, stage)
        assert all(map(torch.equal, ours, right)), (name, stage)


EDITS: dict[str, Callable[[Tensor], Any]] = {
    "clamp_": lambda data: data.clamp_(-0.01, 0.01),
    "normal_": lambda data: data.normal_(0, 0.01, generator=torch.Generator().manual_seed(1)),
    "mul_": lambda data: data.mul_(0.5),
    "copy_": lambda data: data.copy_(torch.full_like(data, 0.25)),
    "one element": lambda data: data.view(-1)[3:4].fill_(0.125),
    "rows in another order": lambda data: data.copy_(data.flip(0)),
    "NaN": lambda data: data.view(-1)[:1].fill_(float("nan")),
}
FORMS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "float16": (torch.float16, {}),
    "float32, offload": (torch.float32, {"offload": "cpu"}),
    "bfloat16, offload": (torch.bfloat16, {"offload": "cpu"}),
    "bfloat16, remainder8, offload": (torch.bfloat16, {"master": "remainder8", "offload": "cpu"}),
}


def train_with_edits(form: str, stage: Stage, through_data: bool) -> list[list[Tensor]]:
    """Return the weights after every step, each of which follows another edit."""
    torch.manual_seed(0)
    dtype, more = FORMS[form]
    model = nn.Linear(6, 6).to(dtype)
    optimizer = ShardedAdaBelief(
        model.parameters(), stage=stage, lr=1e-3, bucket_bytes=64, eps=1e-2, **more
    )
    seen = []
    for edit in (torch.clone, *EDITS.values()):
        optimizer.wait_pending()
        with torch.no_grad():
            for param in model.parameters():
                edit(param.data if through_data else param)
        optimizer.zero_grad()
        model(torch.ones(2, 6, dtype=dtype)).float().mean().backward()
        optimizer.step()
        seen.append(snapshot(list(model.parameters())))
    return seen


def edits_through_data(form: str, stage: Stage) -> None:
    """Changes in place through `.data` reach the masters, wherever these are."""
    edited, plain = (train_with_edits(form, stage, through) for through in (True, False))
    for name, *both in zip(("none", *EDITS), edited, plain, strict=True):
        for one, other in zip(*both, strict=True):
            # Masters of elements that were not changed keep what their parameter rounds off, here
            # alone; the smallest difference of two 16-bit numbers is several times a step.
            torch.testing.assert_close(
                one.float(), other.float(), atol=1e-3, rtol=1e-2, equal_nan=True, msg=name
            )


def edits_that_are_told_late() -> None:
    """Where the host must not wait, the step is skipped, and the next one says so."""
    model = nn.Linear(6, 6).bfloat16()
    optimizer = ShardedAdaBelief(model.parameters(), lr=1e-3)
    optimizer._engine.consensus.defers = optimizer._engine.masters._data_edits._defers = True

    def train() -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 6, dtype=torch.bfloat16)).float().mean().backward()
        optimizer.step()

    train()
    optimizer.wait_pending()
    with torch.no_grad():
        model.weight.clamp_(-0.01, 0.01)  # its version tells
    train()
    optimizer.wait_pending()
    model.weight.data.clamp_(-0.01, 0.01)
    optimizer.refresh_masters()
    train()
    optimizer.wait_pending()
    model.weight.data.clamp_(-0.001, 0.001)
    before = model.weight.detach().clone()
    train()
    with pytest.raises(RuntimeError, match=r"through `.data`.*refresh_masters"):
        train()
    assert torch.equal(model.weight, before)
    optimizer.refresh_masters()
    train()
    optimizer.wait_pending()
    assert not torch.equal(model.weight, before)


def another_dtype_is_refused() -> None:
    model = nn.Linear(3, 3)
    optimizer = ShardedAdaBelief(model.parameters())
    model.double()
    loss = model(torch.ones(1, 3, dtype=torch.float64)).sum()
    sentence = r"is torch.float64 .* and was torch.float32 .* convert"
    with pytest.raises(ValueError, match=sentence):
        loss.backward()
    with pytest.raises(ValueError, match=sentence):
        optimizer.step()


def two_optimizers_over_one_model(stage: Stage) -> None:
    """The newer one trains, whether the older one still exists or not; the older one says so."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        model = nn.Linear(3, 3)
        older = ShardedAdaBelief(model.parameters(), stage=stage)
        newer = ShardedAdaBelief(model.parameters(), stage=stage)
        for _ in range(3):
            newer.zero_grad()
            model(torch.ones(1, 3)).sum().backward()
            newer.step()
        with pytest.raises(RuntimeError, match="another ShardedAdaBelief was built over"):
            older.step()
        assert newer.state[model.weight]["step"] == 3
    finally:
        if was_enabled:
            gc.enable()


def wrapped(outer: Callable[[nn.Module], nn.Module], first: bool) -> None:
    """DistributedDataParallel around the model is refused before the first gradient."""
    model = nn.Linear(3, 3)
    around = outer(model) if first else None
    optimizer = ShardedAdaBelief(model.parameters())
    around = around or outer(model)
    with pytest.raises(RuntimeError, match="is around a model that ShardedAdaBelief trains"):
        around(torch.ones(1, 3))
    model(torch.ones(1, 3)).sum().backward()  # bare, it trains
    optimizer.step()
    other = outer(nn.Linear(3, 3))  # of no concern
    other(torch.ones(1, 3))


# - Options and modes


def learning_rates_as_tensors() -> None:
    """They are compared as the numbers that they are, not as they print."""
    rank = dist.get_rank()
    dtype = torch.float64 if rank else torch.float32
    same = ShardedAdaBelief(nn.Linear(3, 3).parameters(), lr=torch.tensor(0.5, dtype=dtype))
    assert same.param_groups[0]["lr"] == 0.5
    nearly = torch.tensor(1e-3 * (1 + 4e-5 * rank))
    with pytest.raises(ValueError, match="disagree about the options of param group"):
        ShardedAdaBelief(nn.Linear(3, 3).parameters(), lr=nearly)


def amsgrad_switched_on_later() -> None:
    params = make_params()
    optimizer = ShardedAdaBelief(params, bucket_bytes=600, **HYPER)
    backward(params, own_grads(0))
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad of param group 0 was set to True after"):
        optimizer.step()


class Log(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def steps_inside_a_block_of_the_user() -> None:
    """The end of `with torch.device(...)` ends that block, and reads are right afterwards."""
    for block in (Log(), torch.device("meta")):
        model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
        optimizer = ShardedAdaBelief(model.parameters(), bucket_bytes=1 << 14, lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 64)).square().mean().backward()
            with block:
                optimizer.step()
            assert torch.ones(1).device.type == "cpu"
            seen = snapshot(list(model.parameters()))
            optimizer.wait_pending()
            assert all(map(torch.equal, seen, model.parameters()))


DDP = nn.parallel.DistributedDataParallel


@pytest.mark.parametrize("world_size", [3, 4])
def test_user_habits(world_size: int, tmp_path: Path) -> None:
    run_ranks(
        world_size,
        tmp_path,
        *(partial(steps_on_one_gradient, o, s) for o in (True, False) for s in (1, 2)),
        *(partial(gradients_changed_after_reduction, name) for name in CHANGES),
        gradients_changed_on_one_rank,
        gradients_changed_before_reduction,
        told_late,
        *(partial(zeroed_in_place, idle_rank) for idle_rank in (False, True)),
        *(partial(storage_that_was_replaced, stage) for stage in (1, 2)),
        *(partial(edits_through_data, form, stage) for form in FORMS for stage in (1, 2)),
        edits_that_are_told_late,
        another_dtype_is_refused,
        *(partial(two_optimizers_over_one_model, stage) for stage in (1, 2)),
        *(partial(wrapped, DDP, first) for first in (True, False)),
        learning_rates_as_tensors,
        amsgrad_switched_on_later,
        steps_inside_a_block_of_the_user,
    )


def test_without_a_majority_no_rank_is_blamed() -> None:
    assert _first_difference([[1, 2], [1, 3], [1, 2]]) == (1, [1])
    assert _first_difference([[1, 2], [1, 3]]) == (1, [])
    assert _first_difference([[5], [6], [5], [6]]) == (0, [])


def test_one_rank_takes_gradients_as_the_user_left_them() -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = ShardedAdaBelief([param], max_grad_norm=1.0, lr=0.1)
    (param * torch.arange(4.0)).sum().backward()
    assert param.grad is not None
    param.grad.mul_(2.0)
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(2 * 14**0.5, rel=1e-12)
