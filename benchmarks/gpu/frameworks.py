"""DeepSpeed's engine, the Trainer and Lightning on one GPU, where they are installed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from typing import Any

import torch

import belief_dist
from benchmarks.gpu.cases import Case, Outcome, Size
from benchmarks.gpu.contenders import initialize_deepspeed, loss_of, one_rank
from benchmarks.gpu.runner import ROOT

_DEEPSPEED = ["deepspeed"]
_SECONDS = 100  # that an example may take


def _engine(
    device: str, size: Size, kind: str, dtype: str, zero: dict[str, Any], **options: Any
) -> Outcome:
    """Train by a JSON that names the optimizer."""
    one_rank(device)
    model = size.job.model(torch.float32, device)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": size.job.batch,
        "gradient_clipping": 1.0,
        "optimizer": {"type": kind, "params": {"lr": 1e-3, "weight_decay": 0.01, **options}},
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": {"enabled": dtype == "fp16", "initial_scale_power": 10},
    }
    engine = initialize_deepspeed(model, config)
    runs = str(belief_dist.verify(engine))
    losses = []
    for _ in range(size.steps):
        loss = loss_of(engine, size.job.tokens(device))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    engine.destroy()
    if not losses[-1] < losses[0]:
        raise RuntimeError(f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}")
    return {"first loss": losses[0], "last loss": losses[-1], "verify": runs}


def _example(script: str, *arguments: str) -> Outcome:
    """Run an example as the only rank; its last line says what it came to."""
    places = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, f"examples/{script}", *arguments],
        cwd=ROOT,
        env={**os.environ, **places, "MASTER_PORT": "29513", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_SECONDS,
    )
    seconds = time.perf_counter() - begin
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0:
        print(done.stdout)
        raise RuntimeError(f"{script} ended with code {done.returncode}: {lines[-1:]}")
    told = [line for line in lines if "loss" in line or "AdaBelief runs" in line]
    return {"all s": seconds, "said": "; ".join(told[-2:])[-300:]}


def cases(device: str, size: Size) -> list[Case]:
    here = {"device": device, "size": size}
    gpu = device == "cuda"
    table = "DeepSpeed's engine, by JSON"
    found = []
    # DeepSpeed has no fp16 on most CPUs; at its stage 0 "AdaBelief" refuses it.
    for stage in range(4):
        for dtype in ["bf16"] + ["fp16"] * (gpu and stage > 0):
            run = partial(_engine, **here, kind="AdaBelief", dtype=dtype, zero={"stage": stage})
            found.append(Case(table, f"AdaBelief, ZeRO-{stage}, {dtype}", run, _DEEPSPEED))
    for stage, dtype in [(1, "bf16"), (2, "bf16")] + [(1, "fp16")] * gpu:
        kind = "ShardedAdaBelief"
        run = partial(_engine, **here, kind=kind, dtype=dtype, zero={"stage": 0}, stage=stage)
        found.append(Case(table, f"{kind}, stage {stage}, ZeRO-0, {dtype}", run, _DEEPSPEED))
    offload = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    run = partial(_engine, **here, kind="AdaBelief", dtype="bf16", zero=offload)
    found.append(Case(table, "AdaBelief, ZeRO-3, CPU offload, bf16", run, _DEEPSPEED))
    steps = f"--steps={size.steps}"
    json = str(ROOT / "configs" / "hf_zero2.json") if gpu else ""
    trainer = partial(_example, "with_trainer.py", steps, f"--deepspeed={json}")
    lightning = partial(
        _example,
        "with_lightning.py",
        "--devices=1",
        steps,
        *[f"--deepspeed={ROOT / 'configs' / 'lightning_zero2.json'}"] * gpu,
    )
    examples = "The examples"
    how, more = (", ZeRO-2", _DEEPSPEED) if gpu else (", DDP", [])
    needed = ["transformers", "accelerate", *more]
    found.append(Case(examples, f"Trainer{how}", trainer, needed))
    found.append(Case(examples, f"Lightning{how}", lightning, ["lightning", *more]))
    return found
