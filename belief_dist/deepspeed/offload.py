"""ZeRO-Offload with AdaBelief: lifts what DeepSpeed keeps for its own DeepSpeedCPUAdam.

DeepSpeed asks for that very class in three places, since most optimizers are slow on a CPU.
AdaBelief is not: its compiled kernel updates CPU tensors, pinned or not. Posing as a
DeepSpeedCPUAdam would pass all three, and be wrong in one: with `ratio` below 1 DeepSpeed updates
the rest by AdamW. So each place is answered for itself.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from belief_dist.deepspeed.patching import Around, answer_once


def insists_on_its_own(served: type[Optimizer], original: Around, engine: Any) -> Any:
    """Answer whether the engine refuses a client's optimizer beside an offload block.

    It does so by default; whoever writes `"zero_force_ds_cpu_optimizer": true` still gets it. The
    optimizer may come from a callable, and then nobody has it yet but the function that asks.
    """
    asker = sys._getframe(2).f_locals  # beyond the wrapper that stands in for the method
    written = "zero_force_ds_cpu_optimizer" in engine._config._param_dict
    if isinstance(asker.get("basic_optimizer"), served) and not written:
        return False
    return original(engine)


def configure_master_weights(
    served: type[Optimizer], original: Around, zero: Any, **settings: Any
) -> Any:
    """Accept 16-bit masters (`bf16_master_weights_and_grads`) of offloaded AdaBelief."""
    if not isinstance(zero.optimizer, served):
        return original(zero, **settings)
    kind = served.__name__
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

    # DeepSpeed's own, one for each dtype, insist on DeepSpeedCPUAdam.
    validators = {name: check for name in settings if name.endswith("_offload_validator")}
    return original(zero, **{**settings, **validators})


def construct_stage12(
    served: type[Optimizer],
    original: Around,
    zero: Any,
    optimizer: Any,
    *args: Any,
    **settings: Any,
) -> None:
    """Refuse, before anything is trained, to write checkpoints that nobody can load."""
    if isinstance(optimizer, served) and settings.get("elastic_checkpoint"):
        raise ValueError(
            "elastic_checkpoint saves no hyperparameters, and DeepSpeed cannot load it at another "
            "number of ranks: remove it from the JSON and use a universal checkpoint (python -m "
            "deepspeed.checkpoint.ds_to_universal)."
        )
    original(zero, optimizer, *args, **settings)


def construct_stage3(
    served: type[Optimizer],
    original: Around,
    zero: Any,
    module: Any,
    optimizer: Any,
    *args: Any,
    **settings: Any,
) -> None:
    """Serve ZeRO-Offload++: `ratio` of the sub-groups on the host, the others on the device.

    DeepSpeed gives the others an optimizer of their own, torch's AdamW, whose states are in no
    checkpoint. AdaBelief updates tensors wherever they are, so that one does both.
    """
    ratio = settings.get("offload_ratio", 1.0)
    if isinstance(optimizer, served) and ratio != 1.0:
        zero.backup_optimizer = optimizer
        cut = zero._create_fp32_partitions

        def cut_by_ratio() -> None:
            zero.partial_offload = ratio
            cut()

        answer_once(zero, "_create_fp32_partitions", cut_by_ratio)
        settings["offload_ratio"] = 1.0
    original(zero, module, optimizer, *args, **settings)


def align_gradients(
    served: type[Optimizer],
    original: Around,
    swapper: Any,
    tensors: list[Tensor],
    offsets: list[int],
) -> tuple[list[Tensor], list[int]]:
    """Keep in memory what lies before the first aligned element of a gradient that goes to NVMe.

    Where several parameters share a sub-group, a gradient begins anywhere in it, and is read back
    to that place. Files are read around the system's cache, to addresses that are multiples of 512
    bytes only; to others nothing is read, DeepSpeed does not notice, and trains by what has been in
    its buffer. It splits off an unaligned end itself, and not an unaligned beginning.

    Args:
        served: AdaBelief.
        original: Returns both lists, with the ends split off.
        swapper: An `OptimizerSwapper`.
        tensors: Gradients, flat.
        offsets: Where each begins in its sub-group, in elements.
    """
    if isinstance(swapper.optimizer, served):
        pieces = []
        for tensor, offset in zip(tensors, offsets, strict=True):
            head = -offset % swapper.numel_alignment if swapper.is_swappable_tensor(tensor) else 0
            if head:
                pieces.append((tensor[:head], offset))
            pieces.append((tensor[head:], offset + head))
        tensors, offsets = [t for t, _ in pieces], [o for _, o in pieces]
    split: tuple[list[Tensor], list[int]] = original(swapper, tensors=tensors, offsets=offsets)
    return split
