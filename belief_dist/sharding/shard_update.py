"""The fused update of this rank's shards: what it works on, and how steps are counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import compress
from typing import Any, NamedTuple

from torch import Tensor

from belief_dist import kernels
from belief_dist.engine_options import EngineOptions
from belief_dist.operands import Operands, cut
from belief_dist.rule import step_scalars
from belief_dist.sharding.bucket import BucketBuffers
from belief_dist.sharding.cpu_offload import HostGradients
from belief_dist.sharding.layout import Layout
from belief_dist.state_formats import is_stochastic, noise_key


class _Work(NamedTuple):
    """What a step updates of one bucket: as a whole, or parameter by parameter."""

    whole: Operands
    parts: list[tuple[int, Operands]]  # with the index of the parameter


class ShardUpdate:
    """Updates this rank's shards in place.

    Attributes:
        states: The state of every parameter, as in `Optimizer.state`: its step, and views of the
            part of its states that this rank owns.
        host_gradients: Where gradients are copied to with offload, else None.
        groups_of: The param groups of each bucket's parameters.
    """

    def __init__(
        self,
        layout: Layout,
        buckets: Sequence[BucketBuffers],
        shard_index: int,
        options: EngineOptions,
    ) -> None:
        """Serve the shard number `shard_index` of `buckets`; `adopt` must follow."""
        self._layout = layout
        self._buckets = buckets
        self._shard_index = shard_index
        self._is_stochastic = is_stochastic(options.state_dtype)
        self._seed = options.seed
        self._work: dict[tuple[int, int], _Work] = {}
        self._param_indices = [[slot.param for slot in plan.slots] for plan in layout.buckets]
        self._group_of = [spec.group for spec in layout.params]
        self.groups_of = [{self._group_of[i] for i in each} for each in self._param_indices]
        self.host_gradients = HostGradients(buckets) if options.offload else None
        self.states: list[dict[str, Any]] = []

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        """Count steps in these states, one for each parameter.

        They are kept in a list beside `Optimizer.state`, which is looked up by tensors: a step
        looks thousands of times.
        """
        self.states = list(states)

    def use_seed(self, seed: int) -> None:
        """Round states with the noise of another seed."""
        self._seed = seed
        self._work.clear()  # it holds keys of the noise

    # - What a parameter has of the buckets

    def own_part(self, index: int) -> Operands:
        """Return what this rank updates of one parameter, as views."""
        part = self._layout.fragment(index, self._shard_index)
        buffers = self._buckets[part.bucket]
        return cut(buffers.operands(buffers.grad_shard), part.in_shard, part.in_shard + part.numel)

    def new_state(self, index: int) -> dict[str, Any]:
        """Return the state of one parameter before its first step: views of its own part."""
        bucket, slot = self._layout.place(index)
        buffers = self._buckets[bucket]
        own = self.own_part(index)._asdict()
        state: dict[str, Any] = {"step": 0, **{name: own[name] for name in buffers.states}}
        if buffers.has_master:
            state["master"] = own["param"]
        if buffers.remainder is not None:
            state["remainder"] = own["remainder"]
        if buffers.wire_error is not None:
            state["wire_error"] = buffers.wire_error[slot.start : slot.stop]
        return state

    # - One step

    def count_steps(self, used: Sequence[bool]) -> list[int]:
        """Count one more step of the parameters that are `used`, and return which these are."""
        indices = list(compress(range(len(used)), used))
        for index in indices:
            self.states[index]["step"] += 1
        return indices

    def uncount_steps(self, indices: Iterable[int]) -> None:
        """Take back what `count_steps` has counted, for a step that was skipped."""
        for index in indices:
            self.states[index]["step"] -= 1

    def run(
        self,
        order: Iterable[int],
        used: list[bool],
        param_groups: Sequence[Mapping[str, Any]],
        scales: Mapping[bool, Tensor],
        skip: Tensor,
    ) -> Iterator[int]:
        """Update the shards of the buckets in `order`, and yield each when it may be gathered.

        Buckets in which no parameter is used have not changed, and are left out.

        Args:
            order: Indices of buckets.
            used: Which parameters have a gradient, on any rank.
            param_groups: With the options of each.
            scales: The factor on summed gradients, float64, for groups with clip True and False.
            skip: One element; unless it is False, everything stays as it is.
        """
        if self.host_gradients is not None:
            # The host must know them before it updates.
            skip = skip.cpu()
            scales = {clip: scale.cpu() for clip, scale in scales.items()}
        changed = [
            number for number in order if any(used[index] for index in self._param_indices[number])
        ]
        buckets = [self._buckets[number] for number in changed]
        for number, bucket, grads in zip(changed, buckets, self._incoming(buckets), strict=True):
            for (group, step), work in self._work_of(number, grads, used).items():
                options = param_groups[group]
                scalars = step_scalars(options, step)
                kernels.update_(work, scalars, grad_scale=scales[options["clip"]], skip=skip)
            bucket.send_back()
            yield number

    def _incoming(self, buckets: Sequence[BucketBuffers]) -> Iterable[Tensor]:
        """Return the reduced gradients of each bucket, where they are updated."""
        if self.host_gradients is not None:
            return self.host_gradients.fetch(buckets)
        return (bucket.grad_shard for bucket in buckets)

    def _work_of(
        self, number: int, grads: Tensor, used: list[bool]
    ) -> dict[tuple[int, int], Sequence[Operands]]:
        """Return what to update of this rank's shard of a bucket, by group and number of the step.

        Almost always that is the whole shard at once. Parameters of another group or with another
        step count than their neighbours, or without a gradient on any rank, break it up; and so
        does stochastic rounding, whose noise belongs to the elements of a parameter.
        """
        # With offload, two host buffers take turns, and views of each are made once.
        key = (number, grads.data_ptr())
        work = self._work.get(key)
        if work is None:
            work = self._work[key] = self._plan_work(number, grads)
        indices = self._param_indices[number]
        steps = {self.states[index]["step"] if used[index] else 0 for index in indices}
        groups = self.groups_of[number]
        if len(steps) == len(groups) == 1 and not self._is_stochastic:
            (group,) = groups
            return {(group, step): [work.whole] for step in steps if step}
        # One call for all parameters that are alike: launches do not grow with their number.
        found: dict[tuple[int, int], list[Operands]] = {}
        for index, part in work.parts:
            if used[index]:
                key_of = self._group_of[index], self.states[index]["step"]
                found.setdefault(key_of, []).append(part)
        return dict(found)

    def _plan_work(self, number: int, grads: Tensor) -> _Work:
        whole = self._buckets[number].operands(grads)
        parts = []
        for index in self._param_indices[number]:
            part = self._layout.fragment(index, self._shard_index)
            if part.numel:
                own = cut(whole, part.in_shard, part.in_shard + part.numel)
                key = noise_key(self._seed, index)
                parts.append((index, own._replace(key=key, first=part.in_param)))
        return _Work(whole, parts)
