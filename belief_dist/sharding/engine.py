"""The engine of `ShardedAdaBelief`, in the order of a step.

    backward   a full bucket of gradients starts its reduction     grad_reducer.on_gradient
                                                                   collectives.start_reduce
    step       the reductions end; one small message is summed     step_consensus.decide
               every shard is updated by one fused pass            shard_update.run, kernels.update_
               and starts on its way to the other ranks            collectives.start_gather
    forward    each layer waits for its own parameters             read_guard.ReadGuard

The optimizer is the face that users see; it hands over its param groups and states, and the engine
keeps no reference to it: in a reference cycle its hooks would live until the garbage collector
runs, which every rank does at another time.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from belief_dist import async_device
from belief_dist.async_device import LateRead
from belief_dist.engine_options import EngineOptions
from belief_dist.phases import Phases
from belief_dist.sharding import norms
from belief_dist.sharding.bucket import BucketBuffers, block_of, bytes_of
from belief_dist.sharding.collectives import Collectives
from belief_dist.sharding.cpu_offload import warn_of_one_thread
from belief_dist.sharding.disagreements import copies_of, raise_if_apart, why_skipped
from belief_dist.sharding.driver import Driver
from belief_dist.sharding.dtensor import local_part, stands_for_part
from belief_dist.sharding.gathers import Gathers
from belief_dist.sharding.grad_reducer import INTERRUPTED, GradReducer
from belief_dist.sharding.gradient_access import GradientHooks
from belief_dist.sharding.graph_counts import GraphCounts
from belief_dist.sharding.group_options import (
    ParamGroups,
    check_amsgrad,
    known_options_of,
    options_of,
)
from belief_dist.sharding.host_share import buckets_on_host, check_parts
from belief_dist.sharding.layout import Bucket, Layout, Sharding, plan_layout
from belief_dist.sharding.masters import Masters
from belief_dist.sharding.micro_batches import reducer_for
from belief_dist.sharding.model_checks import compare_models
from belief_dist.sharding.outer_reducers import OuterReducerCheck
from belief_dist.sharding.own_ranks import OwnRanks
from belief_dist.sharding.param_specs import param_label, param_specs
from belief_dist.sharding.process_groups import ModelParallel
from belief_dist.sharding.rank_sets import rank_sets
from belief_dist.sharding.read_guard import ReadGuard
from belief_dist.sharding.replica_repair import REPAIRED, repair_parts
from belief_dist.sharding.shard_update import ShardUpdate
from belief_dist.sharding.spike_guard import SpikeGuard
from belief_dist.sharding.step_consensus import (
    NO_STEP,
    RAISED,
    LastStep,
    Skip,
    StepConsensus,
    Verdict,
)

logger = logging.getLogger("belief_dist")

# Elements of shards that a GPU updates in one launch, before they start on their way: about 0.1 ms.
_TURN = 1 << 23
# Skipped steps that are remembered, until somebody asks for them.
_MOST_SKIPS = 256


class ShardEngine:
    """Reduces, decides, updates and gathers for one optimizer.

    Attributes:
        options: How it does so.
        comm: The ranks that share the states, or keep copies of them.
        driver: Knows which backward pass is a step's last, and which norm to clip to.
        params: All parameters, in the order of the param groups.
        comms: Of each bucket, the ranks that share it.
        layout: Which shard has which elements of which parameter.
        buckets: The tensors of every bucket of the layout.
        masters: Follow parameters that something else has changed, and the other way round.
        update: The fused update of this rank's shards.
        reducer: The way of the gradients.
        consensus: What all ranks decide about each step.
        spikes: Skips steps whose gradients are far larger than those before.
        read_guard: Waits for parameters that travel.
        phases: What the host is doing.
        grad_norm: One element, float64: the L2 norm of the last step's mean gradient, unclipped.
        gradient_hooks: Look at the gradients of each step.
        grad_scales: The norms of the last step, and by what it multiplied sums; first empty.
        skipped_steps: How many steps were skipped, among those whose verdict has been read.
        skips: The last of these, without those of replayed CUDA graphs.
        last_step: What became of the last one, as far as its verdict has been read.
    """

    # Made anew by `build`, whenever parameters are added or replaced.
    layout: Layout
    comms: list[Collectives]
    buckets: list[BucketBuffers]
    masters: Masters
    update: ShardUpdate
    reducer: GradReducer

    def __init__(
        self,
        params: Sequence[Tensor],
        param_groups: ParamGroups,
        state: dict[Tensor, dict[str, Any]],
        *,
        comm: Collectives,
        own_ranks: OwnRanks,
        model_parallel: ModelParallel,
        options: EngineOptions,
    ) -> None:
        """Compare the ranks, and move all parameters into buckets; called by all ranks.

        Args:
            params: See the class.
            param_groups: See `build`.
            state: See `build`.
            comm: See the class.
            own_ranks: Of param groups that not all ranks share.
            model_parallel: The ranks that hold other parts of a tensor-parallel model.
            options: See the class.

        Raises:
            ValueError: On all ranks: they differ in the parameters or options.
        """
        if options.offload:
            check_parts(options.offload, is_pipeline=not model_parallel.have_same_groups)
            warn_of_one_thread(options.offload, comm.world_size)
        device = params[0].device
        self._runs_behind = async_device.runs_behind(device)
        self.options = options
        self.comm = comm
        self._own_ranks = own_ranks
        self._model_parallel = model_parallel
        # Replaced by an adapter's, where an engine drives the steps.
        self.driver = Driver(options.max_grad_norm)
        self.phases = Phases()
        self.read_guard = ReadGuard(self.phases)
        # Torch's stack of modes would keep a guard that has something to wait for.
        weakref.finalize(self, self.read_guard.abandon).atexit = False
        self.consensus = StepConsensus(
            comm,
            model_parallel,
            compare=options.check_replicas,
            repairs=options.on_desync == "repair",
            # An update on the host must know the verdict.
            defers=self._runs_behind and options.offload is None,
        )
        self.grad_norm = torch.zeros((), dtype=torch.float64, device=device)
        self.grad_scales = norms.NO_SCALES
        self.gradient_hooks = GradientHooks()
        self.spikes = SpikeGuard(options.spike_guard, device)
        self.skipped_steps = 0
        self.skips: deque[Skip] = deque(maxlen=_MOST_SKIPS)
        self.last_step = NO_STEP
        self._graph = GraphCounts(device)
        self.build(params, param_groups, state, keep_buckets=False)

    # - Construction

    def build(
        self,
        params: Sequence[Tensor],
        param_groups: ParamGroups,
        state: dict[Tensor, dict[str, Any]],
        *,
        keep_buckets: bool,
    ) -> None:
        """Lay out all parameters, compare the ranks, and make what a step needs; called by all.

        Nothing may be on its way: see `read_verdict` and `read_guard.wait_all`.

        Args:
            params: See the class.
            param_groups: With the options of each.
            state: Of the optimizer; receives the state of every parameter that has none.
            keep_buckets: The parameters that were there before come first, and keep their buckets.
                Otherwise all parameters move, as they are now, into new ones.

        Raises:
            ValueError: On all ranks: they differ in the parameters or options. The engine is then
                as it was.
        """
        options, comm = self.options, self.comm
        layout = plan_layout(
            # Planned alike again, known parameters get the buckets that they have.
            param_specs(
                param_groups, self._own_ranks.of_group, self.layout.params if keep_buckets else ()
            ),
            comm.num_shards,
            options.bucket_bytes,
            num_replicas=comm.num_replicas,
            block=block_of(options),
            own=[Sharding(each.num_shards, each.num_replicas) for each in self._own_ranks.comms],
        )
        sets = rank_sets(layout, [comm, *self._own_ranks.comms])
        # Before anything is allocated or sent: ranks with other buckets would wait for each other
        # in the broadcasts below, and the old layout is still whole if this raises.
        compare_models(comm, self._model_parallel, sets, layout, params, param_groups, options)
        self.params, self.layout, self._rank_sets = params, layout, sets
        self.comms = [sets[plan.ranks].comm for plan in layout.buckets]
        kept = {each.bucket: each for each in self.buckets} if keep_buckets else {}
        on_host = buckets_on_host(
            layout,
            options,
            amsgrad=[group["amsgrad"] for group in param_groups],
            kept={plan: each.on_host for plan, each in kept.items()},
        )
        self.buckets = [
            kept.get(plan) or self._new_bucket(plan, param_groups, on_host=goes)
            for plan, goes in zip(layout.buckets, on_host, strict=True)
        ]
        self.update = ShardUpdate(layout, self.buckets, options, self.phases)
        for index, param in enumerate(params):
            if param not in state:  # now, or torch.distributed.checkpoint takes a step for it
                state[param] = self.update.new_state(index)
        self.update.adopt([state[param] for param in params])
        self._gathers = Gathers(params, layout, self.buckets, sets, self.read_guard, self.phases)
        self._label = partial(param_label, param_groups)
        self.masters = Masters(
            params,
            layout,
            self.buckets,
            self.comms,
            defers=self.consensus.defers,
            label=self._label,
        )
        self._norms = norms.norms_of(param_groups)
        self._outer_reducers = OuterReducerCheck(params)
        self.consensus.forget_order()
        # Two reducers with hooks on one parameter would both count its gradient.
        if hasattr(self, "reducer"):
            self.reducer.close()
        self.reducer = reducer_for(options)(
            params,
            self.buckets,
            comm,
            self.comms,
            options,
            self.driver,
            self.masters.storage,
            self.phases,
            norms=[self._norm_of(plan) for plan in layout.buckets],
            own_norms=[norm for norm in self._norms if norm > norms.MODEL],
            label=self._label,
        )

    def _new_bucket(
        self, plan: Bucket, param_groups: ParamGroups, *, on_host: bool
    ) -> BucketBuffers:
        comm = self._rank_sets[plan.ranks].comm
        bucket = BucketBuffers(
            plan,
            [local_part(self.params[slot.param]) for slot in plan.slots],
            comm.shard_index,
            self.options,
            amsgrad=param_groups[plan.group]["amsgrad"],
            on_host=on_host,
            is_alone=comm.world_size == 1,
            allocate=comm.buffer,
        )
        comm.broadcast_(bucket.flat_param)  # masters were made from this rank's own
        bucket.refresh_master()
        if self.options.keeps_averages:
            bucket.start_average()
        return bucket

    def _norm_of(self, plan: Bucket) -> int:
        """Return the norm of a bucket on this rank; what has ranks of its own is on these alone."""
        param = self.params[plan.slots[0].param]  # all others of the bucket are cut like it
        counts = plan.ranks > 0 or stands_for_part(param, self._model_parallel.mesh)
        return self._norms[plan.group] if counts else norms.UNCLIPPED

    # - One step

    def step(
        self, param_groups: ParamGroups, loss_scale: Tensor | None, *, gives_up: bool = False
    ) -> Tensor:
        """Reduce what is left, update the shards and start to gather; called by all ranks.

        Args:
            param_groups: With the options of each.
            loss_scale: By which gradients are too large; one element, or None.
            gives_up: Have all ranks skip this step.

        Returns:
            What all ranks do: a `Verdict`, one element, int64, on the device of the parameters.

        Raises:
            RuntimeError: On all ranks: their parameters differ, or a gradient of one of them must
                not be taken. Nothing was updated. Or another optimizer has the parameters now.
            ValueError: On all ranks: they are at different steps, or have different options or loss
                scales, or amsgrad was switched. Nothing was updated.
        """
        self.last_step = NO_STEP._replace(number=self.consensus.calls + 1, why_not=RAISED)
        self._outer_reducers.end()
        self._check_owner()
        edited = self.masters.follow()
        reducer, consensus = self.reducer, self.consensus
        if reducer.is_interrupted and not gives_up:
            reducer.spoiled = INTERRUPTED
        with self.phases("reduce"):
            reducer.finish()
        known, late = known_options_of(param_groups)
        with self.phases("consensus"):
            decision = consensus.decide(
                reducer,
                self.buckets,
                self._rank_sets,
                known,
                [*late, *self.spikes.words()],
                loss_scale,
                gives_up=gives_up,
                edited=edited,
                corrupt=self.update.has_faults(self.grad_norm.device),
            )
        if not consensus.defers:
            self._raise_if_apart(Verdict(int(decision.verdict)), param_groups)
        has_largest = ["max_exp_avg_sq" in bucket.states for bucket in self.buckets]
        check_amsgrad(param_groups, zip(self.update.groups_of, has_largest, strict=True))
        norms.check_norms(param_groups, self._norms)
        # Steps are counted before the verdict is known, and counted back if it is not to update:
        # the host need not wait for the device to launch the updates.
        graph = self._graph if self._graph.captures(decision.used) else None
        counted = [] if graph is not None else self.update.count_steps(decision.used)
        self.grad_scales = norms.grad_scales(
            decision.norm_bins,
            param_groups,
            self._norms,
            world_size=self.options.micro_batches or self.comm.world_size,
            loss_scale=loss_scale,
            limit=self.driver.max_grad_norm,
        )
        self.grad_norm, scales = self.grad_scales.norms[norms.MODEL], self.grad_scales.factors
        verdict = self.spikes.judge(self.grad_norm, decision.verdict)
        self.gradient_hooks.call(
            partial(self.update.own_gradients, self.params, decision.used, scales[norms.UNCLIPPED])
        )
        if self.options.max_grad_value is not None:
            self.update.clip_values(self.options.max_grad_value / scales[norms.UNCLIPPED])
        # Forward needs first what backward has reached last.
        order = self.update.changed(reversed(reducer.schedule.order), decision.used)
        is_sharded = any(comm.num_shards > 1 for comm in self.comms)
        self._gathers.open(order)
        for number in self.update.run(
            order,
            decision.used,
            param_groups,
            scales,
            verdict,
            turn_numel=(_TURN if is_sharded else math.inf) if self._runs_behind else 0,
            graph=graph,
        ):
            self._gathers.start(number)
        self._gathers.close(overlap=self.options.overlap)
        self.last_step = LastStep(consensus.calls, True, "")
        self.masters.note_update()
        reducer.end_step()
        if decision.order is not None:
            reducer.schedule.set_order(decision.order)
        if graph is not None:
            graph.count(verdict)
            return verdict
        self._graph.count_outside(verdict)
        consensus.unread = (LateRead(verdict), counted)
        if not consensus.defers:
            self.read_verdict(param_groups)
        return verdict

    def zero_grad(self, param_groups: ParamGroups, *, set_to_none: bool) -> None:
        """Forget all gradients; if other ranks wait for them in a step, end it with them first.

        Args:
            param_groups: With the options of each.
            set_to_none: See `GradReducer.zero_grad`.
        """
        if self.reducer.is_awaited:
            # They have this round's sums, or wait for them, and go on to their step.
            self.read_verdict(param_groups)
            self.read_guard.wait_all()
            with torch.no_grad():
                self.step(param_groups, None, gives_up=self.reducer.may_give_up)
        self.reducer.zero_grad(set_to_none=set_to_none)

    def _check_owner(self) -> None:
        if self.reducer.is_closed:
            raise RuntimeError(
                "another ShardedAdaBelief was built over parameters of this one and trains them "
                "now; drop this one, or build a new one to take them back."
            )

    def read_verdict(self, param_groups: ParamGroups) -> None:
        """Read whether the last step was skipped, and count it back if so.

        Where a verdict is deferred, the next step reads it.

        Raises:
            RuntimeError: As for `step`.
            ValueError: As for `step`.
        """
        # The last step first: what it counted too much is no news of a replay.
        self._read_last_verdict(param_groups)
        if not async_device.is_capturing(self.grad_norm.device):
            replays = self._graph.read()
            self.update.count_replays(replays.taken)
            self.skipped_steps += replays.skipped
            self._raise_if_apart(replays.fault, param_groups)

    def _read_last_verdict(self, param_groups: ParamGroups) -> None:
        if self.consensus.unread is None:
            return
        word, counted = self.consensus.unread
        verdict = Verdict(word.get())
        self.consensus.unread = None
        if verdict == Verdict.UPDATE:
            return
        self.update.uncount_steps(counted)
        self._graph.take_back()
        why = self.spikes.describe() if verdict == Verdict.SPIKE else why_skipped(verdict)
        self.last_step = self.last_step._replace(was_taken=False, why_not=why)
        if self.consensus.defers:  # else it was raised before anything was updated
            self._raise_if_apart(verdict, param_groups)
        self.skipped_steps += 1
        self.skips.append(Skip(self.last_step.number, verdict, why))
        self.reducer.forget_errors()
        if self.comm.shard_index == 0:
            logger.warning("%s: step skipped on all ranks (%d so far)", why, self.skipped_steps)

    def _raise_if_apart(self, verdict: Verdict, param_groups: ParamGroups) -> None:
        if self.options.on_desync == "repair" and verdict in REPAIRED:
            is_own = verdict == Verdict.REPLICAS_DIFFER
            sums = self.consensus.replica_sums.tolist() if is_own else None
            parts = self._model_parallel.comm
            repair_parts(self.comm, parts, self._rank_sets, sums, self.buckets, self._copies())
            self._note_written()
            return
        raise_if_apart(
            verdict,
            self.comm,
            self.consensus,
            self._rank_sets,
            facts=lambda: {
                "options of group": options_of(param_groups),
                "spikes in a row, and norms of the steps before": [self.spikes.history()],
            },
            label=self._label,
            copies=self._copies,
            corrupt=lambda: self.update.describe_faults(self._label),
        )

    def _copies(self) -> list[dict[str, Tensor]]:
        self.read_guard.wait_all()  # what is told differs now
        return copies_of(self.layout, self.params, self._label)

    # - Masters and parameters

    def _note_written(self) -> None:
        """Take parameters, masters and states as they are now."""
        self.masters.note()
        if self.update.sums is not None:
            self.update.sums.forget()

    def refresh_masters(self) -> None:
        """Copy all parameters into their masters."""
        self.masters.refresh()
        self._note_written()

    def sync_params_from_masters(self) -> None:
        """Make all parameters those of the masters; called by all ranks."""
        self.masters.send()
        self._note_written()

    def keep_loaded_masters(self) -> None:
        """Take masters that were written into the states for those of the parameters."""
        self.masters.keep_loaded()
        # Weights that were loaded before are not newer than the masters that were loaded now.
        self._note_written()

    def nbytes(self) -> dict[str, int]:
        """Return the bytes that this rank really holds, by kind."""
        total = bytes_of(self.buckets)
        total["gradients"] += self.reducer.nbytes()
        if self.update.host_gradients is not None:
            total["gradients on the host"] = self.update.host_gradients.nbytes()
        return total
