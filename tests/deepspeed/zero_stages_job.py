"""A user's DeepSpeed script: it never imports belief_dist, the JSON's type name has to do.

A launcher runs it on every rank: `zero_stages_job.py FOLDER`. It trains once for every
`FOLDER/*.json` and saves what happened to `FOLDER/<name>.<rank>.pt`. With `--spawn PORT` it starts
the ranks itself, as notebooks and some frameworks do.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WORLD_SIZE = 2
STEPS = 5
ROWS = 4  # of one micro-batch on one rank


def make_model() -> nn.Sequential:
    """Return a small model with odd shapes, equal on all ranks.

    Its last layer starts at zero, so that the first gradient of everything below is exactly zero:
    then some rank's whole partition has a zero gradient in a step that counts.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 5))
    nn.init.zeros_(model[2].weight)
    return model


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return a group that decays as the config says, and one of biases that does not."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    biases = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": matrices}, {"params": biases, "weight_decay": 0.0}]


def make_batch(step: int, rows: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of the whole global batch of a step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, 7, generator=generator), torch.randn(rows, 5, generator=generator)


@contextmanager
def float16_arithmetic() -> Iterator[None]:
    """Let DeepSpeed use float16 here.

    It asks whether oneDNN has it fast on this processor, and refuses if not. torch computes in it
    on any, and what is asked for here is the arithmetic, not speed.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    try:
        yield
    finally:
        del accelerator.is_fp16_supported


def train(config: Path, rank: int) -> dict[str, Any]:
    """Train by the DeepSpeed engine; return parameters and optimizer states, whole ones."""
    import deepspeed
    from deepspeed.utils import safe_get_full_optimizer_state

    model = make_model()
    names = [name for name, _ in model.named_parameters()]
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=param_groups(model), config=str(config)
    )
    import belief_dist  # only now: the type name alone has found the optimizer

    verified = [str(belief_dist.verify(engine))]
    stage = engine.zero_optimization_stage()
    params = list(engine.module.parameters())
    dtype = params[0].dtype
    micro_batches = engine.gradient_accumulation_steps()

    def snapshot() -> dict[str, Tensor]:
        with deepspeed.zero.GatheredParameters(params, enabled=stage == 3):
            return {n: p.detach().clone() for n, p in zip(names, params, strict=True)}

    trajectory = [snapshot()]
    for step in range(STEPS):
        inputs, targets = make_batch(step, micro_batches * WORLD_SIZE * ROWS)
        for micro in range(micro_batches):
            mine = slice(start := (micro * WORLD_SIZE + rank) * ROWS, start + ROWS)
            output = engine(inputs[mine].to(dtype))
            engine.backward(nn.functional.mse_loss(output.float(), targets[mine]))
            engine.step()
        trajectory.append(snapshot())

    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    states = {}
    if dtype == torch.float32:
        # At stages 1 and 2 DeepSpeed shows the states of the first param group only: it looks for
        # them when the others have not been stepped yet.
        shown = {n: p for n, p in zip(names, params, strict=True) if n.endswith("weight")}
        for key in ("exp_avg", "exp_avg_sq"):
            states[key] = {
                n: safe_get_full_optimizer_state(p, key) if stage else optimizer.state[p][key]
                for n, p in shown.items()
            }
    return {
        "optimizer": f"{type(optimizer).__module__}.{type(optimizer).__name__}",
        "verified": [*verified, str(belief_dist.verify(engine))],
        "trajectory": trajectory,
        "states": states,
        "state_keys": {key for state in optimizer.state.values() for key in state},
        "steps": {(type(s["step"]).__name__, s["step"]) for s in optimizer.state.values()},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--local_rank", type=int)  # the deepspeed launcher adds it
    parser.add_argument("--spawn", metavar="PORT")
    args = parser.parse_args()
    if args.spawn is None:
        train_all(args.folder)
    else:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": args.spawn}
        os.environ["WORLD_SIZE"] = str(WORLD_SIZE)
        torch.multiprocessing.spawn(spawned, (args.folder,), nprocs=WORLD_SIZE)


def spawned(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    train_all(folder)


def train_all(folder: Path) -> None:
    import deepspeed

    # Otherwise DeepSpeed compiles, for 25 to 100 seconds, an operation that serves inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    rank = deepspeed.comm.get_rank()
    assert "belief_dist" not in sys.modules

    for config in sorted(folder.glob("*.json")):
        try:
            result = train(config, rank)
        except TypeError as error:
            result = {"error": str(error)}
        torch.save(result, config.with_suffix(f".{rank}.pt"))
    torch.distributed.barrier()
    # Not through the interpreter's end: there a thread of gloo aborts one job in some hundred
    # ("terminate called without an active exception"), after everything was done right.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
