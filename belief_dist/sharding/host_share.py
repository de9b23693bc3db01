"""Which buckets keep their masters and states in the host's memory: pure arithmetic.

`offload` may ask for a part of them. Whole buckets go, in the order in which backward fills them:
their parameters are those that the next forward needs last, so that the update on the host has the
longest time, beside that of the device and the first layers. A larger part is that of a smaller one
and more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from belief_dist.engine_options import EngineOptions
from belief_dist.operands import BLOCK
from belief_dist.rule import compute_dtype
from belief_dist.sharding.layout import Bucket, Layout


def bytes_beside(bucket: Bucket, options: EngineOptions, *, amsgrad: bool = False) -> int:
    """Return the bytes that a bucket's shard has on the device beside its parameters.

    They are those of masters, states and averages, and what leaves the device with them.

    Args:
        bucket: Of the layout.
        options: In which form they are.
        amsgrad: The largest s is kept too.
    """
    dtype: torch.dtype = getattr(torch, bucket.dtype)
    compute = compute_dtype(dtype)
    stored = options.stored_dtype(compute)
    own, states = bucket.shard_numel, 3 if amsgrad else 2
    held = states * own * stored.itemsize
    if stored == torch.uint8:
        held += states * own // BLOCK
    if dtype != compute:
        held += own * (options.remainder_dtype or compute).itemsize
    if options.keeps_averages:
        form = options.average_dtype(compute)
        held += own * form.itemsize
    return held


def choose_on_host(
    sizes: Sequence[int],
    offload: str | float | None,
    *,
    sets: Sequence[int],
    kept: Sequence[bool | None],
) -> list[bool]:
    """Return which buckets are on the host.

    Args:
        sizes: What would leave the device with each bucket, in bytes, from `bytes_beside`.
        offload: None, "cpu", at least this fraction (float), or at least so many bytes (int) of all
            buckets together; all that there is, if that is less.
        sets: Which ranks share each bucket. Those of one set are chosen by its own buckets alone,
            by the same fraction, as some of its ranks may have other buckets beside them.
        kept: Of buckets that were there before, where they are; they stay. None of new ones.
    """
    if offload is None or offload == "cpu":
        return [offload == "cpu" if known is None else known for known in kept]
    assert not isinstance(offload, str)
    total = sum(sizes)
    part = offload if isinstance(offload, float) else min(1.0, offload / total if total else 1.0)
    missing = dict.fromkeys(sets, 0.0)
    for number, size, known in zip(sets, sizes, kept, strict=True):
        missing[number] += part * size - (size if known else 0)
    found = []
    for number, size, known in zip(sets, sizes, kept, strict=True):
        goes = known is True or (known is None and missing[number] > 0)
        if goes and known is None:
            missing[number] -= size
        found.append(goes)
    return found


def buckets_on_host(
    layout: Layout,
    options: EngineOptions,
    *,
    amsgrad: Sequence[bool],
    kept: Mapping[Bucket, bool],
) -> list[bool]:
    """Return which buckets of a layout are on the host.

    Args:
        layout: Of all parameters.
        options: With `offload`.
        amsgrad: Of each param group.
        kept: See `choose_on_host`.
    """
    return choose_on_host(
        [bytes_beside(each, options, amsgrad=amsgrad[each.group]) for each in layout.buckets],
        options.offload,
        sets=[each.ranks for each in layout.buckets],
        kept=[kept.get(each) for each in layout.buckets],
    )


def check_parts(offload: str | float, *, is_pipeline: bool) -> None:
    """Refuse bytes where ranks that share a bucket have other buckets beside it.

    Raises:
        ValueError: They would choose others to leave the device, and wait for each other.
    """
    if isinstance(offload, int) and is_pipeline:
        raise ValueError(
            f"offload={offload} bytes are another part of the states on every stage of a pipeline, "
            f"and stages that share weights would disagree; give a fraction, such as offload=0.5."
        )
