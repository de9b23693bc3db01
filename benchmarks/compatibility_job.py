"""What the deepspeed launcher runs on every rank for the table of compatibility.

`compatibility_job.py FOLDER` trains once for each FOLDER/*.json. The script imports nothing of
belief_dist: the type name in the JSON has to do.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RANKS = 2
STEPS = 5
ROWS = 4  # of one micro-batch on one rank


def make_model() -> nn.Sequential:
    """Return a model whose states are large enough that DeepSpeed swaps them out to NVMe."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 1024), nn.Tanh(), nn.Linear(1024, 600))


def make_batch(step: int, rows: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of the whole global batch of a step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, 16, generator=generator), torch.randn(rows, 600, generator=generator)


def _train(config: dict[str, Any], rank: int) -> dict[str, Any]:
    import deepspeed

    model = make_model()
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config
    )
    params = list(engine.module.parameters())
    micro_batches = engine.gradient_accumulation_steps()
    for step in range(STEPS):
        inputs, targets = make_batch(step, micro_batches * RANKS * ROWS)
        for micro in range(micro_batches):
            mine = slice(start := (micro * RANKS + rank) * ROWS, start + ROWS)
            output = engine(inputs[mine].to(params[0].dtype))
            engine.backward(nn.functional.mse_loss(output.float(), targets[mine]))
            engine.step()
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    sharded = engine.zero_optimization_stage() == 3
    with deepspeed.zero.GatheredParameters(params, enabled=sharded):
        weights = [p.detach().float().clone() for p in params]
    found = {"optimizer": type(base).__name__, "weights": weights}
    engine.destroy()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--local_rank", type=int)
    folder = parser.parse_args().folder

    import deepspeed

    # Otherwise DeepSpeed compiles, for 25 to 100 seconds, an operation that serves inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    rank = deepspeed.comm.get_rank()
    for file in sorted(folder.glob("*.json")):
        try:
            found = _train(json.loads(file.read_text()), rank)
        except Exception as error:  # whatever DeepSpeed refuses with is the result
            found = {"refused": f"{type(error).__name__}: {error}"}
        torch.save(found, file.with_suffix(f".{rank}.pt"))
        torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort an orderly end


if __name__ == "__main__":
    main()
