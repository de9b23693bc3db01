"""Saves DeepSpeed checkpoints of every ZeRO stage, for test_zero_checkpoints.py.

Started by the deepspeed launcher: `zero_checkpoints_job.py FOLDER` trains and saves, and makes
universal checkpoints. `zero_checkpoints_job.py FOLDER SOURCE` loads those in FOLDER/SOURCE, at
any number of ranks, saves at once what it has loaded, and trains on.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zero_stages_job import make_batch

WORLD_SIZE = 2
ROWS = 12  # of the global batch: as many on each of 1, 2, 3 or 4 ranks
CASES = ((1, "fp32"), (2, "bf16"), (3, "fp32"))


def make_model() -> nn.Sequential:
    """Return a model of whose biases the last of 4 ranks holds no part: 18 elements, 6 per rank."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 5))


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return three groups that differ in every hyperparameter."""
    first, second, *biases = sorted(model.parameters(), key=lambda p: -p.dim())
    return [
        {"params": [first], "lr": 0.02, "weight_decay": 0.1},
        {"params": [second], "betas": (0.8, 0.99), "weight_decay": 0.05, "eps": 1e-6},
        {"params": biases, "weight_decay": 0.0, "lr": 0.005},
    ]


def config(stage: int, dtype: str, universal: bool, offload: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:  # really partition these small parameters, and step in several sub-groups
        zero |= {"stage3_param_persistence_threshold": 0, "sub_group_size": 40}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_batch_size": ROWS,
        "optimizer": {"type": "AdaBelief", "params": {"lr": 0.01, "eps": 1e-8}},
        "bf16": {"enabled": dtype == "bf16"},
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "checkpoint": {"load_universal": universal},
    }


def halving(optimizer: Any) -> torch.optim.lr_scheduler.LRScheduler:
    """Return a schedule that a checkpoint is in the middle of."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


def steps(engine: Any, numbers: range) -> None:
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for step in numbers:
        mine = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
        inputs, targets = (part[mine] for part in make_batch(step, ROWS))
        output = engine(inputs.to(next(engine.module.parameters()).dtype))
        engine.backward(nn.functional.mse_loss(output.float(), targets))
        engine.step()


def to_universal(tag: Path) -> None:
    from deepspeed.checkpoint.ds_to_universal import main as convert
    from deepspeed.checkpoint.ds_to_universal import parse_arguments

    flags = ["--input_folder", str(tag), "--output_folder", str(tag.with_name("universal"))]
    sys.argv = ["ds_to_universal", *flags, "--inject_missing_state", "--num_extract_workers", "1"]
    sys.argv += ["--num_merge_workers", "1"]
    convert(parse_arguments())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("source", nargs="?")
    parser.add_argument("--local_rank", type=int)  # the deepspeed launcher adds it
    args = parser.parse_args()

    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    rank, ranks = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    again = args.source is not None
    for stage, dtype in CASES:
        name = f"{stage}{dtype}"
        model = make_model()
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=param_groups(model),
            lr_scheduler=halving,
            # Saved on the device, and resumed on the host at one number of ranks.
            config=config(stage, dtype, again, offload=ranks == 3),
        )
        if again:
            folder = args.folder / f"resumed-{args.source}-{ranks}" / name
            path, _ = engine.load_checkpoint(str(args.folder / args.source / name))
            assert path is not None
        else:
            folder = args.folder / "saved" / name
            steps(engine, range(3))
        engine.save_checkpoint(str(folder), tag="at3")
        options = [dict(group, params=None) for group in engine.optimizer.optimizer.param_groups]
        steps(engine, range(3, 5))
        masters = {
            n: safe_get_full_fp32_param(p).clone() for n, p in engine.module.named_parameters()
        }
        if rank == 0:
            found = {"masters": masters, "options": options}
            if not again:
                to_universal(folder / "at3")
                found["zero_to_fp32"] = get_fp32_state_dict_from_zero_checkpoint(folder, "at3")
            torch.save(found, folder / "found.pt")
        torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # see zero_stages_job


if __name__ == "__main__":
    main()
