"""Nobody sees last step's weights, however and whenever a parameter is read."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from belief_dist import ShardedAdaBelief
from belief_dist.sharding.read_guard import ReadGuard, TornParameters
from tests.harness.late import Slow
from tests.harness.models import HYPER
from tests.harness.ranks import run_ranks


class Late:
    """A parameter whose new value arrives when it is waited for."""

    def __init__(self, param: nn.Parameter, log: list[str], name: str) -> None:
        self.param, self.log, self.name = param, log, name

    def settle(self) -> None:
        self.param.data.fill_(2.0)
        self.log.append(self.name)


READS: dict[str, Callable[[nn.Parameter], object]] = {
    "linear": lambda p: nn.functional.linear(torch.ones(1, 3), p),
    "keyword": lambda p: nn.functional.linear(torch.ones(1, 3), weight=p),
    "list": lambda p: torch.cat([torch.ones(1, 3), p]),
    "arithmetic": lambda p: 1.0 + p,
    "detach": lambda p: p.detach(),
    "data": lambda p: p.data,
    "numpy": lambda p: p.detach().numpy(),
    "item": lambda p: p[0, 0].item(),
    "repr": lambda p: repr(p),
    "deepcopy": lambda p: copy.deepcopy(p),
    "save": lambda p: torch.save(p, io.BytesIO()),
    "tolist": lambda p: p.tolist(),
    "write": lambda p: p.data.add_(0.0),
}


@pytest.mark.parametrize("name", READS)
def test_a_read_settles_first(name: str) -> None:
    param = nn.Parameter(torch.ones(2, 3))
    log: list[str] = []
    guard = ReadGuard()
    guard.expect([param], Late(param, log, "p").settle)
    guard.arm()
    READS[name](param)
    assert log == ["p"]
    guard.wait_all()
    assert torch.overrides._get_current_function_mode_stack() == []


def test_looking_at_metadata_does_not_wait() -> None:
    param = nn.Parameter(torch.ones(2, 3))
    log: list[str] = []
    guard = ReadGuard()
    guard.expect([param], Late(param, log, "p").settle)
    guard.arm()
    assert (param.shape, param.dtype, param.grad) == ((2, 3), torch.float32, None)
    assert param.requires_grad and param.numel() == 6 and param.device.type == "cpu"
    param.grad = None
    assert log == []
    guard.wait_all()
    assert log == ["p"]


def test_forward_waits_layer_by_layer_and_then_the_mode_leaves() -> None:
    layers = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    log: list[str] = []
    guard = ReadGuard()
    for i, layer in enumerate(layers):
        guard.expect(list(layer.parameters()), Late(layer.weight, log, str(i)).settle)
    guard.arm()
    seen: list[list[str]] = []
    for layer in layers:
        layer.register_forward_hook(lambda *_: seen.append(list(log)))
    layers(torch.ones(1, 3))
    assert seen == [["0"], ["0", "1"], ["0", "1", "2"]]
    layers(torch.ones(1, 3))
    assert torch.overrides._get_current_function_mode_stack() == []


def test_a_scripted_model_settles_everything_first() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    scripted = torch.jit.trace(model, torch.ones(1, 3))
    log: list[str] = []
    guard = ReadGuard()
    for i, layer in enumerate(model):
        guard.expect(list(layer.parameters()), Late(layer.weight, log, str(i)).settle)
    guard.arm()
    scripted(torch.ones(1, 3))
    assert log == ["0", "1"]
    guard.wait_all()


def test_works_below_a_mode_that_the_user_has_entered() -> None:
    param = nn.Parameter(torch.ones(2, 3))
    log: list[str] = []
    guard = ReadGuard()
    guard.expect([param], Late(param, log, "p").settle)
    guard.arm()
    with torch.device("cpu"):  # a torch function mode too
        param + 1.0
        assert log == ["p"]
        guard.wait_all()
    guard.expect([param], Late(param, log, "again").settle)
    guard.arm()
    param + 1.0
    assert log == ["p", "again"]
    guard.wait_all()
    assert torch.overrides._get_current_function_mode_stack() == []


class Unseen(nn.Module):
    """Hands its weight to something that no torch function mode sees, as an extension does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            return x * self.weight


def test_what_did_not_arrive_raises_at_every_read(caplog: pytest.LogCaptureFixture) -> None:
    """And not only at the first: a rescue save would hold a mixture of two steps."""
    param, other = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    log: list[str] = []
    guard = ReadGuard()

    def fails() -> None:
        log.append("waits")
        raise RuntimeError("rank 1 has died.")

    guard.expect([param], fails)
    guard.expect([other], Late(other, log, "other").settle)
    guard.arm()
    for read in (lambda: param + 1, guard.wait_all, lambda: param.detach(), guard.wait_all):
        with pytest.raises(
            TornParameters, match=r"rank 1 has died.*half.*load a checkpoint"
        ) as one:
            read()
        assert str(one.value).count("half") == 2
    assert (other + 1)[0, 0] == 3.0  # that one is whole
    assert log == ["waits", "other"]  # a second wait would take as long as the first
    guard.abandon()  # with the optimizer
    assert "rank 1 has died" in caplog.text
    with torch.no_grad():
        param.copy_(torch.zeros(2, 3))
    assert not (param + 0).any()


def test_a_layer_without_children_has_its_weights_before_its_forward() -> None:
    layers = nn.Sequential(Unseen(), Unseen())
    log: list[str] = []
    guard = ReadGuard()
    for i, layer in enumerate(layers):
        guard.expect([layer.weight], Late(layer.weight, log, str(i)).settle)
    guard.arm()
    layers[1](torch.ones(3))
    assert log == ["1"]
    layers(torch.ones(3))
    assert log == ["1", "0"]
    guard.wait_all()


def test_guards_of_two_optimizers_leave_whichever_ends_first() -> None:
    guards, params = [ReadGuard(), ReadGuard()], [nn.Parameter(torch.ones(3)) for _ in range(2)]
    log: list[str] = []
    for name, guard, param in zip("ab", guards, params, strict=True):
        guard.expect([param], Late(param, log, name).settle)
        guard.arm()
    guards[0].wait_all()  # below the other: it cannot leave yet
    assert len(torch.overrides._get_current_function_mode_stack()) == 2
    guards[1].wait_all()
    assert torch.overrides._get_current_function_mode_stack() == []
    assert log == ["a", "b"]


def late_gathers(read: str) -> None:
    """Gathers that have not even begun when the parameters are read change nothing."""
    torch.manual_seed(0)
    results = []
    for slow in (False, True):
        model = nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 3))
        torch.manual_seed(1)
        for param in model.parameters():
            nn.init.normal_(param)
        optimizer = ShardedAdaBelief(model.parameters(), bucket_bytes=1000, **HYPER)
        if slow:
            Slow(optimizer)
        outputs = []
        for step in range(3):
            data = torch.full((2, 40), float(step + dist.get_rank()))
            out = model(data)
            out.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if read == "state_dict":
                outputs.append([value.clone() for value in model.state_dict().values()])
            elif read == "deepcopy":
                outputs.append([value.clone() for value in copy.deepcopy(model).parameters()])
            elif read == "reversed":
                # The same order on all ranks, but not that of the gathers.
                outputs.append([param.clone() for param in reversed(list(model.parameters()))])
            elif read == "eval":
                outputs.append([model.eval()(data).detach()])
                model.train()
        results.append(outputs)
    for fast, late in zip(*results, strict=True):
        for a, b in zip(fast, late, strict=True):
            assert torch.equal(a, b), read


def test_late_gathers_are_never_seen_half_done(tmp_path: Path) -> None:
    reads = ("state_dict", "deepcopy", "reversed", "eval", "next forward")
    run_ranks(3, tmp_path, *(partial(late_gathers, read) for read in reads))
