"""Where every element of every parameter lies: pure arithmetic on integers.

Parameters are cut into *buckets*, the units of communication. A bucket holds whole parameters of
one dtype and one kind, of any param groups, in reverse registration order, because backward
produces gradients roughly in that order. Rank r owns piece r of every bucket, its *shard*: elements
``[r * shard_numel, (r + 1) * shard_numel)``, wherever parameters happen to begin or end.

Parameters may have ranks of their own, as experts do that only some ranks hold; their buckets are
cut into as many pieces as there are of these.

Two alignments hold: every parameter starts at a multiple of 16 bytes inside its bucket, and every
shard is a multiple of 128 bytes (times the number of ranks that keep a copy of it), or of larger
blocks. What this adds is *padding*; it holds zeros and belongs to no parameter.

All ranges are half-open and in elements.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

PARAM_ALIGN_BYTES = 16
SHARD_ALIGN_BYTES = 128


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """What the layout knows of a parameter."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # for example "float32"
    itemsize: int  # bytes per element
    group: int  # index of its param group
    kind: str = ""  # parameters of different kinds never share a bucket
    ranks: int = field(default=0, repr=False)  # 0 of the optimizer, else number of its own

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def unnamed(self) -> ParamSpec:
        """The same without a name."""
        return replace(self, name="")


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one parameter in its bucket: elements [start, stop)."""

    param: int  # index into Layout.params
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """Parameters that are communicated together."""

    group: int  # that of its last parameter, in the order of registration
    dtype: str
    itemsize: int
    slots: tuple[Slot, ...]
    numel: int  # with padding: shard_numel times the number of shards
    shard_numel: int
    ranks: int = field(default=0, repr=False)  # that of its parameters

    def shard_range(self, shard_index: int) -> tuple[int, int]:
        """Return [start, stop) of a shard."""
        return shard_index * self.shard_numel, (shard_index + 1) * self.shard_numel


@dataclass(frozen=True, slots=True)
class Fragment:
    """The part of a parameter that one rank owns; empty when `numel` is 0."""

    bucket: int
    numel: int
    in_param: int  # where it starts in the flattened parameter
    in_bucket: int  # where it starts in the bucket
    in_shard: int  # where it starts in the rank's shard of the bucket


@dataclass(frozen=True)
class Layout:
    """The whole plan; equal on all ranks."""

    params: tuple[ParamSpec, ...]
    buckets: tuple[Bucket, ...]
    num_shards: int  # of parameters without ranks of their own

    @cached_property
    def _places(self) -> dict[int, tuple[int, Slot]]:
        return {
            slot.param: (b, slot) for b, bucket in enumerate(self.buckets) for slot in bucket.slots
        }

    def place(self, param: int) -> tuple[int, Slot]:
        """Return (bucket index, slot) of a parameter."""
        return self._places[param]

    def fragment(self, param: int, shard_index: int) -> Fragment:
        """Return the part of parameter `param` that lies in a shard."""
        index, slot = self._places[param]
        shard_start, shard_stop = self.buckets[index].shard_range(shard_index)
        start = min(max(slot.start, shard_start), slot.stop)
        stop = max(min(slot.stop, shard_stop), start)
        return Fragment(
            bucket=index,
            numel=stop - start,
            in_param=start - slot.start,
            in_bucket=start,
            in_shard=start - shard_start if stop > start else 0,
        )

    def fingerprint(self) -> str:
        """Return a hash that is equal exactly where the layouts are."""
        facts: list[object] = [self.params, self.buckets, self.num_shards]
        if any(bucket.ranks for bucket in self.buckets):
            facts.append([bucket.ranks for bucket in self.buckets])
        return hashlib.sha256(repr(tuple(facts)).encode()).hexdigest()


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Sharding:
    """Over which ranks buckets are cut.

    Attributes:
        num_shards: Number of pieces into which each bucket is cut, >= 1.
        num_replicas: Number of ranks that keep the same shard, >= 1; every shard divides by it.
    """

    num_shards: int
    num_replicas: int = 1


def _close(spec: ParamSpec, slots: Sequence[Slot], sharding: Sharding, block: int) -> Bucket:
    """Make a bucket of `slots`, whose parameters are all like `spec`."""
    used = max(slot.stop for slot in slots)
    multiple = sharding.num_replicas * max(SHARD_ALIGN_BYTES // spec.itemsize, block)
    shard_numel = _round_up(-(-used // sharding.num_shards), multiple)
    return Bucket(
        spec.group,
        spec.dtype,
        spec.itemsize,
        tuple(slots),
        shard_numel * sharding.num_shards,
        shard_numel,
        spec.ranks,
    )


def plan_layout(
    params: Sequence[ParamSpec],
    num_shards: int,
    bucket_bytes: int,
    *,
    num_replicas: int = 1,
    block: int = 1,
    own: Sequence[Sharding] = (),
) -> Layout:
    """Cut `params` into buckets of about `bucket_bytes`.

    A bucket is closed before the parameter that would make it larger than `bucket_bytes`, so a
    larger parameter gets a bucket of its own. Buckets come in the order in which backward is
    expected to fill them; forward needs them in the opposite order.

    Args:
        params: In registration order.
        num_shards: See `Sharding`; of parameters without ranks of their own.
        bucket_bytes: Size of a bucket in bytes of its own dtype, >= 1.
        num_replicas: Likewise.
        block: Elements, a power of two, of which every parameter's start and every shard is a
            multiple.
        own: The same of parameters whose `ranks` is 1, 2 and so on.

    Raises:
        ValueError: `num_shards` or `bucket_bytes` is less than 1.
    """
    if num_shards < 1:
        raise ValueError(f"num_shards must be >= 1, got {num_shards}.")
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes must be >= 1, got {bucket_bytes}.")
    shardings = [Sharding(num_shards, num_replicas), *own]
    open_slots: dict[tuple[str, int, str, int], list[Slot]] = {}
    # With several kinds or dtypes, buckets are ordered by their parameter that backward reaches
    # last, which is the one with the smallest index.
    closed: list[Bucket] = []
    for index in range(len(params) - 1, -1, -1):
        spec = params[index]
        key = (spec.dtype, spec.itemsize, spec.kind, spec.ranks)
        slots = open_slots.setdefault(key, [])
        align = max(PARAM_ALIGN_BYTES // spec.itemsize, block)
        start = _round_up(slots[-1].stop if slots else 0, align)
        if slots and (start + spec.numel) * spec.itemsize > bucket_bytes:
            last = params[slots[0].param]
            closed.append(_close(last, slots, shardings[spec.ranks], block))
            slots.clear()
            start = 0
        slots.append(Slot(index, start, start + spec.numel))
    for slots in open_slots.values():
        last = params[slots[0].param]
        closed.append(_close(last, slots, shardings[last.ranks], block))
    closed.sort(key=lambda bucket: -min(slot.param for slot in bucket.slots))
    return Layout(tuple(params), tuple(closed), num_shards)
