"""ShardedAdaBelief in real DeepSpeed engines, next to the same training without DeepSpeed.

Started on every rank, by the deepspeed launcher or a fork: `stage0_job.py FOLDER PART`. Every case
asserts; the first failure ends the job.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from stage0_checkpoints import (
    broken_checkpoints,
    resume_from_others,
    save_and_resume,
    save_for_others,
)
from stage0_training import (
    HYPER,
    SMALL_BUCKETS,
    STEPS,
    Plain,
    assert_same,
    batches,
    config_of,
    initialize,
    loss_of,
    make_model,
    rank,
    states_of,
    train,
)
from zero_stages_job import float16_arithmetic, param_groups

# - Cases


def build_early() -> None:
    """Build optimizers in a process that has not imported DeepSpeed yet."""
    from belief_dist import AdaBelief, ShardedAdaBelief

    torch.distributed.init_process_group("gloo")
    for cls in (AdaBelief, ShardedAdaBelief):
        model = make_model()
        early[cls.__name__] = model, cls(param_groups(model), **HYPER)
    assert "deepspeed" not in sys.modules


early: dict[str, tuple[nn.Module, Any]] = {}


def built_before_deepspeed(folder: Path) -> None:
    """Needs neither a flag of the config, nor an import of DeepSpeed before."""
    import deepspeed

    model, optimizer = early["ShardedAdaBelief"]
    config = config_of(torch.float32, 2, 0.5)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    plain = Plain(torch.float32, 2, max_grad_norm=0.5)
    for step in range(2):
        train(engine, step)
        plain.step(step)
        assert_same(engine.optimizer, plain.optimizer, "built early")
    model, optimizer = early["AdaBelief"]
    config["zero_optimization"] = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    train(engine, 0)
    assert engine.optimizer.optimizer is optimizer


def same_bits(folder: Path) -> None:
    """Whatever the way in, dtype, accumulation and clipping."""
    for dtype, micro_batches, clipping, way, options in (
        (torch.float32, 1, 0.0, "type", {}),
        (torch.float32, 4, 0.5, "instance", SMALL_BUCKETS),
        (torch.float32, 4, None, "callable", SMALL_BUCKETS),
        (torch.bfloat16, 1, None, "instance", SMALL_BUCKETS),
        (torch.bfloat16, 4, 0.0, "callable", {}),
        (torch.bfloat16, 4, 0.5, "type", SMALL_BUCKETS),
        (torch.bfloat16, 2, 0.5, "type", {**SMALL_BUCKETS, "master": "remainder8"}),
        (torch.bfloat16, 2, 0.5, "type", {**SMALL_BUCKETS, "stage": 2}),
        (torch.float32, 1, 0.5, "type", {"offload": "cpu", "overlap": False}),
    ):
        context = f"{dtype}, {micro_batches} micro-batches, clipping {clipping}, {way}, {options}"
        engine = initialize(config_of(dtype, micro_batches, clipping), way, **options)
        bound = 1.0 if clipping is None else clipping or None  # 1.0 is DeepSpeed's own default
        plain = Plain(dtype, micro_batches, max_grad_norm=bound, **options)
        for step in range(STEPS):
            train(engine, step)
            plain.step(step)
            norm = float(plain.optimizer.grad_norm)
            assert norm > (bound or 0.0), "it would not clip"
            assert float(engine.get_global_grad_norm()) == norm, context
            assert_same(engine.optimizer, plain.optimizer, context)
        assert engine.global_steps == STEPS and engine.skipped_steps == 0
        assert engine.get_lr() == [HYPER["lr"]] * 2
        # No copies of the engine's: masters lie in shards, like m and s.
        held = engine.optimizer.bytes_per_rank()
        assert held == plain.optimizer.bytes_per_rank()


def reductions_overlap(folder: Path) -> None:
    """They start in the last backward of a step, and in no other."""
    engine = initialize(config_of(torch.float32, 2, 0.0), **SMALL_BUCKETS)
    plain = Plain(torch.float32, 2, **SMALL_BUCKETS)
    gradients = engine.optimizer._engine.reducer
    for step in range(2):
        for micro, (inputs, targets) in enumerate(batches(step, 2, torch.float32)):
            engine.backward(loss_of(engine(inputs), targets))
            assert gradients.has_begun == (micro == 1)
            engine.step()
        plain.step(step)
    assert_same(engine.optimizer, plain.optimizer, "overlap")

    # Boundaries that the script sets, and engine.no_sync; each step has two micro-batches.
    (first, second) = batches(2, 2, torch.float32)
    engine.set_gradient_accumulation_boundary(False)
    engine.backward(loss_of(engine(first[0]), first[1]))
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(loss_of(engine(second[0]), second[1]))
    engine.step()
    plain.step(2)
    assert_same(engine.optimizer, plain.optimizer, "set_gradient_accumulation_boundary")
    (first, second) = batches(3, 2, torch.float32)
    with engine.no_sync():
        engine.backward(loss_of(engine(first[0]), first[1]))
        assert not gradients.has_begun
    engine.backward(loss_of(engine(second[0]), second[1]))
    engine.step()
    plain.step(3)
    assert_same(engine.optimizer, plain.optimizer, "no_sync")

    # Gradients that were reduced and then forgotten leave nothing behind.
    engine.backward(loss_of(engine(first[0]), first[1]))
    engine.zero_grad()
    engine.set_gradient_accumulation_boundary(False)
    (first, second) = batches(4, 2, torch.float32)
    engine.backward(loss_of(engine(first[0]), first[1]))
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(loss_of(engine(second[0]), second[1]))
    engine.step()
    plain.step(4)
    assert_same(engine.optimizer, plain.optimizer, "zero_grad")


def caller_owns_the_boundary(folder: Path) -> None:
    """`managed_gradient_accumulation: false`: every step is one, of as many backwards as came."""
    config = config_of(torch.float32, 2, 0.5, managed_gradient_accumulation=False)
    engine, plain = initialize(config), Plain(torch.float32, 2, max_grad_norm=0.5)
    for step in range(2):
        for inputs, targets in batches(step, 2, torch.float32):
            engine.backward(loss_of(engine(inputs), targets))
        engine.step()
        plain.step(step)
    assert_same(engine.optimizer, plain.optimizer, "unmanaged")


def skipped_steps(folder: Path) -> None:
    """A gradient that is not finite: nothing moves, schedules included, and the engine says so."""
    schedule = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 9}}
    log = {"enabled": True, "output_path": str(folder / "csv"), "job_name": "job"}
    for dtype in (torch.float32, torch.bfloat16):
        config = config_of(dtype, 2, 0.5, scheduler=schedule, csv_monitor=log, steps_per_print=1)
        engine = initialize(config)
        for step in range(3):
            train(engine, step)
        assert engine.was_step_applied()
        before, lr = states_of(engine.optimizer), engine.get_lr()
        train(engine, 3, spoil=True)
        assert not engine.was_step_applied() and engine.optimizer.overflow
        assert engine.skipped_steps == 1 == engine.optimizer.skipped_steps
        assert engine.get_lr() == lr and engine.lr_scheduler.last_batch_iteration == 2
        for ours, old in zip(states_of(engine.optimizer), before, strict=True):
            assert all(torch.equal(old[k], v) for k, v in ours.items() if k != "step")
            assert ours["step"] == old["step"] == 3
        train(engine, 4)
        assert engine.was_step_applied() and engine.get_lr() > lr
        assert engine.skipped_steps == 1 and engine.global_steps == 5
        if rank() == 0:
            rows = (folder / "csv" / "job" / "Train_Samples_lr.csv").read_text().splitlines()
            assert len(rows) == 6, rows  # a heading, and every step
            shutil.rmtree(folder / "csv")
        torch.distributed.barrier()


def spikes(folder: Path) -> None:
    """A gradient far larger than those of 32 steps: skipped, counted, and the scale stays."""
    autocast = {"enabled": True, "dtype": "float16"}
    config = config_of(torch.float32, 2, 0.5, torch_autocast=autocast)
    engine = initialize(config, spike_guard=4.0)
    train(engine, 0)
    engine.optimizer.driver.scaler._scale.fill_(16.0)  # that a spike does not overflow
    step = 1
    while len(engine.optimizer.spike_history) < 33:
        train(engine, step)
        step += 1
    skipped, scale = engine.skipped_steps, engine.optimizer.cur_scale
    before, history = states_of(engine.optimizer), engine.optimizer.spike_history
    train(engine, step, size=300.0)
    assert not engine.was_step_applied()
    assert "spike_guard=4" in engine.optimizer.last_step.why_not, engine.optimizer.last_step
    assert engine.skipped_steps == skipped + 1 == engine.optimizer.skipped_steps
    assert engine.optimizer.cur_scale == scale
    for ours, old in zip(states_of(engine.optimizer), before, strict=True):
        assert all(torch.equal(torch.as_tensor(old[k]), torch.as_tensor(ours[k])) for k in old)
    engine.save_checkpoint(str(folder / "spikes"))
    again = initialize(config, spike_guard=4.0)
    again.load_checkpoint(str(folder / "spikes"))
    assert again.optimizer.spike_history == [1.0, *history[1:]]
    train(again, step, size=300.0)
    assert again.optimizer.spike_history == [2.0, *history[1:]]


def loss_scale(folder: Path) -> None:
    """float16 by torch_autocast: scaled, clipped at its true norm, halved after an overflow."""
    autocast = {"enabled": True, "dtype": "float16"}
    config = config_of(torch.float32, 1, 0.5, torch_autocast=autocast)
    engine = initialize(config)
    scale = engine.optimizer.cur_scale
    assert scale == 2.0**16
    # An overflow of the scaled loss in float16, and then a step that fits.
    train(engine, 0, spoil=True)
    assert engine.skipped_steps == 1 and engine.optimizer.cur_scale == scale / 2
    while not engine.was_step_applied():
        train(engine, 1)
        assert engine.global_steps < 16
    plain = Plain(torch.float32, 1, max_grad_norm=0.5)
    with torch.autocast("cpu", torch.float16):
        plain.step(1)
    norm = float(plain.optimizer.grad_norm)
    assert norm > 0.5 and abs(float(engine.get_global_grad_norm()) / norm - 1) < 1e-2
    for ours, theirs in zip(states_of(engine.optimizer), states_of(plain.optimizer), strict=True):
        assert ours["step"] == theirs["step"] == 1
        assert (ours["param"] - theirs["param"]).abs().max() < 2e-3  # float16 activations
    tag = folder / "scaled"
    engine.save_checkpoint(str(tag))
    again = initialize(config)
    again.load_checkpoint(str(tag))
    assert again.optimizer.cur_scale == engine.optimizer.cur_scale < scale


def float16(folder: Path) -> None:
    """By the config's "fp16": scaled and skipped as by the same scaler without DeepSpeed."""
    from belief_dist.deepspeed.stage0.loss_scale import EngineScaler

    options = {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 2}
    with float16_arithmetic():
        engine = initialize(config_of(torch.float32, 2, 0.5, fp16=options), **SMALL_BUCKETS)
    plain = Plain(torch.float16, 2, max_grad_norm=0.5, **SMALL_BUCKETS)
    scaler = EngineScaler("cpu", 2.0**10, 2, 1.0, float("inf"))
    for step, spoil in enumerate((False, True, False, False, False)):
        train(engine, step, spoil)
        plain.step(step, scaler, spoil)
        assert_same(engine.optimizer, plain.optimizer, "float16")
        assert engine.optimizer.cur_scale == scaler.get_scale()
    assert scaler.get_scale() == 2.0**10  # halved once, and doubled after two good steps
    assert engine.skipped_steps == 1
    assert next(engine.module.parameters()).dtype == torch.float16


def schedulers(folder: Path) -> None:
    """Of torch by JSON, and one that was built around an instance before the engine."""
    import deepspeed

    from belief_dist import ShardedAdaBelief

    schedule = {"type": "StepLR", "params": {"step_size": 1, "gamma": 0.5}}
    engine = initialize(config_of(torch.bfloat16, 1, 0.0, scheduler=schedule))
    model = make_model()
    optimizer = ShardedAdaBelief(param_groups(model), **HYPER)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    other, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        config=config_of(torch.bfloat16, 1, 0.0),
    )
    for step in range(3):
        train(engine, step)
        train(other, step)
    assert engine.get_lr() == other.get_lr() == [HYPER["lr"] / 8] * 2
    assert other.optimizer is optimizer
    assert_same(engine.optimizer, optimizer, "scheduler")


def refusals(folder: Path) -> None:
    """What cannot be combined is one sentence on every rank, from `initialize`."""
    f32 = torch.float32
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        (r'ZeRO stage 1: use "type": "AdaBelief" with', {"zero_optimization": {"stage": 1}}, {}),
        (r'"stage": 2 in the params', {"zero_optimization": {"stage": 2}}, {}),
        (r"ZeRO stage 3: use", {"zero_optimization": {"stage": 3}}, {}),
        (
            r'"offload": "cpu" in its params',
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            {},
        ),
        (r"takes no communication_data_type", {"communication_data_type": "bf16"}, {}),
        (r"prescale_gradients and", {"prescale_gradients": True}, {}),
        (r"prescale_gradients and", {"gradient_predivide_factor": 2.0}, {}),
        (r"multiply the loss by", {"gradient_allreduce_op": "sum"}, {}),
        (
            r'asks for torch.float32; use "stage": 2 in its params',
            {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
            {},
        ),
        (r"universal checkpoints", {"checkpoint": {"load_universal": True}}, {}),
        (r"all must see", {"checkpoint": {"use_node_local_storage": True}}, {}),
        (
            r"max_grad_norm=0.25, and the engine clips at gradient_clipping=1.0",
            {"way": "callable"},
            {"max_grad_norm": 0.25},
        ),
        (r"has no option 'weight_decuple'.*mean 'weight_decouple'", {}, {"weight_decuple": True}),
        (r"leave micro_batches out", {}, {"micro_batches": 4}),
        (r"stage must be 1 or 2, got 3", {}, {"stage": 3}),
        (
            r"ranks disagree about the \(gradient_accumulation_steps, gradient_clipping\)",
            {"gradient_clipping": float(rank())},
            {},
        ),
    ]
    for sentence, more, options in cases:
        more = dict(more)
        way = more.pop("way", "type")
        try:
            initialize(config_of(f32, 1, None, **more), way, **options)
        except (ValueError, TypeError) as error:
            assert re.search(sentence, str(error)), f"{sentence}: {error}"
        else:
            raise AssertionError(f"{more} {options} was accepted")
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.pipe import PipelineModule

    from belief_dist import ShardedAdaBelief

    config = config_of(f32, 1, None) | {"optimizer": {"type": "ShardedAdaBelief"}}
    stranger = ShardedAdaBelief(make_model().parameters())
    partitioned = make_model()
    partitioned[0].weight.ds_id = 0  # what deepspeed.zero.Init leaves on every parameter
    experts = nn.Sequential(MoE(8, nn.Linear(8, 8), num_experts=1))
    used = initialize(config, "instance")
    train(used, 0)
    models: list[tuple[str, nn.Module, Any]] = [
        ("has made 1 steps already", used.module, used.optimizer),
        ("has 6 parameters that are not the engine's model's", make_model(), stranger),
        ("deepspeed.zero.Init", partitioned, None),
        ("MoE layers", experts, ShardedAdaBelief(experts.parameters())),
        ("pipeline engine", PipelineModule([nn.Linear(7, 5)], num_stages=1), None),
    ]
    for sentence, model, optimizer in models:
        try:
            deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                model_parameters=[p for p in model.parameters() if p.requires_grad],
                config=config,
            )
        except ValueError as error:
            assert sentence in str(error), error
        else:
            raise AssertionError(f"{sentence} was accepted")


def unnoticed_engine(folder: Path) -> None:
    """An engine that was not watched does not train by a wrong rule: its first step refuses."""
    from belief_dist.deepspeed.stage0 import engine as wrappers

    # Nothing is taken for a ShardedAdaBelief when the engine looks at its optimizer.
    with mock.patch.object(wrappers, "ShardedAdaBelief", type(None)):
        engine = initialize(config_of(torch.float32, 1, 0.0))
        before = states_of(engine.optimizer)
        try:
            train(engine, 0)
        except RuntimeError as error:
            assert "built around ShardedAdaBelief unnoticed" in str(error)
        else:
            raise AssertionError("it trained")
        for ours, old in zip(states_of(engine.optimizer), before, strict=True):
            assert torch.equal(ours["param"], old["param"]) and ours["step"] == 0


PARTS: dict[str, list[Callable[[Path], None]]] = {
    "train": [
        same_bits,
        reductions_overlap,
        caller_owns_the_boundary,
        skipped_steps,
        spikes,
        loss_scale,
        float16,
        schedulers,
        refusals,
        unnoticed_engine,
        save_and_resume,
        broken_checkpoints,
        save_for_others,
    ],
    "resume": [resume_from_others, save_for_others],
    "back": [built_before_deepspeed, resume_from_others],
}


def cases(part: str) -> Iterator[Callable[[Path], None]]:
    only = os.environ.get("ONLY")
    return (case for case in PARTS[part] if not only or case.__name__ in only.split(","))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--local_rank", type=int)  # the deepspeed launcher adds it
    args = parser.parse_args()
    if args.part == "back":
        build_early()

    import deepspeed

    # Otherwise DeepSpeed compiles, for 25 to 100 seconds, an operation that serves inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    assert early or "belief_dist" not in sys.modules
    gc.freeze()  # as tests.harness.ranks does, and why
    done = []
    for case in cases(args.part):
        print(f"rank {rank()}: {case.__name__}", flush=True)
        case(args.folder)
        torch.distributed.barrier()
        done.append(case.__name__)
    (args.folder / f"{args.part}.{rank()}.json").write_text(json.dumps(done))
    torch.distributed.barrier()
    # Not through the interpreter's end, see zero_stages_job.py.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
