"""ZeRO-Offload with AdaBelief: lift DeepSpeed's restriction to its own DeepSpeedCPUAdam.

DeepSpeed checks for that class in three places, because most optimizers are slow on a CPU.
AdaBelief is not: its compiled kernel updates CPU tensors, pinned or not. A subclass of
DeepSpeedCPUAdam would pass all three checks but be wrong in one, as with `ratio` below 1 DeepSpeed
updates the rest by AdamW. So each check is wrapped on its own.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from belief_dist.deepspeed.wrapping import Wrapper, answer_once


def insists_on_its_own(optimizer_cls: type[Optimizer], original: Wrapper, engine: Any) -> Any:
    """Return whether the engine refuses a client optimizer together with an offload block.

    By default it does; for AdaBelief only if the JSON says `"zero_force_ds_cpu_optimizer": true`.
    """
    # An optimizer that comes from a callable is not yet an attribute of the engine, only a local
    # variable of the calling method: frame 2, as frame 1 is the wrapper installed by wrap_method.
    caller = sys._getframe(2).f_locals
    written = "zero_force_ds_cpu_optimizer" in engine._config._param_dict
    if isinstance(caller.get("basic_optimizer"), optimizer_cls) and not written:
        return False
    return original(engine)


def configure_master_weights(
    optimizer_cls: type[Optimizer], original: Wrapper, zero: Any, **settings: Any
) -> Any:
    """Accept 16-bit masters (`bf16_master_weights_and_grads`) of offloaded AdaBelief."""
    if not isinstance(zero.optimizer, optimizer_cls):
        return original(zero, **settings)
    kind = optimizer_cls.__name__
    if settings.get("bf16_optimizer_states"):
        raise ValueError(
            f"bf16_optimizer_states is not for {kind}: its second moment, rounded to bfloat16, "
            f"would stop shrinking. Remove it; the states are float32, on the host with "
            f"offload_optimizer."
        )

    def check() -> None:
        if not (getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False)):
            raise ValueError(
                f"16-bit master weights of {kind} need offload_optimizer with device cpu: add it, "
                f"or remove bf16_master_weights_and_grads and fp16_master_weights_and_grads."
            )
        if getattr(zero, "swap_optimizer", False):
            raise ValueError(
                "offload_optimizer with device nvme swaps masters and states in one dtype: with "
                "16-bit master weights use device cpu."
            )

    # DeepSpeed's validators, one for each dtype, require DeepSpeedCPUAdam.
    validators = {name: check for name in settings if name.endswith("_offload_validator")}
    return original(zero, **{**settings, **validators})


def construct_stage12(
    optimizer_cls: type[Optimizer],
    original: Wrapper,
    zero: Any,
    optimizer: Any,
    *args: Any,
    **settings: Any,
) -> None:
    """Refuse elastic_checkpoint before training, as its checkpoints cannot be loaded again."""
    if isinstance(optimizer, optimizer_cls) and settings.get("elastic_checkpoint"):
        raise ValueError(
            "elastic_checkpoint saves no hyperparameters, and DeepSpeed cannot load it at another "
            "number of ranks: remove it from the JSON and use a universal checkpoint (python -m "
            "deepspeed.checkpoint.ds_to_universal)."
        )
    original(zero, optimizer, *args, **settings)


def construct_stage3(
    optimizer_cls: type[Optimizer],
    original: Wrapper,
    zero: Any,
    module: Any,
    optimizer: Any,
    *args: Any,
    **settings: Any,
) -> None:
    """Support ZeRO-Offload++: `ratio` of the sub-groups on the host, the others on the device.

    For the others DeepSpeed builds a second optimizer, torch's AdamW, whose states no checkpoint
    holds. AdaBelief updates tensors on any device, so it takes both roles.
    """
    ratio = settings.get("offload_ratio", 1.0)
    if isinstance(optimizer, optimizer_cls) and ratio != 1.0:
        zero.backup_optimizer = optimizer
        create = zero._create_fp32_partitions

        def create_by_ratio() -> None:
            zero.partial_offload = ratio
            create()

        # The constructor builds AdamW if it sees the ratio, so it sees 1.0; the ratio is set when
        # the partitions are created, where it decides which of them stay on the device.
        answer_once(zero, "_create_fp32_partitions", create_by_ratio)
        settings["offload_ratio"] = 1.0
    original(zero, module, optimizer, *args, **settings)


def align_gradients(
    optimizer_cls: type[Optimizer],
    original: Wrapper,
    swapper: Any,
    tensors: list[Tensor],
    offsets: list[int],
) -> tuple[list[Tensor], list[int]]:
    """Keep the elements of a gradient before its first aligned one in memory, not on NVMe.

    Where several parameters share a sub-group, a gradient may begin at any offset, and is read back
    to that offset. Files are read with direct I/O, which needs addresses that are multiples of 512
    bytes; with any other address nothing is read, DeepSpeed does not notice, and trains with stale
    contents of its buffer. DeepSpeed splits off an unaligned end, but not an unaligned beginning.

    Args:
        optimizer_cls: AdaBelief.
        original: Returns both lists, with the unaligned ends split off.
        swapper: An `OptimizerSwapper`.
        tensors: 1-D gradients.
        offsets: Offset of each gradient in its sub-group, in elements.
    """
    if isinstance(swapper.optimizer, optimizer_cls):
        parts = []
        for tensor, offset in zip(tensors, offsets, strict=True):
            head = -offset % swapper.numel_alignment if swapper.is_swappable_tensor(tensor) else 0
            if head:
                parts.append((tensor[:head], offset))
            parts.append((tensor[head:], offset + head))
        tensors, offsets = [t for t, _ in parts], [o for _, o in parts]
    split: tuple[list[Tensor], list[int]] = original(swapper, tensors=tensors, offsets=offsets)
    return split
