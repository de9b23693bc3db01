"""Predicts a training step from a layout, a compute profile and the speed of a link.

The model: every rank computes by the same clock and has one link of its own, full duplex, on which
exchanges run one after another. An exchange of n bytes among W ranks takes
``(W - 1) * latency + n * (W - 1) / W / bandwidth``: every rank has a message for every other. The
host does what the engine does, in its order: a bucket that is complete starts its reduction, unless
two are in flight already; `step` sums what has arrived, sends the message, updates bucket by bucket
and starts the gathers; forward stops where a parameter is still on its way. Where the processor
sends, computing is late by that work.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from belief_dist.sharding.layout import Layout

_IN_FLIGHT = 2  # as collectives.Staging has it
_CHUNK_BYTES = 1 << 20  # sums run behind what arrives, this much later


@dataclass(frozen=True)
class Profile:
    """When a model without communication needs its parameters and has its gradients.

    All times are in seconds, from the beginning of forward or of backward.
    """

    forward: float
    backward: float
    needed: tuple[float, ...]  # of each parameter, in forward
    ready: tuple[float, ...]  # of each parameter's gradient, in backward

    def scaled(self, forward: float, backward: float) -> Profile:
        """Return the same course in other times."""
        return Profile(
            forward,
            backward,
            tuple(t * forward / self.forward for t in self.needed),
            tuple(t * backward / self.backward for t in self.ready),
        )


@dataclass(frozen=True)
class Network:
    """What a rank's link does."""

    latency: float  # seconds per message
    bandwidth: float  # bytes per second, each way

    def exchange(self, nbytes: float, ranks: int) -> float:
        """Return the seconds in which each of `ranks` gives every other its part of `nbytes`."""
        return (ranks - 1) * (self.latency + nbytes / ranks / self.bandwidth)


def _sent(nbytes: float, ranks: int) -> float:
    return nbytes * (ranks - 1) / ranks


@dataclass(frozen=True)
class Device:
    """How fast a rank works on what has arrived."""

    sum_bandwidth: float  # bytes of all ranks' addends per second
    update_rate: float  # parameters per second
    check_bandwidth: float  # bytes of parameters per second, in their checksum
    send_cost: float = 0.0  # seconds of computing that it takes to send a byte and receive another


@dataclass(frozen=True)
class Prediction:
    """Seconds of one step in the steady state."""

    forward: float
    backward: float
    step: float
    compute: float  # of which forward and backward without communication

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.step

    @property
    def exposed(self) -> float:
        return self.total - self.compute


def predict(
    layout: Layout,
    profile: Profile,
    network: Network,
    device: Device,
    *,
    overlap: bool = True,
    rows: int = 1,
    across: Network | None = None,
) -> Prediction:
    """Predict one step of ZeRO-1 with ordered reduction.

    Args:
        layout: Whose `num_shards` is the number of ranks in a row.
        profile: With one entry for each of the layout's parameters.
        network: The link between ranks of a row.
        device: What each rank computes with.
        overlap: As for `ShardedAdaBelief`.
        rows: More than 1 for a mesh: shards are summed once more across so many rows, in float32.
        across: The link between rows; `network` if None.
    """
    ranks, buckets = layout.num_shards, layout.buckets
    across = across or network
    if device.send_cost:  # what is sent, the processor sends
        network = replace(network, bandwidth=min(network.bandwidth, 1 / device.send_cost))
    ready = [max(profile.ready[slot.param] for slot in bucket.slots) for bucket in buckets]
    needed = [min(profile.needed[slot.param] for slot in bucket.slots) for bucket in buckets]
    wire = [bucket.numel * bucket.itemsize for bucket in buckets]
    reduce = [
        network.exchange(nbytes, ranks) + 2 * across.exchange(4 * bucket.shard_numel, rows)
        for nbytes, bucket in zip(wire, buckets, strict=True)
    ]
    sums = [nbytes / device.sum_bandwidth for nbytes in wire]
    tail = _CHUNK_BYTES * ranks / device.sum_bandwidth

    host = link = stall = 0.0  # stall: how much later than in the profile backward is
    in_flight: deque[tuple[int, float]] = deque()  # bucket, when its last byte arrives

    def finish_oldest(now: float) -> float:
        bucket, arrival = in_flight.popleft()
        return max(now + sums[bucket], arrival + min(tail, sums[bucket]))

    for bucket in range(len(buckets)):
        host = ready[bucket] + stall if overlap else max(profile.backward, host)
        if len(in_flight) == _IN_FLIGHT:
            before, host = host, finish_oldest(host)
            stall += host - before
        link = max(link, host) + reduce[bucket]
        in_flight.append((bucket, link))
        busy = device.send_cost * _sent(wire[bucket], ranks)
        stall, host = stall + busy, host + busy
    backward = profile.backward + stall if overlap else profile.backward
    host = max(host, backward)
    while in_flight:
        host = finish_oldest(host)
    host += sum(wire) / device.check_bandwidth
    host += 2 * (ranks * rows - 1).bit_length() * max(network.latency, across.latency)

    arrivals: list[tuple[float, float]] = []  # when forward needs a bucket, when it is there
    link = stall = 0.0
    for bucket in reversed(range(len(buckets))):
        host += buckets[bucket].shard_numel / device.update_rate
        link = max(link, host) + network.exchange(wire[bucket], ranks)
        arrivals.append((needed[bucket], link))
    if not overlap:
        host = max(host, link)
    busy = device.send_cost * _sent(sum(wire), ranks) / len(buckets)
    for need, arrival in sorted(arrivals):
        stall = max(stall + busy if overlap else 0.0, arrival - host - need)
    return Prediction(
        forward=profile.forward + stall,
        backward=backward,
        step=host - backward,
        compute=profile.forward + profile.backward,
    )


def lower_bound(layout: Layout, profile: Profile, network: Network) -> float:
    """Return seconds of a step that no schedule on this link avoids beyond compute."""
    sent = sum(
        2 * network.exchange(b.numel * b.itemsize, layout.num_shards) for b in layout.buckets
    )
    return max(0.0, sent - profile.forward - profile.backward)
