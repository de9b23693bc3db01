"""What Hugging Face's Trainer and Accelerate make of an optimizer: how far a first step moves.

`clients_job.py FOLDER`, on every rank of a deepspeed launch, writes what happened in every case to
`FOLDER/clients.<rank>.json`. All train a tiny model whose gradients are far above eps.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LR = 0.01
BETAS = [0.5, 0.9]
EPS = 1e-30
OPTIONS = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": 0.0}
ADABELIEF = {"type": "AdaBelief", "params": OPTIONS}
# All that the Trainer replaces by its own arguments.
AUTO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "optimizer": {"type": "adabelief", "params": dict.fromkeys(OPTIONS, "auto")},
    "zero_optimization": {"stage": 2},
}


def deepspeed_config(optimizer: dict[str, Any] | None, stage: int = 2) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 1_000_000,
    }
    return config | ({"optimizer": optimizer} if optimizer else {})


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"x": torch.randn(5, generator=generator), "y": torch.randn(3, generator=generator)}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.mse_loss(self.linear(x), y)}


def forget_accelerator() -> None:
    """Let the next case configure Accelerate anew; it keeps one state per process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def trainer(config: dict[str, Any], check: bool = True, **given: Any) -> float:
    """Take one step by the Trainer; return how far each parameter has moved."""
    from accelerate import PartialState
    from transformers import Trainer, TrainingArguments

    from belief_dist.hf import VerifyCallback

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    arguments = TrainingArguments(
        output_dir=str(Path(sys.argv[1]) / "trainer"),
        deepspeed=config,
        accelerator_config={"use_configured_state": True},
        per_device_train_batch_size=4,
        max_steps=1,
        learning_rate=LR,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPS,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    assert arguments.world_size == 2
    model = Model()
    before = model.linear.weight.detach().clone()
    if "optimizers" in given:
        given["optimizers"] = given["optimizers"](model)
    callbacks = [VerifyCallback()] if check else []
    Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=callbacks, **given).train()
    return (model.linear.weight.detach() - before).abs().mean().item()


def trainer_alone() -> float:
    """Take one step by the Trainer without DeepSpeed, under DDP; see what it makes of the options.

    Its own weight_decay replaces the class's, its learning rate and eps do not.
    """
    from transformers import Trainer, TrainingArguments

    import belief_dist
    from belief_dist.hf import VerifyCallback

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"
    arguments = TrainingArguments(
        output_dir=str(Path(sys.argv[1]) / "trainer"),
        per_device_train_batch_size=4,
        max_steps=1,
        learning_rate=0.5,
        weight_decay=0.25,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    model = Model()
    weight = model.linear.weight
    before = weight.detach().clone()
    made = Trainer(
        model=model,
        args=arguments,
        train_dataset=Rows(),
        callbacks=[VerifyCallback()],
        optimizer_cls_and_kwargs=(belief_dist.AdaBelief, {**OPTIONS, "weight_decay": 0.125}),
    )
    made.train()
    running = belief_dist.verify(made)
    assert running.ranks == 2
    groups = running.optimizer.param_groups
    seen = [(g["lr"], list(g["betas"]), g["eps"], g["weight_decay"]) for g in groups]
    assert seen == [(LR, BETAS, EPS, 0.25), (LR, BETAS, EPS, 0.0)], seen
    decayed = before * (1 - LR * 0.25)
    return (weight.detach() - decayed).abs().mean().item()


def accelerate(config: dict[str, Any], make: Callable[[nn.Module], Any]) -> float:
    """Take one step by Accelerate; return how far each parameter has moved."""
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

    import belief_dist

    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )
    assert accelerator.num_processes == 2
    model = Model()
    before = model.linear.weight.detach().clone()
    loader = torch.utils.data.DataLoader(Rows(), batch_size=4)
    prepared, optimizer, loader = accelerator.prepare(model, make(model), loader)
    accelerator.print(belief_dist.verify(accelerator))
    belief_dist.verify(optimizer)
    accelerator.backward(prepared(**next(iter(loader)))["loss"])
    optimizer.step()
    return (model.linear.weight.detach() - before).abs().mean().item()


def accelerate_fsdp2(folder: Path) -> float:
    """Take one step by Accelerate's FSDP2 plugin, save, spoil and load it.

    Accelerate drops the plugin on CPUs, and trains under DDP; so its ranks are told to have GPUs,
    which then are the CPUs that they have.
    """
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.tensor import DTensor

    import belief_dist

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="no_wrap", state_dict_type="SHARDED_STATE_DICT"
    )
    dropped = Accelerator(cpu=True, fsdp_plugin=plugin)
    assert dropped.distributed_type == DistributedType.MULTI_CPU and not dropped.is_fsdp2
    forget_accelerator()
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    assert accelerator.is_fsdp2 and accelerator.num_processes == 2
    model = Model()
    before = model.linear.weight.detach().clone()
    groups = [
        {"params": [model.linear.weight], "weight_decay": 0.125},
        {"params": [model.linear.bias], "lr": LR / 2},
    ]
    given = belief_dist.AdaBelief(groups, **OPTIONS)
    loader = torch.utils.data.DataLoader(Rows(), batch_size=4)
    prepared, optimizer, loader = accelerator.prepare(model, given, loader)
    running = belief_dist.verify(accelerator)
    accelerator.print(running)
    assert type(running.optimizer) is belief_dist.AdaBelief and running.ranks == 2
    seen = [(g["lr"], g["betas"], g["eps"], g["weight_decay"]) for g in given.param_groups]
    assert seen == [(LR, BETAS, EPS, 0.125), (LR / 2, BETAS, EPS, 0.0)], seen
    weight = prepared.linear.weight
    assert given.param_groups[0]["params"][0] is weight and isinstance(weight, DTensor)

    accelerator.backward(prepared(**next(iter(loader)))["loss"])
    accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
    optimizer.step()
    moment = given.state[weight]["exp_avg"]
    kept = moment.full_tensor().clone()
    accelerator.save_state(str(folder / "fsdp2"))
    moment.zero_()
    accelerator.load_state(str(folder / "fsdp2"))
    assert torch.equal(given.state[weight]["exp_avg"].full_tensor(), kept) and kept.any()
    decayed = before * (1 - LR * 0.125)
    return (weight.full_tensor().detach() - decayed).abs().mean().item()


def plain(stage: int) -> float:
    """Hand AdaBelief's parameters to another optimizer; return how far that one has moved them."""
    import deepspeed

    import belief_dist

    model = Model()
    before = model.linear.weight.detach().clone()
    belief_dist.AdaBelief(model.parameters(), **OPTIONS)  # dropped, as the Trainer does
    adam = {"type": "Adam", "params": {"lr": LR, "torch_adam": True}}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config=deepspeed_config(adam, stage),
    )
    batch = torch.utils.data.default_collate([Rows()[0]])
    engine.backward(engine(**batch)["loss"])
    engine.step()
    with deepspeed.zero.GatheredParameters([model.linear.weight], enabled=stage == 3):
        moved = (model.linear.weight.detach() - before).abs().mean().item()
    try:
        belief_dist.verify(engine)
    except belief_dist.NotAdaBelief as error:
        print(error)
    return moved


def monitored(folder: Path) -> float:
    """Train three steps with every report of DeepSpeed on; write what they should have said."""
    import deepspeed

    reports = {
        "csv_monitor": {"enabled": True, "output_path": str(folder / "csv"), "job_name": "job"},
        "tensorboard": {"enabled": True, "output_path": str(folder / "tb"), "job_name": "job"},
        "wall_clock_breakdown": True,
        "flops_profiler": {
            "enabled": True,
            "profile_step": 1,
            "output_file": str(folder / "flops.txt"),
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0.0, "warmup_max_lr": LR, "warmup_num_steps": 2},
        },
        "steps_per_print": 1,
    }
    engine, *_ = deepspeed.initialize(
        model=(model := Model()),
        model_parameters=model.parameters(),
        config=deepspeed_config(ADABELIEF) | reports,
    )
    true: dict[str, list[float]] = {"lr": [], "loss": []}
    for step in range(3):
        rows = [Rows()[4 * step + row] for row in range(4)]
        loss = engine(**torch.utils.data.default_collate(rows))["loss"]
        engine.backward(loss)
        engine.step()
        true["loss"].append(loss.item())
        true["lr"].append(engine.optimizer.optimizer.param_groups[0]["lr"])
        # DeepSpeed itself writes learning rate and times; the loss is the script's to write.
        engine.monitor.write_events(
            [("Train/Samples/train_loss", loss.item(), engine.global_samples)]
        )
    if engine.global_rank == 0:
        (folder / "true.json").write_text(json.dumps(true))
    return 0.0


def cases() -> dict[str, Callable[[], float]]:
    from accelerate.utils import DummyOptim

    import belief_dist

    def ours(model: nn.Module) -> belief_dist.AdaBelief:
        return belief_dist.AdaBelief(model.parameters(), **OPTIONS)

    with_json, without = deepspeed_config(ADABELIEF), deepspeed_config(None)
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    return {
        "trainer json": lambda: trainer(with_json),
        "trainer auto": lambda: trainer(AUTO),
        "trainer json offload": lambda: trainer({**with_json, "zero_optimization": offload}),
        "trainer class": lambda: trainer(
            without, optimizer_cls_and_kwargs=(belief_dist.AdaBelief, OPTIONS)
        ),
        "trainer class alone": trainer_alone,
        "trainer object": lambda: trainer(without, optimizers=lambda m: (ours(m), None)),
        "trainer object unchecked": lambda: trainer(
            without, check=False, optimizers=lambda m: (ours(m), None)
        ),
        "accelerate json": lambda: accelerate(
            with_json, lambda m: DummyOptim(m.parameters(), lr=LR, weight_decay=0.0)
        ),
        "accelerate object": lambda: accelerate(
            {**without, "zero_allow_untested_optimizer": True}, ours
        ),
        "accelerate object offload": lambda: accelerate(
            {**without, "zero_optimization": offload, "zero_force_ds_cpu_optimizer": False}, ours
        ),
        "monitored": lambda: monitored(Path(sys.argv[1])),
        "adam 1": lambda: plain(1),
        "adam 2": lambda: plain(2),
        "adam 3": lambda: plain(3),
        "accelerate fsdp2": lambda: accelerate_fsdp2(Path(sys.argv[1])),
    }


class Heard(logging.Handler):
    """Collects belief_dist's warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.sentences: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.sentences.append(record.getMessage())


def main() -> None:
    folder = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    results = {}
    for name, case in cases().items():
        heard = Heard()
        logging.getLogger("belief_dist").addHandler(heard)
        try:
            result = {"moved": case()}
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        logging.getLogger("belief_dist").removeHandler(heard)
        results[name] = {**result, "warnings": heard.sentences}
        forget_accelerator()
    (folder / f"clients.{rank}.json").write_text(json.dumps(results, indent=1))
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # as zero_stages_job.py does, and why


if __name__ == "__main__":
    main()
