"""The fused update of this rank's shards: what it works on, and how steps are counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import compress
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from belief_dist import async_device, kernels
from belief_dist.device_scalars import DeviceScalars, device_scalars, together
from belief_dist.engine_options import EngineOptions
from belief_dist.operands import WATCHED_NAMES, FixedOperands, Operands, cut
from belief_dist.phases import Phases
from belief_dist.rule import StepScalars, step_scalars
from belief_dist.sharding.bucket import BucketBuffers, own_fragment
from belief_dist.sharding.cpu_offload import HostGradients
from belief_dist.sharding.gradient_access import OwnGradient
from belief_dist.sharding.graph_counts import GraphCounts
from belief_dist.sharding.layout import Fragment, Layout
from belief_dist.sharding.norms import norms_of
from belief_dist.sharding.state_sums import Extent, StateSums
from belief_dist.state_formats import is_stochastic, noise_key


class _Work(NamedTuple):
    """What a step updates of one bucket: as a whole, or parameter by parameter."""

    kind: tuple[torch.dtype | None, ...]  # dtypes of the operands
    whole: Operands
    parts: list[tuple[int, Operands]]  # with the index of the parameter


class _Plan(NamedTuple):
    """What one turn of an update works on: one bucket, or all of them."""

    indices: list[int]  # of the parameters
    works: list[_Work]
    alike: list[tuple[list[int], FixedOperands]]  # of groups, for a step that all parameters take


_Own = TypeVar("_Own")


class _Calls(Generic[_Own]):
    """Sorts operands into as few updates as possible.

    Those of one update are of one kind. Which scalars are its own, every operand says itself.
    """

    def __init__(self) -> None:
        self._found: dict[Any, tuple[dict[_Own, int], list[Operands]]] = {}

    def add(self, kind: Any, own: _Own, operands: Operands) -> None:
        """Add operands.

        Args:
            kind: Those of equal kinds may go together.
            own: What the scalars follow from.
            operands: What is updated.
        """
        positions, members = self._found.setdefault(kind, ({}, []))
        position = positions.setdefault(own, len(positions))
        members.append(operands._replace(scalars=position) if position else operands)

    def listed(self) -> list[tuple[list[_Own], list[Operands]]]:
        """Return of each update what its scalars follow from, by position, and its operands."""
        return [(list(positions), members) for positions, members in self._found.values()]


class ShardUpdate:
    """Updates this rank's shards in place.

    Attributes:
        states: The state of every parameter, as in `Optimizer.state`: its step, and views of the
            part of its states that this rank owns.
        host_gradients: Where gradients are copied to with offload, else None.
        groups_of: The param groups of each bucket's parameters.
        sums: Notices flipped bits in what this rank alone has; None if nobody asked for it.
    """

    def __init__(
        self,
        layout: Layout,
        buckets: Sequence[BucketBuffers],
        options: EngineOptions,
        phases: Phases,
    ) -> None:
        """Serve this rank's shards of `buckets`; `adopt` must follow."""
        self._layout = layout
        self._buckets = buckets
        self._phases = phases
        self._is_stochastic = is_stochastic(options.state_dtype) or (
            options.keeps_averages and is_stochastic(options.ema_dtype)
        )
        self._ema_weight = 0.0 if options.ema_decay is None else 1.0 - options.ema_decay
        self._seed = options.seed
        self._plans: dict[Any, _Plan] = {}
        self._param_indices = [[slot.param for slot in plan.slots] for plan in layout.buckets]
        self._group_of = [spec.group for spec in layout.params]
        self.groups_of = [{self._group_of[i] for i in each} for each in self._param_indices]
        on_host = [bucket for bucket in buckets if bucket.on_host]
        self.host_gradients = HostGradients(on_host) if on_host else None
        self.states: list[dict[str, Any]] = []
        self.sums = StateSums(buckets) if options.check_states else None

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        """Count steps in these states, one for each parameter.

        They are kept in a list beside `Optimizer.state`, which is looked up by tensors: a step
        looks thousands of times.
        """
        self.states = list(states)

    def use_seed(self, seed: int) -> None:
        """Round states with the noise of another seed."""
        self._seed = seed
        self._plans.clear()  # they hold keys of the noise

    # - What a parameter has of the buckets

    def fragment(self, index: int) -> Fragment:
        """Return where this rank's part of parameter number `index` lies."""
        return own_fragment(self._layout, self._buckets, index)

    def own_part(self, index: int) -> Operands:
        """Return what this rank updates of one parameter, as views."""
        part = self.fragment(index)
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

    def own_gradients(
        self, params: Sequence[Tensor], used: Sequence[bool], factor: Tensor
    ) -> Iterator[OwnGradient]:
        """Give what this rank has of the gradients of the parameters that are `used`."""
        for index, param in enumerate(params):
            if used[index]:
                own = self.own_part(index)
                yield OwnGradient(param, self.fragment(index).in_param, own.grad, factor)

    # - Averages

    def start_averages(self, indices: Iterable[int]) -> None:
        """Let the averages of some parameters start from these, if any are kept."""
        for index in indices if self._ema_weight else ():
            part = self.fragment(index)
            stop = part.in_shard + part.numel
            self._buckets[part.bucket].start_average(part.in_shard, stop)

    def start_new_averages(self) -> None:
        """Let those start anew whose parameters have taken no step yet: weights may be loaded."""
        self.start_averages(i for i, state in enumerate(self.states) if not state["step"])

    # - Flipped bits

    def has_faults(self, device: torch.device) -> Tensor | None:
        """Return whether the last update has read what was not written: one element, bool."""
        return None if self.sums is None else self.sums.faults.any().to(device, non_blocking=True)

    def describe_faults(self, label: Callable[[int], str]) -> str:
        """Return in which states of which parameters it was, or nothing.

        Args:
            label: Names a parameter.
        """
        found: dict[int, list[str]] = {}
        faults = [] if self.sums is None else self.sums.faults.nonzero().tolist()
        for number, kind in faults:
            found.setdefault(number, []).append(WATCHED_NAMES[kind])
        return ", ".join(
            f"{' and '.join(names)} of bucket {number} (parameters "
            f"{', '.join(map(label, self._param_indices[number]))})"
            for number, names in found.items()
        )

    # - One step

    def clip_values(self, limit: Tensor) -> None:
        """Clip the elements of the summed gradients to [-limit, limit]: one element, float64."""
        for bucket in self._buckets:
            bound = limit.to(bucket.grad_shard.dtype)
            bucket.grad_shard.clamp_(min=-bound, max=bound)

    def count_steps(self, used: Sequence[bool]) -> list[int]:
        """Count one more step of the parameters that are `used`, and return which these are."""
        indices = list(compress(range(len(used)), used))
        self.start_averages(index for index in indices if not self.states[index]["step"])
        for index in indices:
            self.states[index]["step"] += 1
        return indices

    def count_replays(self, number: int) -> None:
        """Count the steps that replays of a CUDA graph have taken, of all parameters."""
        if number:
            for state in self.states:
                state["step"] += number

    def uncount_steps(self, indices: Iterable[int]) -> None:
        """Take back what `count_steps` has counted, for a step that was skipped."""
        for index in indices:
            self.states[index]["step"] -= 1

    def changed(self, order: Iterable[int], used: Sequence[bool]) -> list[int]:
        """Return the buckets of which a parameter is `used`: in their order, the host's last.

        So the device has work while the host does its own.
        """
        found = [
            number for number in order if any(used[index] for index in self._param_indices[number])
        ]
        return sorted(found, key=lambda number: self._buckets[number].on_host)

    def run(
        self,
        order: Sequence[int],
        used: list[bool],
        param_groups: Sequence[Mapping[str, Any]],
        scales: Mapping[int, Tensor],
        skip: Tensor,
        *,
        turn_numel: float = 0,
        graph: GraphCounts | None = None,
    ) -> Iterator[int]:
        """Update the shards of the buckets in `order`, and yield each when it may be gathered.

        Args:
            order: Indices of buckets, from `changed`: those on the host come last.
            used: Which parameters have a gradient, on any rank.
            param_groups: With the options of each.
            scales: The factor on summed gradients, float64, by norm: see `norms.GradScales`.
            skip: One element; unless it is zero, everything stays as it is.
            turn_numel: Update so many of the device's buckets at once, if they are alike in one
                call, that their shards have this many elements; the last ones may have fewer.
            graph: Counts the steps of the CUDA graph that is captured, if one is.
        """
        on_host = [number for number in order if self._buckets[number].on_host]
        norms = tuple(norms_of(param_groups))
        turns = self._turns(order[: len(order) - len(on_host)], turn_numel)
        host_skip, host_scales = skip, scales
        arriving: Iterator[Tensor] = iter(())
        if on_host and self.host_gradients is not None:
            arriving = self.host_gradients.fetch([self._buckets[number] for number in on_host])
            # The host must know them before it updates, and the device has nothing to do yet.
            host_skip = skip.cpu()
            host_scales = {norm: scale.cpu() for norm, scale in scales.items()}
            turns += [[number] for number in on_host]
        if self.sums is not None:
            self.sums.begin()
        extents: dict[int, Extent] = {}
        for numbers in turns:
            with self._phases("update"):
                is_on_host = self._buckets[numbers[0]].on_host
                grads = arriving if is_on_host else (self._buckets[n].grad_shard for n in numbers)
                plan = self._plan(list(zip(numbers, grads, strict=False)), norms)
                is_even, calls = self._work_of(plan, used, norms)
                if self.sums is not None:
                    extents |= {number: self._extent(number, used, is_even) for number in numbers}
                for numbered, work in calls:
                    each = [
                        _scalars(param_groups[group], step, graph, self._ema_weight)
                        for group, step in numbered
                    ]
                    norm = norms[numbered[0][0]]
                    kernels.update_(
                        work,
                        together(each),
                        grad_scale=(host_scales if is_on_host else scales)[norm],
                        skip=host_skip if is_on_host else skip,
                    )
            for number in numbers:
                self._buckets[number].send_back()
                yield number
        if self.sums is not None:
            self.sums.end(extents, skip)

    def _extent(self, number: int, used: Sequence[bool], is_even: bool) -> Extent:
        if is_even and self._goes_whole(number):
            return Extent.WHOLE
        is_full = all(map(used.__getitem__, self._param_indices[number]))
        return Extent.PARAMS if is_full else Extent.SOME

    def _goes_whole(self, number: int) -> bool:
        """Return whether a step of all parameters of a bucket may take it as a whole."""
        # Stochastic rounding has noise that belongs to the elements of a parameter.
        rest = self._buckets[number].remainder
        rounds_masters = rest is not None and is_stochastic(rest.dtype)
        return len(self.groups_of[number]) == 1 and not (self._is_stochastic or rounds_masters)

    def _turns(self, numbers: Sequence[int], numel: float) -> list[list[int]]:
        turns: list[list[int]] = []
        room = 0.0
        for number in numbers:
            if room <= 0:
                turns.append([])
                room = numel
            turns[-1].append(number)
            room -= self._buckets[number].param_shard.numel()
        return turns

    def _plan(self, turn: Sequence[tuple[int, Tensor]], norms: tuple[int, ...]) -> _Plan:
        """Return what to update of some buckets, each with its gradients; made once."""
        # With offload, two host buffers take turns, and views of each are made once.
        key = norms, tuple((number, grads.data_ptr()) for number, grads in turn)
        plan = self._plans.get(key)
        if plan is None:
            works = [self._plan_work(*each) for each in turn]
            alike = _Calls[int]()
            for (number, _), work in zip(turn, works, strict=True):
                if self._goes_whole(number):
                    (group,) = self.groups_of[number]
                    alike.add((work.kind, norms[group]), group, work.whole)
                    continue
                for index, part in work.parts:
                    group = self._group_of[index]
                    alike.add((work.kind, norms[group]), group, part)
            indices = [index for number, _ in turn for index in self._param_indices[number]]
            fixed = [(groups, FixedOperands(each)) for groups, each in alike.listed()]
            plan = self._plans[key] = _Plan(indices, works, fixed)
        return plan

    def _work_of(
        self, plan: _Plan, used: list[bool], norms: Sequence[int]
    ) -> tuple[bool, Iterable[tuple[list[tuple[int, int]], Sequence[Operands]]]]:
        """Return whether all parameters are alike, and each update's (group, number of the step)s.

        Almost always these are the whole shards at once. Parameters with another step count than
        their neighbours, or without a gradient on any rank, break them up.
        """
        if all(map(used.__getitem__, plan.indices)):
            steps = {self.states[index]["step"] for index in plan.indices}
            if len(steps) == 1:
                (step,) = steps
                each = [([(group, step) for group in groups], work) for groups, work in plan.alike]
                return True, each
        # One call for all parameters that are alike: launches do not grow with their number.
        found = _Calls[tuple[int, int]]()
        for work in plan.works:
            for index, part in work.parts:
                if used[index]:
                    group = self._group_of[index]
                    numbered = group, self.states[index]["step"]
                    found.add((work.kind, norms[group]), numbered, part)
        return False, found.listed()

    def _plan_work(self, number: int, grads: Tensor) -> _Work:
        whole = self._buckets[number].operands(grads)
        if self.sums is not None:
            whole = whole._replace(sums=self.sums.row(number))
        parts = []
        for index in self._param_indices[number]:
            part = self.fragment(index)
            if part.numel:
                own = cut(whole, part.in_shard, part.in_shard + part.numel)
                key = noise_key(self._seed, index)
                parts.append((index, own._replace(key=key, first=part.in_param)))
        kind = tuple(t.dtype if isinstance(t, Tensor) else None for t in whole)
        return _Work(kind, whole, parts)


def _scalars(
    options: Mapping[str, Any], step: int, graph: GraphCounts | None, ema_weight: float
) -> StepScalars | DeviceScalars:
    """Return the scalars of step number `step`, or of what will be replayed in its place."""
    lr = options["lr"]
    if graph is not None:
        return device_scalars(options, graph.step_number(step), lr, ema_weight=ema_weight)
    # The host does not read what it would wait for.
    if isinstance(lr, Tensor) and async_device.runs_behind(lr.device):
        number = torch.full((), step, device=lr.device)
        return device_scalars(options, number, lr, ema_weight=ema_weight)
    return step_scalars(options, step, ema_weight=ema_weight)
