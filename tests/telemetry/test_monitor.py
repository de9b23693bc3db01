"""StepMonitor: its numbers are the definitions', and training does not notice it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from belief_dist import AdaBelief, ShardedAdaBelief
from belief_dist.state_formats import decode, join_master
from belief_dist.telemetry import StepMonitor, quantiles, read_records
from belief_dist.telemetry.quantiles import stride_of
from tests.harness.models import HYPER, SHAPES, make_grad, make_params, rank_order_sum
from tests.harness.ranks import run_ranks
from tests.harness.reference import backward, collect

pytestmark = pytest.mark.filterwarnings(
    "ignore:eps=.* dominates", "ignore:offload='cpu' updates on 1 thread"
)
TINY = {**HYPER, "eps": 1e-12}


def expected(
    ms: list[Tensor],
    ss: list[Tensor],
    ps: list[Tensor],
    gs: list[Tensor],
    step: int,
    options: dict[str, Any],
) -> dict[str, float]:
    """Return the statistics of whole tensors, by their definitions, in float64."""
    m, s, p, g = (torch.cat([t.double().flatten() for t in each]) for each in (ms, ss, ps, gs))
    beta1, beta2 = options["betas"]
    eps, lr = options["eps"], options["lr"]
    m_hat, s_hat = m / (1 - beta1**step), s / (1 - beta2**step)
    direction = m_hat / (s_hat.sqrt() + eps)
    floor = eps * (1 - beta2**step) / (1 - beta2)

    def rms(x: Tensor) -> float:
        return float(x.square().mean().sqrt())

    return {
        "l2_norm/param": float(p.norm()),
        "l2_norm/moment": float(m.norm()),
        "l2_norm/second_moment_sqrt": float(s.sum().sqrt()),
        "l2_norm/grad": float(g.norm()),
        "l2_norm/update": lr * float(direction.norm()),
        "rms/update_direction": rms(direction),
        "update_to_weight": lr * rms(direction) / rms(p),
        "belief/signal": float(direction.abs().mean()),
        "belief/surprise": float(((g - m).square() / s_hat).mean()),
        "belief/eps_share": float((s < 2 * floor).double().mean()),
    }


def assert_tells_quantiles(
    record: dict[str, Any] | None,
    name: str,
    ms: list[Tensor],
    ss: list[Tensor],
    gs: list[Tensor],
    step: int,
    options: dict[str, Any],
) -> None:
    """Compare with those of whole tensors, or of the elements of each that are counted."""
    assert record is not None
    beta1, beta2 = options["betas"]

    def sample(tensors: list[Tensor]) -> Tensor:
        strides = [stride_of(tensor.numel()) for tensor in tensors]
        parts = [
            tensor.double().flatten()[::stride].repeat_interleave(stride)
            for tensor, stride in zip(tensors, strides, strict=True)
        ]
        return torch.cat(parts)

    m, s, g = sample(ms), sample(ss), sample(gs)
    s_hat = s / (1 - beta2**step)
    signal = (m / (1 - beta1**step)).abs() / (s_hat.sqrt() + options["eps"])
    width = 2 ** (1 / quantiles.PER_OCTAVE) * 1.0001  # of a bin, and of rounding at its ends
    for kind, values in {"signal": signal, "surprise": (g - m).square() / s_hat}.items():
        for part, share in quantiles.QUANTILES.items():
            told = record[f"belief/{kind}_{part}/{name}"]
            # Of the two elements next to the quantile, between which torch would interpolate.
            low, high = (
                float(torch.quantile(values, share, interpolation=side))
                for side in ("lower", "higher")
            )
            assert low / width <= told <= high * width, (kind, part, name, told, low, high)


def assert_tells(record: dict[str, Any] | None, name: str, values: dict[str, float]) -> None:
    assert record is not None
    told = {key: record.get(f"{key}/{name}") for key in values}
    # Sums of float32 numbers in windows.
    assert told == pytest.approx(values, rel=2e-5), name


@pytest.mark.parametrize("eps", [1e-12, 1e-2])
def test_numbers_of_one_process(eps: float) -> None:
    params = make_params()
    names = [f"layer{number}" for number in range(len(params))]
    options = {**HYPER, "eps": eps}
    optimizer = AdaBelief(list(zip(names, params, strict=True)), **options)
    monitor = StepMonitor(optimizer, [], every=1, per_parameter=True)
    for step in range(1, 4):
        grads = [make_grad(shape, step, 0, index) for index, shape in enumerate(SHAPES)]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
        record = monitor.log(step, loss=torch.tensor(0.5))
        states = [optimizer.state[param] for param in params]
        ms, ss = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
        detached = [param.detach() for param in params]
        whole = expected(ms, ss, detached, grads, step, options)
        assert_tells(record, "group0", whole)
        assert record is not None and record["loss"] == 0.5
        assert record["l2_norm/grad/global"] == pytest.approx(whole["l2_norm/grad"])
        assert record["bytes/exp_avg"] == sum(m.nbytes for m in ms)
        for index in (0, 6):
            own = [[each[index]] for each in (ms, ss, detached, grads)]
            assert_tells(record, names[index], expected(*own, step, options))
        assert_tells_quantiles(record, "group0", ms, ss, grads, step, options)
        assert_tells_quantiles(record, names[0], ms[:1], ss[:1], grads[:1], step, options)


def test_quantiles_of_many_elements_are_those_of_a_sample() -> None:
    """Of several windows, of rows as long as a power of two, and of what is out of bounds."""
    numel = 33 * quantiles.SAMPLE
    assert stride_of(numel) == 33 and stride_of(2 * quantiles.SAMPLE - 1) == 1
    param = torch.nn.Parameter(torch.ones(numel // 512, 512))
    optimizer = AdaBelief([param], **TINY)
    monitor = StepMonitor(optimizer, [], every=1)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 4):
        # Each column has its own size: a sample of some columns alone would see.
        sizes = torch.logspace(-3, 0, 512)
        param.grad = torch.randn(param.shape, generator=generator) * sizes + sizes.flip(0)
        optimizer.step()
        record = monitor.log(step)
    state = optimizer.state[param]
    m, s = [state["exp_avg"].clone()], [state["exp_avg_sq"].clone()]
    assert_tells_quantiles(record, "group0", m, s, [param.grad], 3, TINY)
    beta1, beta2 = TINY["betas"]
    signal = m[0].abs() / (1 - beta1**3) / (s[0] / (1 - beta2**3)).sqrt()
    assert record is not None
    for part, share in quantiles.QUANTILES.items():
        # Of all elements: within a bin, and 3 standard deviations of a sample's shares.
        slack = 3 * (share * (1 - share) / quantiles.SAMPLE) ** 0.5
        low, high = (float(signal.quantile(share + side * slack)) for side in (-1, 1))
        assert low / 1.2 <= record[f"belief/signal_{part}/group0"] <= high * 1.2
    param.grad = torch.zeros_like(param)
    state["exp_avg"].zero_()
    assert monitor.log(4)["belief/signal_p50/group0"] == 0.0  # type: ignore[index]
    state["exp_avg"].fill_(1e20)
    assert monitor.log(5)["belief/signal_p50/group0"] == float("inf")  # type: ignore[index]
    state["exp_avg"].fill_(float("nan"))
    assert "belief/signal_p50/group0" not in (monitor.log(6) or {})


@pytest.mark.parametrize("rectify, amsgrad", [(True, False), (False, True)])
def test_the_update_is_the_one_that_was_made(rectify: bool, amsgrad: bool) -> None:
    """Whatever switches are on, the told norm is that of what the weights have moved by."""
    params = make_params(torch.float64)
    options = {**HYPER, "eps": 1e-4, "weight_decay": 0.0, "betas": (0.9, 0.99)}
    optimizer = AdaBelief(params, rectify=rectify, amsgrad=amsgrad, **options)
    monitor = StepMonitor(optimizer, [], every=1)
    for step in range(1, 9):
        before = torch.cat([p.detach().clone().flatten() for p in params])
        for index, param in enumerate(params):
            param.grad = make_grad(SHAPES[index], step, 0, index).double()
        optimizer.step()
        record = monitor.log(step)
        moved = torch.cat([p.detach().flatten() for p in params]) - before
        assert record is not None
        assert record["l2_norm/update/group0"] == pytest.approx(float(moved.norm()), rel=1e-9)


def whole(
    optimizer: ShardedAdaBelief, params: list[torch.nn.Parameter]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return m, s and masters of all ranks; called by all."""
    options = optimizer.options
    keys = ["exp_avg", "exp_avg_sq"]
    states = collect(optimizer, keys)
    if options.state_dtype == torch.uint8:
        exponents = collect(optimizer, [f"{key}_exponent" for key in keys])
    else:
        exponents = [[None] * len(params)] * 2  # type: ignore[list-item]
    m, s = (
        [decode(*pair, signed=signed) for pair in zip(each, more, strict=True)]
        for each, more, signed in zip(states, exponents, (True, False), strict=True)
    )
    masters = [param.detach().flatten() for param in params]
    if "remainder" in optimizer.state[params[0]]:
        halves = collect(optimizer, ["remainder"])[0]
        masters = [join_master(*pair) for pair in zip(masters, halves, strict=True)]
    elif "master" in optimizer.state[params[0]]:
        masters = collect(optimizer, ["master"])[0]
    return m, s, masters


def sharded_numbers(*, sample: int = quantiles.SAMPLE, **options: Any) -> None:
    """Compare the sums over all shards with whole tensors."""
    quantiles.SAMPLE = sample  # in this process, which ends with the test
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dtype = options.pop("dtype", torch.float32)
    params = make_params(dtype)
    hyper = {**HYPER, "eps": 1e-8}
    names = [f"layer{number}" for number in range(len(params))]
    optimizer = ShardedAdaBelief(
        list(zip(names, params, strict=True)), bucket_bytes=1500, **hyper, **options
    )
    written: list[int] = []
    monitor = StepMonitor(
        optimizer,
        lambda step, values: written.append(step),
        every=2,
        per_parameter=True,
        across_ranks=True,
    )
    for step in range(1, 5):
        everyone = [
            [make_grad(shape, step, of, index).to(dtype) for index, shape in enumerate(SHAPES)]
            for of in range(world_size)
        ]
        backward(params, list(everyone[rank]))
        optimizer.step()
        record = monitor.log(step)
        assert (record is None) == (step % 2 == 1 or rank > 0)
        if step % 2 == 0:
            means = [
                rank_order_sum(list(each)) / world_size for each in zip(*everyone, strict=True)
            ]
            limit = options.get("max_grad_norm") or float("inf")
            norm = optimizer.grad_norm.item()
            factor = min(1.0, limit / (norm + 1e-6))
            ms, ss, ps = whole(optimizer, params)
            used = [grad * factor for grad in means]
            values = expected(ms, ss, ps, used, step, hyper)
            values["l2_norm/grad"] = norm
            if rank == 0:
                assert_tells(record, "group0", values)
                assert record is not None and record["model_share"] == 1.0
                assert record["l2_norm/grad/global"] == norm
                own = [[each[7]] for each in (ms, ss, ps, used)]
                values = expected(*own, step, hyper)
                values["l2_norm/grad"] /= factor
                assert_tells(record, "layer7", values)
                assert_tells_quantiles(record, "group0", ms, ss, used, step, hyper)
        optimizer.zero_grad()
    assert written == ([2, 4] if rank == 0 else [])


IN_STEP = {"reduce", "consensus", "update", "gather"}


def phases_are_named_and_timed(**options: Any) -> None:
    """Each phase is a range of the profiler, and has its seconds, which add up to the step's."""
    params = make_params()
    optimizer = ShardedAdaBelief(params, bucket_bytes=1500, **TINY, **options)
    records: dict[int, dict[str, Any]] = {}
    monitor = StepMonitor(optimizer, records.__setitem__, every=2)
    for step in range(1, 6):
        with torch.autograd.profiler.profile(enabled=step == 5) as profile:
            backward(params, [make_grad(shape, step, 0, i) for i, shape in enumerate(SHAPES)])
            optimizer.step()
            monitor.log(step)
            optimizer.zero_grad()
            [param.square() for param in params]  # as a forward reads them
    ranges = {event.name for event in profile.function_events}
    overlaps = options.get("overlap", True)
    expected = {"step", "reduce_wait", "gather_wait", *IN_STEP}
    assert {f"belief_dist::{name}" for name in expected} <= ranges
    if dist.get_rank() > 0:
        assert not records
        return
    times = {key: value for key, value in records[4].items() if key.startswith("time/")}
    places = {f"time/step/{name}" for name in IN_STEP} | {
        "time/optimizer_step",
        "time/seconds_per_step",
    }
    places |= {"time/backward/reduce"}
    assert {"time/backward/reduce_wait", "time/step/reduce_wait"} & times.keys()
    places |= {f"time/{'forward' if overlaps else 'step'}/gather_wait"}
    assert places <= times.keys() and min(times.values()) >= 0
    parts = [value for key, value in times.items() if key.startswith("time/step/")]
    assert 0 < sum(parts) <= times["time/optimizer_step"] <= times["time/seconds_per_step"]
    outside = sum(value for key, value in times.items() if key[5:12] in ("backwar", "forward"))
    exposed = sum(parts) - times["time/step/update"] + outside
    assert times["time/exposed_communication"] == pytest.approx(exposed)


def test_phases_of_one_process() -> None:
    """And nothing is measured for whom nobody asks."""
    for optimizer in (one_step(), AdaBelief([torch.nn.Parameter(torch.ones(8))])):
        param = optimizer.param_groups[0]["params"][0]
        param.grad = torch.ones_like(param)
        with torch.autograd.profiler.profile() as profile:
            optimizer.step()
        assert "belief_dist::step" in {event.name for event in profile.function_events}
        assert not optimizer._phases.seconds() and not optimizer._phases.steps
        monitor = StepMonitor(optimizer, [], every=1)
        optimizer.step()
        record = monitor.log(1)
        assert record is not None and record["time/optimizer_step"] > 0
        # Of this process with torch in it.
        assert 50 << 20 < record["memory/resident"] <= record["memory/resident_peak"] < 64 << 30
        assert not {"time/exposed_communication", "time/seconds"} & record.keys()


def test_numbers_of_all_ranks_are_those_of_whole_tensors(tmp_path: Path) -> None:
    bf16: dict[str, Any] = {"dtype": torch.bfloat16}
    cases = [
        partial(sharded_numbers),
        partial(sharded_numbers, sample=16),
        partial(sharded_numbers, stage=2, max_grad_norm=0.5),
        partial(sharded_numbers, state_dtype=torch.bfloat16, **bf16),
        partial(sharded_numbers, stage=2, master="remainder8", state_dtype=torch.uint8, **bf16),
        partial(sharded_numbers, offload="cpu", **bf16),
        *(partial(phases_are_named_and_timed, stage=stage) for stage in (1, 2)),
        partial(phases_are_named_and_timed, stage=2, overlap=False),
        partial(phases_are_named_and_timed, offload="cpu", shared_memory=False),
    ]
    run_ranks(3, tmp_path, *cases)


def same_bits(folder: str, **options: Any) -> None:
    """Train with and without a monitor of each kind, on all ranks."""
    rank = dist.get_rank()
    ends = []
    for number, kind in enumerate((None, {}, {"across_ranks": True, "per_parameter": True})):
        params = make_params()
        optimizer = ShardedAdaBelief(
            params, bucket_bytes=1500, max_grad_norm=1.0, **TINY, **options
        )
        path = Path(folder, f"{number}.jsonl")
        monitor = None if kind is None else StepMonitor(optimizer, path, every=3, **kind)
        for step in range(1, 21):
            mine: list[Tensor | None] = [
                make_grad(shape, step, rank, index) for index, shape in enumerate(SHAPES)
            ]
            backward(params, mine)
            optimizer.step()
            # One rank alone suffices where nothing is sent.
            if monitor is not None and (rank == 0 or kind):
                monitor.log(step, loss=step / 2)
            optimizer.zero_grad()
        optimizer.wait_pending()
        states = [value for param in params for value in optimizer.state[param].values()]
        ends.append([*params, *(value for value in states if isinstance(value, Tensor))])
        if rank == 0 and monitor is not None:
            assert [row["step"] for row in read_records(path)] == [3, 6, 9, 12, 15, 18]
        assert rank > 0 or path.exists() == (monitor is not None)
    for end in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], end, strict=True))


def test_training_has_the_same_bits_with_it(tmp_path: Path) -> None:
    """And without `across_ranks` rank 0 may call it alone: nothing is sent."""
    stages = (1, 2)
    for stage in stages:
        (tmp_path / str(stage)).mkdir()
    run_ranks(
        3,
        tmp_path,
        *(partial(same_bits, str(tmp_path / str(stage)), stage=stage) for stage in stages),
        partial(same_bits, str(tmp_path / "uint8"), state_dtype=torch.uint8),
    )


def test_a_skipped_step_says_why_and_no_more(tmp_path: Path) -> None:
    params = make_params()
    optimizer = ShardedAdaBelief(params, **TINY)
    path = tmp_path / "run" / "metrics.jsonl"
    monitor = StepMonitor(optimizer, path, every=1)
    for step in (1, 2, 3):
        grads = [make_grad(shape, step, 0, index) for index, shape in enumerate(SHAPES)]
        if step == 2:
            grads[0].fill_(float("inf"))
        backward(params, list(grads))
        optimizer.step()
        monitor.log(step, loss=float("nan") if step == 2 else 1.0)
        optimizer.zero_grad()
    first, second, third = read_records(path)
    assert second["skips"] == [{"step": 2, "kind": "skip", "why": second["why_skipped"]}]
    assert "skips" not in third
    assert "why_skipped" not in first and "finite" in second["why_skipped"]
    assert [row["skipped_steps"] for row in (first, second, third)] == [0, 1, 1]
    assert "l2_norm/moment/group0" in third and "l2_norm/moment/group0" not in second
    assert second["loss"] is None  # JSON has no NaN
    assert "NaN" not in path.read_text() and "time/seconds" in third


def test_a_gradient_that_is_gone_is_left_out() -> None:
    params = make_params()
    optimizer = ShardedAdaBelief(params, **TINY)
    monitor = StepMonitor(optimizer, [], every=1)
    backward(params, [make_grad(shape, 1, 0, index) for index, shape in enumerate(SHAPES)])
    assert monitor.log(1) is not None  # before the first step, too
    optimizer.step()
    optimizer.zero_grad()
    record = monitor.log(2)
    assert record is not None and "belief/signal/group0" in record
    assert not {"belief/surprise/group0", "l2_norm/grad/group0"} & record.keys()


def one_step(eps: float = 1e-12, value: float = 1.0) -> AdaBelief:
    param = torch.nn.Parameter(torch.ones(8))
    optimizer = AdaBelief([param], eps=eps)
    param.grad = torch.full_like(param, value)
    optimizer.step()
    return optimizer


def test_an_eps_that_dominates_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    monitor = StepMonitor(one_step(eps=1e-8, value=1e-3), [], every=1)
    with pytest.warns(UserWarning, match=r"eps=1e-08 dominates exp_avg_sq in 100% of param group"):
        monitor.log(1)
    record = monitor.log(2)  # no second one, which would be an error here
    assert record is not None and record["belief/eps_share/group0"] == 1.0
