"""What a rank will hold, before anything is allocated: by the layout that the optimizer uses.

Counted are parameters, gradients, masters and states, which stay from step to step. Activations,
and at stage 2 two buckets of gradients that are under way, come on top.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from belief_dist.engine_options import EngineOptions
from belief_dist.operands import BLOCK
from belief_dist.rule import compute_dtype
from belief_dist.sharding.bucket import block_of
from belief_dist.sharding.grad_codec import codec_for
from belief_dist.sharding.host_share import buckets_on_host
from belief_dist.sharding.layout import Layout, ParamSpec, plan_layout

# Of the tensors that stand for a number of parameters: elements of one, and how many at most.
_PART, _MOST_PARTS = 1 << 24, 4096


class Way(NamedTuple):
    """A way to train.

    Attributes:
        name: In tables.
        dtype: Of the parameters.
        options: Of `ShardedAdaBelief`; None for another engine.
        per_param: Bytes a parameter of another engine, from the number of ranks.
        sent_per_param: Bytes that each rank of another engine sends in a step, for each parameter,
            if there were no other ranks to keep a part: times (ranks - 1) / ranks.
    """

    name: str
    dtype: torch.dtype
    options: Mapping[str, Any] | None = None
    per_param: Any = None
    sent_per_param: float = 0.0


_BF16 = torch.bfloat16
# From the fastest to the leanest; the first that fits is suggested.
WAYS = (
    Way("float32, ZeRO-1", torch.float32, {}),
    Way("float32, ZeRO-2", torch.float32, {"stage": 2}),
    Way("bfloat16, ZeRO-1", _BF16, {}),
    Way("bfloat16, ZeRO-2", _BF16, {"stage": 2}),
    Way("bfloat16, ZeRO-2, remainders", _BF16, {"stage": 2, "master": "remainder"}),
    Way(
        "bfloat16, ZeRO-2, remainders, 8 bits",
        _BF16,
        {"stage": 2, "master": "remainder", "state_dtype": "uint8"},
    ),
    Way(
        "bfloat16, ZeRO-2, 8-bit remainders, 8 bits",
        _BF16,
        {"stage": 2, "master": "remainder8", "state_dtype": "uint8"},
    ),
    Way(
        "bfloat16, ZeRO-2, states on the host",
        _BF16,
        {"stage": 2, "master": "remainder", "offload": "cpu"},
    ),
)
# Parameters, gradients, masters and two states, as each engine's documentation has them. DDP's
# all-reduce sends gradients twice; ZeRO-3 gathers parameters in forward and in backward.
OTHERS = (
    Way("DDP + AdamW, float32", torch.float32, None, lambda ranks: 16.0, 8.0),
    Way("DeepSpeed ZeRO-1, bfloat16", _BF16, None, lambda ranks: 4.0 + 12.0 / ranks, 4.0),
    Way("DeepSpeed ZeRO-2, bfloat16", _BF16, None, lambda ranks: 2.0 + 14.0 / ranks, 4.0),
    Way("DeepSpeed ZeRO-3, bfloat16", _BF16, None, lambda ranks: 16.0 / ranks, 6.0),
)


class Row(NamedTuple):
    """What a way to train takes.

    Attributes:
        way: The way.
        held: Bytes on the device of each rank.
        on_host: Bytes in the host's memory, for each rank.
        largest: How many parameters would fit on the device; 0 if its memory is not known.
        sent: Bytes that each rank sends in a step of one backward pass.
    """

    way: Way
    held: int
    on_host: int
    largest: int
    sent: int


def shapes_of_count(params: int) -> list[tuple[int, ...]]:
    """Return the shapes of tensors that stand for a number of parameters."""
    part = max(_PART, -(-params // _MOST_PARTS))
    return [(min(part, params - start),) for start in range(0, params, part)]


def shapes_of(target: str) -> list[tuple[int, ...]]:
    """Return the shapes of a model's parameters; nothing is allocated.

    Args:
        target: "module:function", whose call without arguments builds it, or the folder or name of
            a Hugging Face model, whose configuration does.

    Raises:
        ValueError: There is no such function, or no such configuration.
    """
    with torch.device("meta"):
        if ":" in target:
            module, _, name = target.partition(":")
            try:
                build = getattr(importlib.import_module(module), name)
            except (ImportError, AttributeError) as error:
                raise ValueError(f"{target!r} cannot be had: {error}.") from None
            model = build()
        else:
            try:
                from transformers import AutoConfig, AutoModelForCausalLM
            except ImportError:
                raise ValueError(
                    "a Hugging Face model needs transformers: pip install transformers."
                ) from None
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(target))
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"{target!r} gives {type(model).__name__}, and must give a module.")
    return [tuple(param.shape) for param in model.parameters()]


def specs_of_shapes(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[ParamSpec]:
    """Return the parameters of such shapes."""
    name = str(dtype).removeprefix("torch.")
    return [ParamSpec(f"p{n}", each, name, dtype.itemsize, 0) for n, each in enumerate(shapes)]


def options_from(given: Mapping[str, Any]) -> EngineOptions:
    """Return the engine's options, all others being the defaults."""
    defaults = EngineOptions()
    return EngineOptions.from_arguments({**vars(defaults), **given})


def plan_for(specs: Sequence[ParamSpec], ranks: int, options: EngineOptions) -> Layout:
    """Return the layout that `ShardedAdaBelief` makes of such parameters."""
    return plan_layout(specs, ranks, options.bucket_bytes, block=block_of(options))


def bytes_held(layout: Layout, ranks: int, options: EngineOptions) -> dict[str, int]:
    """Return what `ShardedAdaBelief.bytes_per_rank` will, before the first step.

    Args:
        layout: From `plan_for`.
        ranks: How many there are.
        options: Of the engine.
    """
    on_device, on_host = bytes_by_place(layout, ranks, options)
    return {kind: on_device[kind] + on_host[kind] for kind in on_device}


def bytes_by_place(
    layout: Layout, ranks: int, options: EngineOptions
) -> tuple[dict[str, int], dict[str, int]]:
    """Return what is held on the device, and in the host's memory; see `bytes_held`."""
    kinds = ["parameters", "gradients", "masters", "exp_avg", "exp_avg_sq"]
    codec = codec_for(options.reduce_dtype)
    kinds += ["averages"] * options.keeps_averages + ["wire errors"] * codec.keeps_error
    on_device, on_host = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0)
    amsgrad = [False] * (1 + max((spec.group for spec in layout.params), default=0))
    places = buckets_on_host(layout, options, amsgrad=amsgrad, kept={})
    for bucket, goes in zip(layout.buckets, places, strict=True):
        states = on_host if goes else on_device
        dtype = getattr(torch, layout.params[bucket.slots[0].param].dtype)
        compute = compute_dtype(dtype)
        numel, own = bucket.numel, bucket.shard_numel
        is_low = dtype != compute
        on_device["parameters"] += numel * dtype.itemsize
        has_flat = options.keeps_full_gradients
        on_device["gradients"] += numel * dtype.itemsize if has_flat else 0
        fits = not is_low or (codec.wire_dtype(dtype) == dtype and options.max_grad_value is None)
        if not (has_flat and fits and ranks == 1):
            on_device["gradients"] += own * compute.itemsize
        if is_low and options.remainder_dtype is not None:
            states["masters"] += own * options.remainder_dtype.itemsize
        elif is_low or goes:
            states["masters"] += own * compute.itemsize
        if is_low and goes:
            states["masters"] += own * dtype.itemsize
        stored = options.stored_dtype(compute)
        per_state = own * stored.itemsize + (own // BLOCK if stored == torch.uint8 else 0)
        states["exp_avg"] += per_state
        states["exp_avg_sq"] += per_state
        if options.keeps_averages:
            form = options.average_dtype(compute)
            states["averages"] += own * form.itemsize
        if codec.keeps_error:
            on_device["wire errors"] += numel * dtype.itemsize
    return on_device, on_host


def bytes_sent(layout: Layout, ranks: int, options: EngineOptions, *, reductions: int = 1) -> int:
    """Return what each rank sends in a step: gradients and parameters, without the small message.

    Args:
        layout: From `plan_for`.
        ranks: How many there are.
        options: Of the engine.
        reductions: How often gradients are reduced: once for each backward pass at stage 2, and for
            each round of micro-batches.
    """
    gradients, parameters = bytes_on_wire(layout, [ranks] * len(layout.buckets), options)
    return reductions * gradients + parameters


def bytes_on_wire(layout: Layout, ranks: Sequence[int], options: EngineOptions) -> tuple[int, int]:
    """Return what each rank sends of gradients, each time they are reduced, and of parameters.

    Args:
        layout: From `plan_for`, or of an optimizer.
        ranks: Of each bucket, how many share it and hold no copies of its shards.
        options: Of the engine.
    """
    codec = codec_for(options.reduce_dtype)
    gradients = parameters = 0
    for bucket, count in zip(layout.buckets, ranks, strict=True):
        dtype = getattr(torch, layout.params[bucket.slots[0].param].dtype)
        wire = codec.wire_numel(bucket.numel) * codec.wire_dtype(dtype).itemsize
        gradients += wire // count * (count - 1)
        parameters += bucket.numel * dtype.itemsize // count * (count - 1)
    return gradients, parameters


def plan(
    shapes: Sequence[tuple[int, ...]],
    ranks: int,
    memory: float | None,
    more: Mapping[str, Any] | None = None,
) -> list[Row]:
    """Return what each way to train takes of every rank.

    Args:
        shapes: Of the parameters.
        ranks: How many there are, >= 1.
        memory: Bytes of a device that parameters, gradients and states may take, or None.
        more: Options that all of our ways shall have.
    """
    count = sum(map(math.prod, shapes))
    rows = []
    for way in (*WAYS, *OTHERS):
        on_host = 0
        if way.options is None:
            held = int(way.per_param(ranks) * count)
            sent = int(way.sent_per_param * count * (ranks - 1) / ranks)
        else:
            way = way._replace(options={**way.options, **(more or {})})
            options = options_from(way.options or {})
            layout = plan_for(specs_of_shapes(shapes, way.dtype), ranks, options)
            places = bytes_by_place(layout, ranks, options)
            held, on_host = (sum(kinds.values()) for kinds in places)
            sent = bytes_sent(layout, ranks, options)
        largest = int(count * memory / held) if memory else 0
        rows.append(Row(way, held, on_host, largest, sent))
    return rows


def suggestion(rows: Sequence[Row], memory: float | None) -> Row | None:
    """Return the fastest of our ways that fits, or None."""
    ours = [row for row in rows if row.way.options is not None]
    return next((row for row in ours if memory is None or row.held <= memory), None)


def python_line(way: Way) -> str:
    """Return the call that trains in one of our ways."""
    given = "".join(f", {name}={value!r}" for name, value in (way.options or {}).items())
    model = ".to(torch.bfloat16)" if way.dtype == _BF16 else ""
    return f"ShardedAdaBelief(model{model}.named_parameters(), lr=1e-3{given})"
