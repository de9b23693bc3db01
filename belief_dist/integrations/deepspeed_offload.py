"""ZeRO-Offload with AdaBelief: lifts what DeepSpeed keeps for its own DeepSpeedCPUAdam.

DeepSpeed asks for that very class in three places, since most optimizers are slow on a CPU.
AdaBelief is not: its compiled kernel updates CPU tensors, pinned or not. Posing as a
DeepSpeedCPUAdam would pass all three, and be wrong in one: with `ratio` below 1 DeepSpeed updates
the rest by AdamW. So each place is answered for itself.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from torch.optim import Optimizer

from belief_dist.integrations.extension import Around, answer_once, extend_method


def extend_offload(served: type[Optimizer]) -> None:
    """Let DeepSpeed, which must be loaded, offload optimizers of the class `served`."""
    from deepspeed.runtime.base_optimizer import ZeROOptimizer
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    extend_method(
        DeepSpeedEngine, "zero_force_ds_cpu_optimizer", partial(_insists_on_its_own, served)
    )
    extend_method(
        ZeROOptimizer, "_configure_master_weights", partial(_configure_master_weights, served)
    )
    extend_method(DeepSpeedZeroOptimizer, "__init__", partial(_construct_stage12, served))
    extend_method(DeepSpeedZeroOptimizer_Stage3, "__init__", partial(_construct_stage3, served))


def _insists_on_its_own(served: type[Optimizer], original: Around, engine: Any) -> Any:
    """Answer whether the engine refuses a client's optimizer beside an offload block.

    It does so by default; whoever writes `"zero_force_ds_cpu_optimizer": true` still gets it. The
    optimizer may come from a callable, and then nobody has it yet but the function that asks.
    """
    asker = sys._getframe(2).f_locals  # beyond the wrapper that stands in for the method
    written = "zero_force_ds_cpu_optimizer" in engine._config._param_dict
    if isinstance(asker.get("basic_optimizer"), served) and not written:
        return False
    return original(engine)


def _configure_master_weights(
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
        if not settings.get("offload_enabled"):
            raise ValueError(
                f"16-bit master weights of {kind} need offload_optimizer with device cpu: add it, "
                f"or remove bf16_master_weights_and_grads and fp16_master_weights_and_grads."
            )
        if getattr(zero, "swap_optimizer", False):
            raise ValueError(
                "offload_optimizer with device nvme swaps masters and states in one dtype: with "
                "16-bit master weights use device cpu."
            )

    validators = {"fp16_offload_validator": check, "bf16_offload_validator": check}
    return original(zero, **{**settings, **validators})


def _construct_stage12(
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


def _construct_stage3(
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
