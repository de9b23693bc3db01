"""Trains with AdaBelief offloaded in every way there is, for test_offload.py.

Started by the deepspeed launcher: `offload_job.py FOLDER first|resumed`. Each case ends
in `FOLDER/<name>.<rank>.pt`: the parameters after every step, or the error that it ended with.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WORLD_SIZE = 2
STEPS = 4
SAVED_AT = 2
OPTIONS = {"lr": 0.01, "eps": 1e-4, "weight_decay": 0.1, "fused": True}


def make_model() -> nn.Sequential:
    """Return a model of which one sub-group per rank exceeds the 1 MiB that are swapped."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 750), nn.Tanh(), nn.Linear(750, 750), nn.Linear(750, 3))


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    biases = [p for p in model.parameters() if p.dim() == 1]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    return [{"params": matrices}, {"params": biases, "weight_decay": 0.0, "lr": 0.003}]


def make_batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 12, generator=generator), torch.randn(8, 3, generator=generator)


def configuration(stage: int, *, optimizer: bool = True, **zero: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_batch_size": 8,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, **zero},
    }
    if optimizer:
        config["optimizer"] = {"type": "AdaBelief", "params": OPTIONS}
    if stage == 3:
        config["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0,
            "sub_group_size": 100_000,
        }
    return config


def ways(folder: Path) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Yield (name, configuration, client optimizer or None)."""
    from belief_dist import AdaBelief

    cpu = {"device": "cpu"}
    nvme = {"device": "nvme", "nvme_path": str(folder / "nvme")}
    plain = {stage: configuration(stage) for stage in (1, 2, 3)}
    for stage, config in plain.items():
        yield f"{stage}", config, None
        yield f"{stage} cpu", configuration(stage, offload_optimizer=cpu), None
    client = configuration(2, optimizer=False, offload_optimizer=cpu)
    make: Callable[..., Any] = lambda params: AdaBelief(params, **OPTIONS)  # noqa: E731
    yield "2 callable", client, make
    yield "2 instance", client, "instance"
    yield "2 forced", client | {"zero_force_ds_cpu_optimizer": True}, "instance"
    yield "3 ratio", configuration(3, offload_optimizer=cpu | {"ratio": 0.5}), None
    yield "3 params", configuration(3, offload_optimizer=cpu, offload_param=cpu), None
    yield "3 nvme", configuration(3, offload_optimizer=nvme), None
    yield "1 elastic", configuration(1, elastic_checkpoint=True), None
    for stage in (2, 3):
        config = configuration(stage, offload_optimizer=cpu)
        masters = {"enabled": True, "bf16_master_weights_and_grads": True}
        yield f"{stage} bf16 masters", config | {"bf16": masters}, None
        states = masters | {"bf16_optimizer_states": True}
        yield f"{stage} bf16 states", config | {"bf16": states}, None
        yield f"{stage} bf16 on device", configuration(stage) | {"bf16": masters}, None


def start(config: dict[str, Any], client: Any) -> Any:
    import deepspeed

    from belief_dist import AdaBelief

    model = make_model()
    groups = param_groups(model)
    if client == "instance":
        client = AdaBelief(groups, **OPTIONS)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=client, model_parameters=groups, config=config
    )
    return engine


def weights(engine: Any) -> dict[str, Tensor]:
    import deepspeed

    params = dict(engine.module.named_parameters())
    sharded = engine.zero_optimization_stage() == 3
    with deepspeed.zero.GatheredParameters(list(params.values()), enabled=sharded):
        return {name: param.detach().clone() for name, param in params.items()}


def train(engine: Any, rank: int, steps: range) -> list[dict[str, Tensor]]:
    trajectory = []
    dtype = next(engine.module.parameters()).dtype
    for step in steps:
        inputs, targets = (part[4 * rank : 4 * rank + 4] for part in make_batch(step))
        output = engine(inputs.to(dtype))
        engine.backward(nn.functional.mse_loss(output.float(), targets))
        engine.step()
        trajectory.append(weights(engine))
    return trajectory


def first(folder: Path, rank: int, nvme: bool = False) -> None:
    for name, config, client in ways(folder):
        if nvme != name.endswith("nvme") and not (nvme and name == "3"):
            continue
        try:
            engine = start(config, client)
        except Exception as error:
            torch.save({"error": f"{type(error).__name__}: {error}"}, folder / f"{name}.{rank}.pt")
            continue
        if name == "3 ratio":  # no device here but the CPU: let one sub-group pass for another's
            engine.optimizer.subgroup_to_device[0] = "device"
        trajectory = train(engine, rank, range(SAVED_AT))
        if name == "3 nvme":
            # As a scheduler would: what a checkpoint must bring back is not what the JSON says.
            engine.optimizer.param_groups[1]["lr"] = 0.005
            engine.save_checkpoint(str(folder / "checkpoint"), tag="saved")
        trajectory += train(engine, rank, range(SAVED_AT, STEPS))
        optimizer = engine.optimizer.optimizer
        found = {
            "trajectory": trajectory,
            "optimizer": type(optimizer).__name__,
            "steps": {state["step"] for state in optimizer.state.values()},
            "states": sum(len(state) for state in optimizer.state.values()),
            "dtypes": {state["exp_avg"].dtype for state in optimizer.state.values()},
        }
        torch.save(found, folder / f"{name}.{rank}.pt")
        engine.destroy()


def resumed(folder: Path, rank: int) -> None:
    """Load in processes that have trained nothing yet."""
    config = configuration(3, offload_optimizer={"device": "nvme", "nvme_path": str(folder / "n")})
    engine = start(config, None)
    path, _ = engine.load_checkpoint(str(folder / "checkpoint"))
    assert path is not None
    found: dict[str, Any] = {"loaded": weights(engine)}
    found["trajectory"] = train(engine, rank, range(SAVED_AT, STEPS))
    engine.load_checkpoint(str(folder / "checkpoint"))  # into an engine that has trained
    found["options"] = [
        {key: value for key, value in group.items() if key != "params"}
        for group in engine.optimizer.optimizer.param_groups
    ]
    found["again"] = train(engine, rank, range(SAVED_AT, STEPS))
    fewer = folder / "fewer"
    if rank == 0:
        shutil.copytree(folder / "checkpoint", fewer)
        next(fewer.glob("saved/*rank_1*optim_states.pt")).unlink()
    torch.distributed.barrier()
    found["errors"] = []
    for source, flags in [(fewer, {}), (folder / "checkpoint", {"load_module_only": True})]:
        try:
            engine.load_checkpoint(str(source), tag="saved", **flags)
        except ValueError as error:
            found["errors"].append(str(error))
    torch.save(found, folder / f"resumed.{rank}.pt")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("part", choices=["first", "nvme", "resumed"])
    parser.add_argument("--local_rank", type=int)  # the deepspeed launcher adds it
    args = parser.parse_args()

    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    parts = {"first": first, "nvme": partial(first, nvme=True), "resumed": resumed}
    parts[args.part](args.folder, deepspeed.comm.get_rank())
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # see zero_stages_job


if __name__ == "__main__":
    main()
