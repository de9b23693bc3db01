"""Find out which optimizer actually trains under a framework that was asked for AdaBelief."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from belief_dist import kernels
from belief_dist.optimizer import AdaBelief
from belief_dist.sharded import ShardedAdaBelief
from belief_dist.sharding.module_buffers import modules_around
from belief_dist.sharding.outer_reducers import fault_of

_JSON = '"optimizer": {"type": "AdaBelief", "params": {...}} in the DeepSpeed JSON'


class NotAdaBelief(RuntimeError):
    """An optimizer other than AdaBelief trains, or none was found."""


@dataclass(frozen=True)
class Running:
    """The optimizer that actually steps; as a string, a one-line description.

    Attributes:
        optimizer: AdaBelief or ShardedAdaBelief.
        wrappers: Class names of its wrappers, outermost first, such as "DeepSpeedEngine".
        ranks: World size.
        backend: Backend of its update: "cpp", "triton", "foreach" or "eager".
        reason: Why parameters on a GPU are updated in plain torch; empty if they are not.
    """

    optimizer: AdaBelief | ShardedAdaBelief
    wrappers: tuple[str, ...]
    ranks: int
    backend: str
    reason: str = ""

    def __str__(self) -> str:
        """Return the line."""
        under = f" under {' > '.join(self.wrappers)}" if self.wrappers else ""
        group = self.optimizer.param_groups[0]
        lr, planned = float(group["lr"]), float(group.get("initial_lr", group["lr"]))
        schedule = "" if lr == planned else f" (of {planned:g}, by a schedule)"
        return (
            f"{type(self.optimizer).__name__} runs{under} on {self.ranks} "
            f"{'rank' if self.ranks == 1 else 'ranks'} with the {self.backend} kernel, "
            f"lr {lr:g}{schedule}, eps {group['eps']:g}, {self._momenta_and_decay()}"
            + (f"; plain torch updates the GPU because {self.reason}" if self.reason else "")
        )

    def _momenta_and_decay(self) -> str:
        """Return betas and weight decay, each value that any group has, in the groups' order."""
        groups = self.optimizer.param_groups
        betas = dict.fromkeys(f"({', '.join(f'{b:g}' for b in each['betas'])})" for each in groups)
        decays = dict.fromkeys(f"{float(each['weight_decay']):g}" for each in groups)
        return f"betas {' and '.join(betas)}, weight decay {' and '.join(decays)}"


def verify(training: Any) -> Running:
    """Return which optimizer actually trains; raise if it is not one of belief_dist's.

    Does not communicate, so a single rank may call it; frameworks choose the same on all ranks.

    Args:
        training: A DeepSpeed engine, an Accelerator after `prepare`, a Trainer of Hugging Face
            (once training has begun) or of Lightning, or an optimizer in any of their wrappers.

    Returns:
        Optimizer, wrappers, ranks and kernel; printing it gives one line.

    Raises:
        NotAdaBelief: Another optimizer runs; the message names it, the cause if known, and what to
            do. Or gradients of a ShardedAdaBelief would be reduced a second time.
    """
    chain = _chain(training)
    optimizer = chain[-1]
    if not isinstance(optimizer, (AdaBelief, ShardedAdaBelief)):
        raise NotAdaBelief(_explain(optimizer, chain))
    if isinstance(optimizer, ShardedAdaBelief):
        _refuse_outer_reducer(optimizer)
    device, backend = _backend(optimizer)
    return Running(
        optimizer=optimizer,
        wrappers=tuple(map(_label, chain[:-1])),
        ranks=dist.get_world_size() if dist.is_initialized() else 1,
        backend=backend,
        reason=_reason(optimizer, device) if backend in ("foreach", "eager") else "",
    )


def _refuse_outer_reducer(optimizer: ShardedAdaBelief) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for module in modules_around(params):
        fault = fault_of(module)
        if fault is not None:
            raise NotAdaBelief(
                f"{fault}: its first forward will be refused. Keep the model out of "
                f"accelerator.prepare() or Lightning's DDP strategy, or use belief_dist.AdaBelief "
                f"with {type(module).__name__}."
            )


def _chain(training: Any) -> list[Any]:
    """Return `training` and the objects it wraps, down to one without an inner optimizer."""
    chain = [training]
    while not isinstance(chain[-1], (AdaBelief, ShardedAdaBelief)):
        inner = _inside(chain[-1])
        if inner is None or any(inner is outer for outer in chain):
            break
        chain.append(inner)
    return chain


def _inside(outer: Any) -> Any:
    """Return the optimizer or engine that a framework's object wraps, or None."""
    # Trainer, engine and all wrappers call it "optimizer"; Accelerate and Lightning have lists.
    for name in ("optimizer", "_optimizers", "optimizers"):
        inner = getattr(outer, name, None)
        if isinstance(inner, (list, tuple)):
            inner = inner[0] if len(inner) == 1 else None
        if inner is not None:
            return inner
    return None


def _label(wrapper: Any) -> str:
    name = type(wrapper).__name__
    if name == "DeepSpeedZeroOptimizer":
        return f"{name} (ZeRO-{2 if wrapper.partition_gradients else 1})"
    return name


def _backend(optimizer: AdaBelief | ShardedAdaBelief) -> tuple[torch.device, str]:
    """Return where the parameters lie and what updates them."""
    # ZeRO-3 leaves groups without parameters between steps, and all of them before the first.
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if not params:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return device, kernels.serving(device)
    param = params[0]
    device = param.device
    if isinstance(optimizer, ShardedAdaBelief):
        return device, kernels.serving(device)
    if kernels.prefers_foreach(param, optimizer._foreach, optimizer._fused):
        return device, "foreach"
    return device, "eager" if optimizer._fused is False else kernels.serving(device)


def _reason(optimizer: AdaBelief | ShardedAdaBelief, device: torch.device) -> str:
    if device.type == "cpu":
        return ""
    if isinstance(optimizer, AdaBelief) and optimizer._foreach:
        return "foreach=True asks for it"
    if isinstance(optimizer, AdaBelief) and optimizer._fused is False:
        return "fused=False asks for it"
    return kernels.why_plain(device)


def _explain(found: Any, chain: list[Any]) -> str:
    """Return a sentence that says what runs, why, and what to do."""
    name = type(found).__name__
    if name in ("DummyOptim", "DummyScheduler"):
        return (
            f"{name} is Accelerate's placeholder and trains nothing: "
            "verify what accelerator.prepare() returned."
        )
    if not isinstance(found, Optimizer):
        return (
            f"{name} holds no single optimizer that belief_dist.verify() could find: pass the "
            "engine, the Accelerator after prepare(), a Trainer whose training has begun, or the "
            "optimizer itself."
        )
    asked = _named_in_config(chain)
    if asked is not None:
        return (
            f"{name} runs instead of AdaBelief because the DeepSpeed configuration names "
            f'"{asked}" as its optimizer: write {_JSON}.'
        )
    if name == "DeepSpeedCPUAdam":
        return (
            "DeepSpeedCPUAdam runs instead of AdaBelief because Accelerate and the Hugging Face "
            "Trainer put it in the place of every optimizer that the script passes while "
            f'offload_optimizer is on: write {_JSON}, or set "zero_force_ds_cpu_optimizer": false '
            "there."
        )
    if any("DeepSpeed" in type(outer).__name__ for outer in chain):
        return (
            f"{name} runs instead of AdaBelief because that is what DeepSpeed was given; the "
            "Hugging Face Trainer with deepspeed= drops optimizers=(optimizer, None) and builds "
            f"what optim= says: write {_JSON}, or pass "
            "optimizer_cls_and_kwargs=(AdaBelief, {...})."
        )
    if name == AdaBelief.__name__:
        name = f"{type(found).__module__}.{name}"  # timm and others have one of that name, too
    return f"{name} runs instead of AdaBelief: pass belief_dist.AdaBelief where it was built."


def _named_in_config(chain: list[Any]) -> str | None:
    """Return the name of the optimizer in the engine's JSON, or None without engine or name."""
    for outer in chain:
        config = getattr(outer, "_config", None)
        name = getattr(config, "optimizer_name", None)
        if name is not None and type(outer).__name__ == "DeepSpeedEngine":
            return str(name)
    return None
