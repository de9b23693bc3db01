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
from belief_dist.sharding.layout import Layout, ParamSpec, plan_layout

# What offload moves to the host.
_ON_HOST = ("masters", "exp_avg", "exp_avg_sq", "averages")
# Of the tensors that stand for a number of parameters: elements of one, and how many at most.
_PART, _MOST_PARTS = 1 << 24, 4096


class Way(NamedTuple):
    """A way to train.

    Attributes:
        name: In tables.
        dtype: Of the parameters.
        options: Of `ShardedAdaBelief`; None for another engine.
        per_param: Bytes a parameter of another engine, from the number of ranks.
    """

    name: str
    dtype: torch.dtype
    options: Mapping[str, Any] | None = None
    per_param: Any = None


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
# Parameters, gradients, masters and two states, as each engine's documentation has them.
OTHERS = (
    Way("DDP + AdamW, float32", torch.float32, per_param=lambda ranks: 16.0),
    Way("DeepSpeed ZeRO-1, bfloat16", _BF16, per_param=lambda ranks: 4.0 + 12.0 / ranks),
    Way("DeepSpeed ZeRO-2, bfloat16", _BF16, per_param=lambda ranks: 2.0 + 14.0 / ranks),
    Way("DeepSpeed ZeRO-3, bfloat16", _BF16, per_param=lambda ranks: 16.0 / ranks),
)


class Row(NamedTuple):
    """What a way to train takes.

    Attributes:
        way: The way.
        held: Bytes on the device of each rank.
        on_host: Bytes in the host's memory, for each rank.
        largest: How many parameters would fit on the device; 0 if its memory is not known.
    """

    way: Way
    held: int
    on_host: int
    largest: int


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
    held = dict.fromkeys(("parameters", "gradients", "masters", "exp_avg", "exp_avg_sq"), 0)
    codec = codec_for(options.reduce_dtype)
    for bucket in layout.buckets:
        dtype = getattr(torch, layout.params[bucket.slots[0].param].dtype)
        compute = compute_dtype(dtype)
        numel, own = bucket.numel, bucket.shard_numel
        is_low = dtype != compute
        held["parameters"] += numel * dtype.itemsize
        has_flat = options.keeps_full_gradients
        held["gradients"] += numel * dtype.itemsize if has_flat else 0
        fits = not is_low or (codec.wire_dtype(dtype) == dtype and options.max_grad_value is None)
        if not (has_flat and fits and ranks == 1):
            held["gradients"] += own * compute.itemsize
        if is_low and options.remainder_dtype is not None:
            held["masters"] += own * options.remainder_dtype.itemsize
        elif is_low or options.offload is not None:
            held["masters"] += own * compute.itemsize
        if is_low and options.offload is not None:
            held["masters"] += own * dtype.itemsize
        stored = compute if options.state_dtype == torch.float32 else options.state_dtype
        per_state = own * stored.itemsize + (own // BLOCK if stored == torch.uint8 else 0)
        held["exp_avg"] += per_state
        held["exp_avg_sq"] += per_state
        if options.keeps_averages:
            form = compute if options.ema_dtype == torch.float32 else options.ema_dtype
            held["averages"] = held.get("averages", 0) + own * form.itemsize
        if codec.keeps_error:
            held["wire errors"] = held.get("wire errors", 0) + numel * dtype.itemsize
    return held


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
        else:
            way = way._replace(options={**way.options, **(more or {})})
            options = options_from(way.options or {})
            layout = plan_for(specs_of_shapes(shapes, way.dtype), ranks, options)
            kinds = bytes_held(layout, ranks, options)
            if options.offload is not None:
                on_host = sum(kinds.get(name, 0) for name in _ON_HOST)
            held = sum(kinds.values()) - on_host
        largest = int(count * memory / held) if memory else 0
        rows.append(Row(way, held, on_host, largest))
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
