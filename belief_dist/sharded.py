"""ShardedAdaBelief: each rank keeps 1/world_size of the optimizer's state (ZeRO-1 and 2).

The face of the sharded optimizer, as torch's users expect one: arguments, param groups, state_dict.
What happens in a step is in `sharding.engine`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from belief_dist import kernels, observers
from belief_dist.engine_options import EngineOptions, Reduction, check_timeout
from belief_dist.options import complete_options
from belief_dist.params import (
    NoDecay,
    as_groups,
    common_device,
    prepare_group,
    refuse_copies,
    refuse_edits,
    split_by_decay,
)
from belief_dist.sharding.averages import AverageAccess
from belief_dist.sharding.checkpoint_access import CheckpointAccess
from belief_dist.sharding.collectives import Collectives
from belief_dist.sharding.driver import Driven
from belief_dist.sharding.dtensor import coordinate_of
from belief_dist.sharding.engine import ShardEngine
from belief_dist.sharding.gradient_access import GradientAccess
from belief_dist.sharding.group_options import check_split, take_own
from belief_dist.sharding.layout import Layout
from belief_dist.sharding.loss_scale import check_scaler, tell_scaler
from belief_dist.sharding.module_buffers import spread_buffers
from belief_dist.sharding.own_ranks import OwnRanks
from belief_dist.sharding.param_specs import param_label
from belief_dist.sharding.process_groups import check_mesh, connect, connect_model_parallel
from belief_dist.sharding.rank_checks import check_together, raise_together
from belief_dist.sharding.step_consensus import LastStep
from belief_dist.state_dict import SHARD_FORMAT, check_shard, copy_shard_, load_hooks
from belief_dist.state_init_step import TORCH_STATE_DICT, is_called_by


class ShardedAdaBelief(Driven, GradientAccess, AverageAccess, CheckpointAccess, Optimizer):
    """AdaBelief whose states and master weights are sharded over the ranks of a process group.

    Use it on a bare module, without DistributedDataParallel: it gives all ranks the parameters of
    the first rank when it is built, averages gradients over the ranks while backward runs, and
    gathers updated parameters while the next forward begins.

    With ``reduction="ordered"`` parameters and states are, bit for bit, those of one process that
    adds the ranks' gradients in rank order, for any number of ranks and any bucket size.

    Args:
        params: As for `AdaBelief`, in the same order on every rank. All must require gradients and
            lie on one device. Parameters and gradients become views of flat buffers. Frozen
            parameters may be unfrozen at any time; until then their states and reductions are paid
            for, so parameters that never train are better left out.
        lr, betas, eps, weight_decay, amsgrad, maximize: As for `AdaBelief`; each may differ per
            param group. A group with ``"clip": False`` neither counts in the gradient norm nor is
            clipped; one with a ``"max_grad_norm"`` has a norm of its own, to which it is clipped.
        weight_decouple, fixed_decay, rectify, degenerated_to_sgd: Likewise.
        no_decay: As for `AdaBelief`.
        process_group: The ranks to shard over: a process group, or a `DeviceMesh` of one
            dimension; None means all. A mesh of two dimensions shards over the last and keeps a
            copy of all shards for each index of the first (HSDP: a node for each row). A param
            group may have its own, of ranks among these, such as those that hold the same experts:
            see docs/parallelism.md.
        model_parallel_group: The ranks that hold other parts of the model, such as the stages of a
            pipeline: clipping and skipping are then those of the whole model. Not needed for
            DTensor parameters alone.
        stage: 1 shards states and masters over the ranks. 2 shards the gradients too: `param.grad`
            has no values after backward, see `sharding.sharded_grad`. All ranks must run equally
            many backward passes outside of `no_sync`.
        shard_over: On a mesh of two dimensions, "mesh" shards over both, and keeps no copies.
        micro_batches: A step is so many backward passes of all ranks together, number k that of
            rank k mod world size, and has the same bits on any number of ranks; losses are not
            divided. At both stages gradients then go as at stage 2. See docs/any-world-size.md.
        reduction: "ordered" sums gradients in rank order in float32; "native" uses the backend's
            reduce-scatter.
        reduce_dtype: Gradients are rounded to this dtype before they travel, and summed in float32:
            torch.float32, torch.bfloat16, or torch.int8 with a scale for every 256 elements and
            error feedback, see `sharding.grad_codec`. None sends them as they are. Like
            state_dtype, it may be a name ("bfloat16"), as in JSON or YAML.
        master: "remainder" keeps the lower half only of a bfloat16 parameter's float32 master, as
            the parameter itself is the upper one: 2 bytes less, and the same masters from the same
            gradients, see `state_formats`. (Parameters round ties away from zero, and not to even.)
            "remainder8" keeps 8 bits of that half, 3 bytes less than "fp32", and rounds masters to
            24 bits, stochastically. "fp32" keeps the whole.
        state_dtype: torch.float32, or torch.bfloat16 (2 bytes) or torch.uint8 (1 byte and 1/256)
            for each element of exp_avg and exp_avg_sq, rounded stochastically, see `state_formats`.
            The bits then are still the same for any number of ranks and any bucket size.
        seed: Of the noise that rounds states, masters and averages.
        ema_decay: Keep an exponential moving average of the weights with this decay, in the pass of
            the update; see `averaged_parameters` and docs/averages.md. None keeps none.
        ema_dtype: Of the average: torch.float32, or torch.bfloat16, rounded as `state_dtype`.
        bucket_bytes: Size of a communication bucket in bytes.
        max_grad_norm: Clip the mean gradient to this global L2 norm inside `step`, or None.
        max_grad_value: Clip every element of the mean gradient to [-value, value] before its norm
            is clipped, or None. `grad_norm` is that of the unclipped gradient.
        overlap: Reduce during backward and gather behind the next forward. False does both inside
            `step`, with the same bits.
        offload: "cpu" keeps master weights and states in the host's memory and updates them there:
            gradients come over and parameters go back bucket by bucket. A float (> 0, <= 1) does so
            with at least this fraction of their bytes, an integer with at least so many bytes of
            this rank, see `sharding.host_share`. The bits are the same.
        shared_memory: On CPUs, ranks of one host read each other's memory instead of messages;
            with "cuda" GPUs of one host do, too: see docs/shared-memory.md.
        check_replicas: In every step, compare a checksum of the ranks' parameters.
        check_states: In every step, compare what the update reads of masters and states with what
            the last one has written: see `sharding.state_sums`.
        spike_guard: Skip a step, on all ranks, if the norm of its mean gradient is more than so
            many times the median of the last 128 that were taken: see `sharding.spike_guard`.
        on_desync: If replicas differ, "raise", or "repair": give ranks what most have, and skip.
        sync_buffers: Once, give all ranks the first rank's buffers of modules that hold parameters.
        timeout: After which a rank that does not answer is an error; None: half that of the group.

    Shapes: for every bucket of n padded elements, flat parameters and gradients are (n,) in the
        parameters' dtype (no flat gradients at stage 2); master, exp_avg and exp_avg_sq are
        (n / world_size,), float32 (float64 for float64 parameters) or what `master` and
        `state_dtype` say, param_ema likewise; wire errors are (n,) in the parameters' dtype, with
        int8 only.

    Raises:
        TypeError: An argument has the wrong type, or an option is unknown.
        ValueError: A value is out of range, devices are mixed, or the ranks disagree about the
            parameters or options.
        RuntimeError: torch.distributed is needed but not initialized.

    Source: AdaBelief, arXiv:2010.07468, Algorithm 2; ZeRO, arXiv:1910.02054, section 5.
    """

    _engine: ShardEngine

    # torch.amp.GradScaler then hands itself to `step` and leaves gradients and verdict to it.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
        *,
        weight_decouple: bool = True,
        fixed_decay: bool = False,
        rectify: bool = False,
        degenerated_to_sgd: bool = True,
        amsgrad: bool = False,
        maximize: bool = False,
        no_decay: NoDecay = None,
        process_group: dist.ProcessGroup | DeviceMesh | None = None,
        model_parallel_group: dist.ProcessGroup | DeviceMesh | None = None,
        stage: Literal[1, 2] = 1,
        shard_over: Literal["row", "mesh"] = "row",
        micro_batches: int | None = None,
        reduction: Reduction = "ordered",
        reduce_dtype: torch.dtype | str | None = None,
        master: Literal["fp32", "remainder", "remainder8"] = "fp32",
        state_dtype: torch.dtype | str = torch.float32,
        seed: int = 0,
        ema_decay: float | None = None,
        ema_dtype: torch.dtype | str = torch.float32,
        bucket_bytes: int = 32 << 20,
        max_grad_norm: float | None = None,
        max_grad_value: float | None = None,
        overlap: bool = True,
        offload: Literal["cpu"] | float | None = None,
        shared_memory: bool | Literal["cuda"] = True,
        check_replicas: bool = True,
        check_states: bool = False,
        spike_guard: float | None = None,
        on_desync: Literal["raise", "repair"] = "raise",
        sync_buffers: bool = True,
        timeout: timedelta | None = None,
        **other_spellings: Any,
    ) -> None:
        """See the class."""
        arguments = {**locals()}
        self._no_decay = no_decay
        self._group_ranks: list[Any] = []  # the process group that each param group wants

        # Validate what this rank alone can tell. A problem is raised below, on all ranks.
        self._options = EngineOptions()
        device = torch.device("cpu")
        problem: Exception | None = None
        try:
            check_timeout(timeout)
            defaults = complete_options(arguments, other_spellings, "ShardedAdaBelief")
            kernels.check_choice()
            self._options = EngineOptions.from_arguments(arguments)
            check_mesh(process_group, self._options)
            super().__init__(as_groups(params, "ShardedAdaBelief"), defaults)
            device = self._check_params()
        except (TypeError, ValueError) as error:
            problem = error

        # Connect.
        self._timeout = timeout = timeout if problem is None else None
        comm = connect(process_group, self._options, device, timeout)
        shared = self._shared_params() if problem is None else None
        self._model_parallel = connect_model_parallel(
            shared, comm, model_parallel_group, device, timeout, problem
        )
        self._own_ranks = OwnRanks()
        self._connect_own(comm, device, timeout)

        # Compare the ranks, and build.
        self._engine = ShardEngine(
            self._params,
            self.param_groups,
            self.state,
            comm=comm,
            own_ranks=self._own_ranks,
            model_parallel=self._model_parallel,
            options=self._options,
        )
        if self._options.sync_buffers:
            spread_buffers(comm, self._params, self._shared_params())
        observers.notify(observers.on_built, self)

    # - Parameters

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, its parameters in buckets of their own; called by all ranks.

        Its parameters become those of the first rank. All else stays as it is.

        Raises:
            TypeError: As for the constructor.
            ValueError: As for the constructor. The optimizer is then as it was.
            RuntimeError: Gradients of the next step have been reduced already.
        """
        if not hasattr(self, "_engine"):  # torch's constructor adds the first groups
            self._append_group(param_group)
            return
        problem: Exception | None = None
        before = len(self.param_groups)
        try:
            if self._engine.reducer.has_begun:
                raise RuntimeError(
                    "ShardedAdaBelief.add_param_group came between backward and step, when "
                    "gradients are reduced already; call it after step()."
                )
            self._append_group(param_group)
            self._check_params()
        except (TypeError, ValueError, RuntimeError) as error:
            problem = error
        try:
            raise_together(self.comm, problem)
            self._connect_own(self.comm, self._params[0].device, self._timeout)
            self._wait()
            self._engine.build(self._params, self.param_groups, self.state, keep_buckets=True)
        except Exception:
            del self.param_groups[before:], self._group_ranks[before:]
            self._own_ranks.forget(before)
            self._check_params()
            raise

    def _append_group(self, param_group: dict[str, Any]) -> None:
        owned = {id(p) for group in self.param_groups for p in group["params"]}
        param_group, clipping, ranks = take_own(param_group)
        prepared = prepare_group(param_group, self.defaults, owned, "ShardedAdaBelief")
        split = split_by_decay(prepared, self._no_decay, "ShardedAdaBelief")
        check_split(split, clipping)
        for group in split:
            super().add_param_group({**group, **clipping})
            self._group_ranks.append(ranks)

    def _check_params(self) -> torch.device:
        """List the parameters of all groups, and return the device on which they lie."""
        self._params = [p for group in self.param_groups for p in group["params"]]
        device = common_device(self._params, "ShardedAdaBelief")
        for index, param in enumerate(self._params):
            self._options.check_param(param.dtype, self._label(index))
        return device

    def _shared_params(self) -> list[Tensor]:
        """Return the parameters that all ranks share."""
        groups = zip(self.param_groups, self._group_ranks, strict=True)
        return [p for group, ranks in groups if ranks is None for p in group["params"]]

    def _connect_own(
        self, comm: Collectives, device: torch.device, timeout: timedelta | None
    ) -> None:
        """Connect the process groups of param groups that are new."""
        parts = self._model_parallel.comm
        self._own_ranks.connect(
            self._group_ranks, self.param_groups, comm, parts, self._options, device, timeout
        )

    def _label(self, index: int) -> str:
        return param_label(self.param_groups, index)

    # - For adapters of engines

    def rebuild(self) -> None:
        """Move the parameters as they are now into new buffers; states begin anew.

        For engines that cast, broadcast or regroup parameters after the optimizer was built. Called
        by all ranks.
        """
        self._engine.masters.storage.check_not_lent()
        self._engine.read_guard.wait_all()
        self.state.clear()
        self._check_params()
        self._engine.build(self._params, self.param_groups, self.state, keep_buckets=False)

    __reduce_ex__ = refuse_copies

    # - Step

    def _wait(self) -> None:
        """Wait for the verdict and the gathers of the last step; for what needs the weights."""
        self._engine.masters.storage.check_not_lent()
        self._engine.read_verdict(self.param_groups)
        self._engine.read_guard.wait_all()

    def no_sync(self) -> AbstractContextManager[None]:
        """Accumulate gradients locally: no communication in backward passes inside the context.

        Without it, each pass is reduced. At stage 2 and with `micro_batches` it changes nothing:
        there, gradients are reduced pass by pass.
        """
        return self._engine.reducer.no_sync()

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        grad_scaler: GradScaler | None = None,
    ) -> float | None:
        """Average the gradients over the ranks and update the parameters; called by all ranks.

        If a gradient is not finite on any rank, all skip the step: nothing changes but that
        `skipped_steps` grows by one.

        Args:
            closure: Computes the loss again and returns it; runs with gradients enabled.
            grad_scaler: Passed by `grad_scaler.step(optimizer)`: gradients are divided by its
                scale within the update, and all ranks tell it alike whether the step was skipped.

        Raises:
            RuntimeError: `grad_scaler.unscale_` was called for this optimizer, or gradients travel
                as int8; or, on all ranks, their copies of a parameter differ.
            ValueError: On all ranks: they are at different steps, or have different options or loss
                scales. No rank has updated anything then, and `step` may be called again.
        """
        if grad_scaler is not None:
            check_scaler(grad_scaler, self, self._options)
        if self._engine.consensus.calls == 0:
            observers.notify(observers.on_first_step, self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        refuse_edits(self.param_groups, self._params, self.state, self._engine.update.states)
        with self._engine.phases("step"):
            self._wait()
            # What follows looks at thousands of tensors, each through every torch function mode
            # there is: another optimizer's guard, say. It needs none of them.
            with torch._C.DisableTorchFunction():
                loss_scale = None if grad_scaler is None else grad_scaler._get_scale_async()
                verdict = self._engine.step(self.param_groups, loss_scale)
                if grad_scaler is not None:
                    tell_scaler(grad_scaler, self, verdict)
        self._engine.gradient_hooks.raise_failure()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients; the flat buffers stay.

        After an exception in backward (out of memory, say) on some ranks, it gives the step up on
        these, while the others call `step`: all skip it, `skipped_steps` grows, training can go on.

        Args:
            set_to_none: Let backward write the next gradients, and not add to zeros (at stage 1).
        """
        self._engine.zero_grad(self.param_groups, set_to_none=set_to_none)

    # - What a user may read

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped: a gradient not finite, a spike, an exception in backward."""
        self._engine.read_verdict(self.param_groups)
        return self._engine.skipped_steps

    @property
    def last_step(self) -> LastStep:
        """What became of the last step: its number, whether it was taken, and why not."""
        self._engine.read_verdict(self.param_groups)
        return self._engine.last_step

    @property
    def options(self) -> EngineOptions:
        """How this optimizer shards, stores and communicates."""
        return self._options

    @property
    def layout(self) -> Layout:
        """Which shard has which elements of which parameter."""
        return self._engine.layout

    @property
    def comm(self) -> Collectives:
        """The ranks that share the states, or keep copies of them."""
        return self._engine.comm

    @property
    def is_model_parallel(self) -> bool:
        """Whether other ranks than those of `comm` hold other parts of the model."""
        return self._model_parallel.comm.world_size > 1

    @property
    def ranks_hold_parts(self) -> bool:
        """Whether other ranks hold other parameters, or other parts of them."""
        return self.is_model_parallel or bool(self._own_ranks.comms)

    def bytes_per_rank(self) -> dict[str, int]:
        """Return the bytes that this rank really holds, by kind; with `offload` on two devices."""
        return self._engine.nbytes()

    # - Saving and loading of this rank's shard

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's shard in torch's form, with a description of the sharding.

        Every rank saves its own; `load_state_dict` takes it back on the same rank of an equal
        layout. Tensors are views of the live state: copy or save them before the next step.

        Raises:
            RuntimeError: torch's get_optimizer_state_dict asks, whose callers take tensors for
                whole ones.
        """
        if is_called_by(TORCH_STATE_DICT):
            raise RuntimeError(
                "ShardedAdaBelief.state_dict is this rank's shard, which get_optimizer_state_dict "
                "would take for whole tensors; call it inside `with "
                "belief_dist.checkpoint.logical_states(optimizer):`, or use "
                "belief_dist.checkpoint.save."
            )
        self._engine.read_verdict(self.param_groups)
        return {**super().state_dict(), "sharding": self._sharding()}

    def _sharding(self) -> dict[str, Any]:
        """Describe the shard; the keys are those of saved ones."""
        return {
            "format": SHARD_FORMAT,
            "rank": self.comm.shard_index,
            "world_size": self.comm.num_shards,
            "layout": self.layout.fingerprint(),
            "part": list(coordinate_of(self._model_parallel.mesh)),
            "skipped_steps": self._engine.skipped_steps,
            "seed": self._options.seed,
            "spike_history": self.spike_history,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned on the same rank of an equally built optimizer.

        Called by all ranks, after the model's own weights were loaded: weights that are set later
        become the masters.

        Raises:
            TypeError, ValueError: On every rank, before anything is changed: some rank's is
                damaged, no shard of this optimizer, or of another rank, world size or layout.
        """
        with load_hooks(self, state_dict) as loaded:
            self._load(loaded)

    def _load(self, state_dict: dict[str, Any]) -> None:
        states = self._engine.update.states
        own = self.param_groups, states, self._sharding(), self._label
        check_together(self.comm, lambda: check_shard(state_dict, *own))
        self._wait()
        without_average = copy_shard_(state_dict, self.param_groups, states)
        self._engine.keep_loaded_masters()
        self._engine.update.start_averages(without_average)
        sharding = state_dict["sharding"]
        self._continue_from(
            sharding["skipped_steps"],
            sharding.get("seed", self._options.seed),
            sharding.get("spike_history", ()),
        )
