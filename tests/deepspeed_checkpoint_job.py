"""Saves DeepSpeed checkpoints of every ZeRO stage, for test_checkpoint_deepspeed.py.

Started by the deepspeed launcher: `deepspeed_checkpoint_job.py FOLDER`. With `FOLDER/again` in
place, it loads universal checkpoints from there instead, and trains on.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepspeed_job import make_batch, make_model, param_groups

WORLD_SIZE = 2


def config(stage: int, dtype: str, universal: bool) -> dict[str, Any]:
    return {
        "train_batch_size": 4 * WORLD_SIZE,
        "optimizer": {"type": "AdaBelief", "params": {"lr": 0.01, "eps": 1e-8}},
        "bf16": {"enabled": dtype == "bf16"},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "checkpoint": {"load_universal": universal},
    }


def steps(engine: Any, rank: int, numbers: range) -> None:
    for step in numbers:
        inputs, targets = make_batch(step, 4 * WORLD_SIZE)
        mine = slice(4 * rank, 4 * rank + 4)
        output = engine(inputs[mine].to(next(engine.module.parameters()).dtype))
        engine.backward(nn.functional.mse_loss(output.float(), targets[mine]))
        engine.step()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--local_rank", type=int)  # the deepspeed launcher adds it
    folder = parser.parse_args().folder

    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    rank = deepspeed.comm.get_rank()
    for stage, dtype in [(1, "fp32"), (2, "bf16"), (3, "fp32")]:
        name = f"{stage}{dtype}"
        again = folder / "again" / name
        if not again.exists() and (folder / "again").exists():
            continue
        model = make_model()
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=param_groups(model),
            config=config(stage, dtype, again.exists()),
        )
        if again.exists():
            path, _ = engine.load_checkpoint(str(again))
            assert path is not None
            steps(engine, rank, range(3, 5))
        else:
            steps(engine, rank, range(3))
            engine.save_checkpoint(str(folder / name), tag="at3")
            steps(engine, rank, range(3, 5))
        masters = {
            n: safe_get_full_fp32_param(p).clone() for n, p in engine.module.named_parameters()
        }
        kind = "again" if again.exists() else "whole"
        torch.save(masters, folder / f"{name}.{kind}.{rank}.pt")
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # see deepspeed_job


if __name__ == "__main__":
    main()
