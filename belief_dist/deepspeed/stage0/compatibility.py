"""What a DeepSpeed engine must not be set up for when ShardedAdaBelief does its work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from belief_dist.sharded import ShardedAdaBelief

# What this folder uses of it beside the documented interface.
_NEEDED = (
    "allreduce_gradients",
    "clip_fp32_gradients",
    "client_optimizer",
    "inside_no_sync_ctxt",
    "seq_data_parallel_group",
    "torch_autocast_z0_gradscaler",
)


def check_engine(engine: Any, optimizer: ShardedAdaBelief) -> None:
    """Refuse what does not go together with `optimizer`, with one sentence.

    Raises:
        ValueError: Something in the config or model of `engine`.
        RuntimeError: This version of DeepSpeed has not what is needed.
    """
    missing = [name for name in _NEEDED if not hasattr(engine, name)]
    if missing:
        raise RuntimeError(
            f"ShardedAdaBelief does not know the engine of DeepSpeed {deepspeed.__version__}, "
            f"which has no {', '.join(missing)}; use DeepSpeed 0.19.8 or newer, or "
            f'"type": "AdaBelief" at any ZeRO stage.'
        )
    for sentence in _problems(engine, optimizer):
        raise ValueError(f"ShardedAdaBelief {sentence}")


def max_grad_norm_of(engine: Any, optimizer: ShardedAdaBelief) -> float | None:
    """Return what to clip at: the engine's `gradient_clipping`, or None where that is 0.

    Raises:
        ValueError: The optimizer was built with another one.
    """
    clipping = float(engine.gradient_clipping())
    own = optimizer.options.max_grad_norm
    if own is not None and own != clipping:
        raise ValueError(
            f"ShardedAdaBelief was built with max_grad_norm={own}, and the engine clips at "
            f"gradient_clipping={clipping} (1.0 where the config has none); write "
            f'"gradient_clipping": {own} into the config, or leave max_grad_norm out.'
        )
    return clipping or None


def _problems(engine: Any, optimizer: ShardedAdaBelief) -> Iterator[str]:
    """Yield a sentence for each thing that is wrong; what else is wrong follows from the first."""
    config = engine._config
    zero = config.zero_config
    if engine.pipeline_parallelism:
        yield (
            "cannot serve DeepSpeed's pipeline engine, which keeps another part of the model on "
            'each stage; use "type": "AdaBelief" there.'
        )
    if type(engine) is not DeepSpeedEngine:
        yield (
            f"serves DeepSpeedEngine itself, and this is a {type(engine).__name__}; use "
            f'"type": "AdaBelief" there.'
        )
    stage = int(engine.zero_optimization_stage())
    if stage != 0:
        how = ' and "stage": 2 in the params of ShardedAdaBelief' if stage == 2 else ""
        yield (
            f'shards by itself, and so would ZeRO stage {stage}: use "type": "AdaBelief" with that '
            f'stage, or "zero_optimization": {{"stage": 0}}{how}.'
        )
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if any(hasattr(param, "ds_id") for param in engine.module.parameters()):
        yield (
            "needs whole parameters, and the model was built inside deepspeed.zero.Init, which "
            "partitions them; build it outside."
        )
    if engine.has_moe_layers:
        yield (
            "cannot serve DeepSpeed's MoE layers, whose experts differ from rank to rank; use "
            '"type": "AdaBelief".'
        )
    if engine.autotp_size() > 1 or engine.mp_world_size > 1:
        yield (
            "cannot serve DeepSpeed's tensor parallelism (AutoTP, mpu), whose layers are no "
            "DTensors; use torch's parallelize_module without DeepSpeed, or "
            '"type": "AdaBelief".'
        )
    if engine.sequence_parallel_size > 1:
        yield (
            "cannot serve DeepSpeed's sequence parallelism, which scales gradients in the "
            'engine\'s own reduction; use "type": "AdaBelief".'
        )
    ranks = torch.distributed.get_world_size(engine.seq_data_parallel_group)
    if ranks != optimizer.comm.world_size:
        yield (
            f"was built for {optimizer.comm.world_size} ranks, and the engine is data-parallel "
            f"over {ranks}; leave process_group out."
        )
    for block, instead in (
        ("offload_optimizer", '"offload": "cpu" in its params'),
        ("offload_param", 'ZeRO stage 3 and "type": "AdaBelief"'),
        ("zenflow", '"offload": "cpu" in its params'),
    ):
        if getattr(zero, block, None) is not None:
            yield f'takes no "{block}" block, which stage 0 would ignore; use {instead}.'
    if config.communication_data_type is not None:
        yield (
            "sends gradients itself and takes no communication_data_type; use "
            '"reduce_dtype": "bfloat16" (or "float32", "int8") in its params.'
        )
    if config.prescale_gradients or config.gradient_predivide_factor != 1.0:
        yield (
            "sums gradients in float32 and divides once, so that prescale_gradients and "
            "gradient_predivide_factor have no meaning; leave them out."
        )
    if not engine.gradient_average:
        yield (
            'averages gradients over the ranks and takes no "gradient_allreduce_op": "sum"; '
            "multiply the loss by the number of ranks."
        )
    if optimizer.options.micro_batches is not None:
        yield (
            "with micro_batches does not go together with an engine that divides every loss by "
            "gradient_accumulation_steps, and so rounds gradients in another way at another number "
            "of ranks; leave micro_batches out, or train without DeepSpeed."
        )
    if engine.is_deepcompile_enabled():
        yield (
            "reduces gradients in hooks, which DeepCompile's graphs leave out; leave "
            '"compile": {"deepcompile": true} out.'
        )
    model_dtype, sum_dtype = engine.get_data_types()
    if model_dtype != sum_dtype and optimizer.options.stage != 2:
        yield (
            f"adds micro-batches up in the parameters' dtype at its stage 1, and "
            f"data_types.grad_accum_dtype asks for {sum_dtype}; use "
            f'"stage": 2 in its params, which adds them up in float32, or leave it out.'
        )
    if engine.load_universal_checkpoint():
        yield (
            "cannot load universal checkpoints in the engine; convert one by `belief-dist "
            "checkpoint convert`, and load it by belief_dist.checkpoint.load."
        )
    if engine.use_node_local_storage():
        yield (
            "writes one checkpoint of all ranks into a folder that all must see; leave "
            "checkpoint.use_node_local_storage out."
        )
    steps = max((state["step"] for state in optimizer.state.values()), default=0)
    if engine.client_optimizer is optimizer and steps > 0:
        yield (
            f"has made {steps} steps already, and its shards begin anew in the engine, which casts "
            f"and broadcasts the model; build a new one, and load a checkpoint afterwards."
        )
    own = {id(param) for param in engine.module.parameters()}
    strangers = [tuple(param.shape) for param in params if id(param) not in own]
    if strangers:
        yield (
            f"has {len(strangers)} parameters that are not the engine's model's, the first of "
            f"shape {strangers[0]}; build it from the parameters of this model."
        )
