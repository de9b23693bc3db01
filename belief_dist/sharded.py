"""ShardedAdaBelief: each rank keeps 1/world_size of the optimizer's state (ZeRO-1 and 2).

One training step, in the order of the files that do the work::

    backward   a full bucket of gradients starts its reduction    gradients.on_gradient
                                                                  collectives.start_reduce
    step       the reductions end; one small message is summed    norm, agreement
               every shard is updated by one fused pass           kernels.update_
               and starts on its way to the other ranks           collectives.start_gather
    forward    each layer waits for its own parameters            guard.ReadGuard
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from itertools import compress
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from belief_dist import kernels
from belief_dist import state_formats as storage
from belief_dist.deepspeed.patches import refuse_unknown_engine, watch_engines
from belief_dist.norm import norm_from_bins
from belief_dist.options import as_dtype, check_engine_options, complete_options
from belief_dist.params import NoDecay, as_groups, prepare_group, split_by_decay
from belief_dist.replacement_warning import warn_if_replaced
from belief_dist.rule import step_scalars
from belief_dist.sharding import codec as wire
from belief_dist.sharding.bucket import BucketBuffers
from belief_dist.sharding.collectives import Alone, Collectives
from belief_dist.sharding.cpu_offload import HostGradients, warn_of_one_thread
from belief_dist.sharding.dtensor import (
    coordinate_of,
    describe,
    find_mesh,
    local_part,
    stands_for_part,
)
from belief_dist.sharding.grad_reducer import FullGradients, Gradients, ShardedGradients
from belief_dist.sharding.layout import Bucket, Layout, ParamSpec, plan_layout
from belief_dist.sharding.process_groups import Reduction, connect, connect_mesh
from belief_dist.sharding.read_guard import ReadGuard
from belief_dist.sharding.step_consensus import (
    Agreed,
    Verdict,
    agree,
    agree_across,
    checksums,
    compare_ranks,
    fingerprint,
    raise_together,
    replica_fault,
)
from belief_dist.state_dict import (
    SHARD_FORMAT,
    check_sharding,
    check_state_dict,
    check_state_entry,
)
from belief_dist.state_formats import Operands
from belief_dist.state_init_step import TORCH_STATE_DICT, is_called_by

logger = logging.getLogger("belief_dist")


class _Work(NamedTuple):
    """What a step updates of one bucket: as a whole, or parameter by parameter."""

    whole: Operands
    parts: list[tuple[int, Operands]]  # with the index of the parameter


class ShardedAdaBelief(Optimizer):
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
        lr, betas, eps, weight_decay, weight_decouple, fixed_decay, rectify, degenerated_to_sgd,
            amsgrad, maximize: As for `AdaBelief`; each may differ per param group. A group with
            ``"clip": False`` neither counts in the gradient norm nor is clipped.
        no_decay: As for `AdaBelief`.
        process_group: The ranks to shard over: a process group, or a `DeviceMesh` of one
            dimension; None means all. A mesh of two dimensions shards over the last and keeps a
            copy of all shards for each index of the first (HSDP: a node for each row).
        stage: 1 shards states and masters over the ranks. 2 shards the gradients too: after
            backward `param.grad` is None, and `step` uses the gradients up. Each of several
            backward passes of a step is then reduced at once, so all ranks must run equally many.
        reduction: "ordered" sums gradients in rank order in float32; "native" uses the backend's
            reduce-scatter; "auto" is "ordered".
        reduce_dtype: Gradients are rounded to this dtype before they travel, and summed in float32:
            torch.float32, torch.bfloat16, or torch.int8 with a scale for every 256 elements and
            error feedback, see `wire`. None sends them as they are. Like state_dtype, it may be a
            name ("bfloat16"), as in JSON or YAML.
        master: "remainder" keeps the lower half only of a bfloat16 parameter's float32 master, as
            the parameter itself is the upper one: 2 bytes less, and the same masters from the same
            gradients, see `storage`. (Parameters round ties away from zero, and not to even.)
            "fp32" keeps the whole.
        state_dtype: torch.float32, or torch.bfloat16 (2 bytes) or torch.uint8 (1 byte and 1/256)
            for each element of exp_avg and exp_avg_sq, rounded stochastically, see `storage`. The
            bits then are still the same for any number of ranks and any bucket size.
        seed: Of the noise that rounds them.
        bucket_bytes: Size of a communication bucket in bytes.
        max_grad_norm: Clip the mean gradient to this global L2 norm inside `step`, or None.
        overlap: Reduce during backward and gather behind the next forward. False does both inside
            `step`, with the same bits.
        offload: "cpu" keeps master weights and states in the host's memory and updates them there:
            gradients come over and parameters go back bucket by bucket. The bits are the same.
        check_replicas: Compare a checksum of all ranks' parameters in every step, so that a change
            on some ranks only is an error and not a silent divergence.
        timeout: After which a rank that does not answer becomes an error.

    Shapes: for every bucket of n padded elements, flat parameters and gradients are (n,) in the
        parameters' dtype (no flat gradients at stage 2); master, exp_avg and exp_avg_sq are
        (n / world_size,), float32 (float64 for float64 parameters) or what `master` and
        `state_dtype` say; wire errors are (n,) in the parameters' dtype, with int8 only.

    Raises:
        TypeError: An argument has the wrong type, or an option is unknown.
        ValueError: A value is out of range, devices are mixed, or the ranks disagree about the
            parameters or options.
        RuntimeError: torch.distributed is needed but not initialized.

    Source: AdaBelief, arXiv:2010.07468, Algorithm 2; ZeRO, arXiv:1910.02054, section 5.
    """

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
        stage: Literal[1, 2] = 1,
        reduction: Reduction = "auto",
        reduce_dtype: torch.dtype | str | None = None,
        master: Literal["fp32", "remainder"] = "fp32",
        state_dtype: torch.dtype | str = torch.float32,
        seed: int = 0,
        bucket_bytes: int = 32 << 20,
        max_grad_norm: float | None = None,
        overlap: bool = True,
        offload: Literal["cpu"] | None = None,
        check_replicas: bool = True,
        timeout: timedelta = timedelta(minutes=10),
        **other_spellings: Any,
    ) -> None:
        """See the class."""
        self._reduce_dtype: torch.dtype | None = as_dtype(reduce_dtype)
        self._state_dtype: torch.dtype = as_dtype(state_dtype)
        dtypes = {"reduce_dtype": self._reduce_dtype, "state_dtype": self._state_dtype}
        arguments = {**locals(), **dtypes}
        self._built = False
        self._no_decay = no_decay
        self._master = master
        self._seed = seed
        self._buckets: list[BucketBuffers] = []
        device = torch.device("cpu")
        problem: Exception | None = None
        try:
            defaults = complete_options(arguments, other_spellings, "ShardedAdaBelief")
            check_engine_options(arguments)
            super().__init__(as_groups(params, "ShardedAdaBelief"), defaults)
            device = self._check_params()
        except (TypeError, ValueError) as error:
            problem = error
        self._links: Collectives = connect(process_group, reduction, device, timeout)
        problem = self._find_parts(problem, timeout)
        raise_together(self._links, problem)
        raise_together(self._parts, problem)

        self._bucket_bytes = bucket_bytes
        self._max_grad_norm = max_grad_norm
        self._overlap = overlap
        self._stage = stage
        self._check_replicas = check_replicas
        self._offload = offload
        if offload:
            warn_of_one_thread(self._links.num_ranks)
        self._guard = ReadGuard()
        self.grad_norm = torch.zeros((), dtype=torch.float64, device=device)
        self._step_calls = 0
        self._skipped = 0
        self._verdict: tuple[Tensor, list[int]] | None = None
        # On a GPU the host runs ahead of the device, and reads the verdict when it has long come;
        # an update on the host must know it.
        self._defers_verdict = device.type != "cpu" and offload is None
        self._build()
        self._built = True
        watch_engines()
        warn_if_replaced(self)

    # - Construction

    def _find_parts(self, problem: Exception | None, timeout: timedelta) -> Exception | None:
        """Connect to the ranks that hold other parts of a tensor-parallel model, if it is one."""
        self._parts: Collectives = Alone(None)
        self._mesh: DeviceMesh | None = None
        if problem is None:
            try:
                self._mesh = find_mesh(self._params, self._links.members)
            except ValueError as error:
                return error
        if self._mesh is not None:
            self._parts = connect_mesh(self._mesh, timeout)
        return problem

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, its parameters in buckets of their own; called by all ranks.

        Its parameters become those of the first rank. All else stays as it is.

        Raises:
            TypeError: As for the constructor.
            ValueError: As for the constructor. The optimizer is then as it was.
            RuntimeError: Gradients of the next step have been reduced already.
        """
        if not self._built:
            self._append_group(param_group)
            return
        problem: Exception | None = None
        before = len(self.param_groups)
        try:
            if self._gradients.has_begun:
                raise RuntimeError(
                    "ShardedAdaBelief.add_param_group came between backward and step, when "
                    "gradients are reduced already; call it after step()."
                )
            self._append_group(param_group)
            self._check_params()
        except (TypeError, ValueError, RuntimeError) as error:
            problem = error
        try:
            raise_together(self._links, problem)
            self._resolve_verdict()
            self._guard.settle_all()
            self._build()
        except Exception:
            del self.param_groups[before:]
            self._check_params()
            raise

    def _append_group(self, param_group: dict[str, Any]) -> None:
        owned = {id(p) for group in self.param_groups for p in group["params"]}
        clip = True
        if isinstance(param_group, Mapping):
            param_group = dict(param_group)
            clip = param_group.pop("clip", True)
        if not isinstance(clip, bool):
            raise TypeError(f"clip of a param group must be True or False, got {clip!r}.")
        prepared = prepare_group(param_group, self.defaults, owned, "ShardedAdaBelief")
        for group in split_by_decay(prepared, self._no_decay, "ShardedAdaBelief"):
            super().add_param_group({**group, "clip": clip})

    def _check_params(self) -> torch.device:
        self._params = [p for group in self.param_groups for p in group["params"]]
        devices = {param.device for param in self._params}
        if len(devices) > 1:
            raise ValueError(
                f"ShardedAdaBelief needs all parameters on one device, got "
                f"{', '.join(sorted(map(str, devices)))}; move the model before building it."
            )
        device: torch.device = devices.pop()
        if device.type == "meta":
            raise ValueError("ShardedAdaBelief needs real parameters, got the meta device.")
        for index, param in enumerate(self._params):
            self._check_dtype(index, param.dtype)
        return device

    def _check_dtype(self, index: int, dtype: torch.dtype) -> None:
        if dtype == torch.float64 and self._reduce_dtype is not None:
            raise ValueError(
                f"reduce_dtype={self._reduce_dtype} would narrow the gradient of float64 "
                f"parameter {self._label(index)}; leave it None, or use float32 parameters."
            )
        if dtype == torch.float64 and self._state_dtype != torch.float32:
            raise ValueError(
                f"state_dtype={self._state_dtype} would narrow the states of float64 parameter "
                f"{self._label(index)}; leave it out, or use float32 parameters."
            )
        if dtype == torch.float16 and self._master == "remainder":
            raise ValueError(
                f"master='remainder' cannot serve float16 parameter {self._label(index)}, which "
                f"is not the upper half of a float32 number; use bfloat16, or master='fp32'."
            )

    def _label(self, index: int) -> str:
        for group in self.param_groups:
            if index < len(group["params"]):
                names = group.get("param_names")
                shape = tuple(group["params"][index].shape)
                return f"{names[index]!r}" if names else f"number {index} of shape {shape}"
            index -= len(group["params"])
        raise IndexError(index)

    def _specs(self) -> list[ParamSpec]:
        # What is laid out stays where it is, though it may have been unfrozen since.
        specs = list(self._layout.params) if self._built else []
        known = len(specs)
        for number, group in enumerate(self.param_groups):
            for position, param in enumerate(group["params"]):
                if known > 0:
                    known -= 1
                    continue
                names = group.get("param_names")
                specs.append(
                    ParamSpec(
                        name=names[position] if names else str(len(specs)),
                        shape=tuple(local_part(param).shape),
                        dtype=str(param.dtype).removeprefix("torch."),
                        itemsize=param.element_size(),
                        group=number,
                        kind=describe(param) + ("" if param.requires_grad else "frozen"),
                    )
                )
        return specs

    def _agree_on_everything(self, layout: Layout) -> None:
        """Compare model and options over the ranks: a mismatch is an error and not a hang."""
        engine = (
            self._bucket_bytes,
            self._max_grad_norm,
            self._overlap,
            type(self._links).__name__,
            self._stage,
            self._reduce_dtype,
            self._check_replicas,
            self._offload,
            self._master,
            self._state_dtype,
            self._seed,
        )
        options: dict[str, list[Any]] = {
            "options of param group": self._options(),
            "(bucket_bytes, max_grad_norm, overlap, reduction, stage, reduce_dtype, "
            "check_replicas, offload, master, state_dtype, seed)": [engine],
        }
        model: dict[str, list[Any]] = {
            "number of parameters": [len(self._params)],
            "parameter": list(layout.params),
        }
        compare_ranks(self._links, {**model, **options})
        compare_ranks(self._parts, options)

    def _options(self) -> list[dict[str, Any]]:
        keys = (*self.defaults, "clip")
        return [{key: group[key] for key in keys} for group in self.param_groups]

    def _build(self) -> None:
        """Lay out all parameters; buckets that exist already are the same and stay."""
        layout = plan_layout(
            self._specs(),
            self._links.world_size,
            self._bucket_bytes,
            copies=self._links.copies,
            block=max(
                wire.BLOCK if self._reduce_dtype == torch.int8 else 1,
                storage.BLOCK if self._state_dtype == torch.uint8 else 1,
            ),
        )
        self._agree_on_everything(layout)
        self._layout = layout
        existing = {buffers.bucket: buffers for buffers in self._buckets}
        self._buckets = []
        rank = self._links.rank
        for plan in self._layout.buckets:
            if plan in existing:
                self._buckets.append(existing[plan])
                continue
            bucket = BucketBuffers(
                plan,
                [local_part(self._params[slot.param]) for slot in plan.slots],
                rank,
                amsgrad=self.param_groups[plan.group]["amsgrad"],
                keep_grad=self._stage == 1,
                offload=self._offload is not None,
                encodes=self._reduce_dtype == torch.int8,
                remainders=self._master == "remainder",
                state_dtype=None if self._state_dtype == torch.float32 else self._state_dtype,
            )
            self._links.broadcast_(bucket.flat_param)
            bucket.refresh_master()
            self._buckets.append(bucket)
        for index, param in enumerate(self._params):
            if param not in self.state:
                self.state[param] = self._fragments(index)
        # Lists beside what is found by tensors: a step looks thousands of times.
        self._states = [self.state[param] for param in self._params]
        self._members = [[slot.param for slot in plan.slots] for plan in layout.buckets]
        # What must not be read while a bucket's gather is on the way: parameters, and of DTensors
        # the parts that `to_local` reads.
        self._watched = [[self._params[index] for index in members] for members in self._members]
        for params in self._watched:
            params += [part for p in list(params) if (part := local_part(p)) is not p]
        self._work: dict[tuple[int, int], _Work] = {}
        self._param_versions = [param._version for param in self._params]
        self._host_gradients = HostGradients(self._buckets) if self._offload else None
        if self._built:
            self._gradients.close()
        gradients = FullGradients if self._stage == 1 else ShardedGradients
        self._knows_order = False
        self._gradients: Gradients = gradients(
            self._params,
            self._buckets,
            self._links,
            counts=[self._counts(bucket.bucket) for bucket in self._buckets],
            overlap=self._overlap,
            wire_dtype=self._reduce_dtype,
            label=self._label,
            is_last=lambda: self._is_last_backward(),
        )

    def _counts(self, bucket: Bucket) -> bool:
        """Tell whether the gradients of a bucket count in the norm, on this rank."""
        param = self._params[bucket.slots[0].param]  # all others of the bucket are cut like it
        return self.param_groups[bucket.group]["clip"] and stands_for_part(param, self._mesh)

    def _fragments(self, index: int) -> dict[str, Any]:
        """Return the state of one parameter: views of the part that this rank owns."""
        buffers = self._buckets[self._layout.place(index)[0]]
        own = self._own_part(index)._asdict()
        state: dict[str, Any] = {"step": 0, **{name: own[name] for name in buffers.states}}
        if buffers.has_master:
            state["master"] = own["param"]
        if buffers.remainder is not None:
            state["remainder"] = own["remainder"]
        if buffers.wire_error is not None:
            slot = self._layout.place(index)[1]
            state["wire_error"] = buffers.wire_error[slot.start : slot.stop]
        return state

    def _own_part(self, index: int) -> Operands:
        """Return what this rank updates of one parameter, as views."""
        part = self._layout.fragment(index, self._links.rank)
        buffers = self._buckets[part.bucket]
        whole = buffers.operands(buffers.grad_shard)
        return storage.cut(whole, part.in_shard, part.in_shard + part.numel)

    # - Step

    def _is_last_backward(self) -> bool:
        """Tell whether the backward pass that begins is the last of its step, outside `no_sync`."""
        return True

    def _check_caller(self) -> None:
        """Refuse the first step of a DeepSpeed engine that did not hand itself over."""
        refuse_unknown_engine()

    def no_sync(self) -> AbstractContextManager[None]:
        """Accumulate gradients locally: no communication in backward passes inside the context.

        At stage 2 it changes nothing: keeping a full gradient is what that stage avoids.
        """
        return self._gradients.no_sync()

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        grad_scaler: GradScaler | None = None,
    ) -> float | None:
        """Average the gradients over the ranks and update the parameters; called by all ranks.

        If a gradient is not finite on any rank, all ranks skip the step: parameters, states and
        step counts stay as they are, and `skipped_steps` grows by one.

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
        if grad_scaler is not None and _is_unscaled(grad_scaler, self):
            raise RuntimeError(
                "ShardedAdaBelief divides by the loss scale itself, after gradients were summed "
                "over the ranks: leave out scaler.unscale_(optimizer), and clip by max_grad_norm."
            )
        if grad_scaler is not None and self._reduce_dtype == torch.int8:
            raise RuntimeError(
                "reduce_dtype=torch.int8 does not work with a GradScaler, whose changing scale "
                "would spoil the errors that are fed back; use bfloat16 parameters without one."
            )
        if self._step_calls == 0:
            self._check_caller()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._resolve_verdict()
        self._guard.settle_all()
        # What follows looks at thousands of tensors, each through every torch function mode there
        # is: another optimizer's guard, say. It needs none of them.
        with torch._C.DisableTorchFunction():
            self._step(grad_scaler)
        return loss

    def _step(self, grad_scaler: GradScaler | None) -> None:
        versions = [param._version for param in self._params]
        if versions != self._param_versions:
            self._take_over(versions)
        self._gradients.finish()
        loss_scale = None if grad_scaler is None else grad_scaler._get_scale_async()
        agreed = self._agree(loss_scale)
        if not self._defers_verdict:
            self._raise_if_apart(Verdict(int(agreed.verdict)))
        skip = agreed.verdict > Verdict.UPDATE
        if grad_scaler is not None:
            checks = {skip.device: skip.to(torch.float32)}
            grad_scaler._per_optimizer_states[id(self)]["found_inf_per_device"] = checks
        updated = self._update(agreed.used, self._scales(agreed.bins, loss_scale), skip)
        self._gradients.end_step()
        if agreed.order is not None:
            self._gradients.set_order(agreed.order)
        self._verdict = (agreed.verdict, updated)
        if not self._defers_verdict:
            self._resolve_verdict()

    def _take_over(self, versions: list[int]) -> None:
        """Somebody has set parameters (loaded weights, say): their master weights follow."""
        pairs = zip(self._param_versions, versions, strict=True)
        for index in (index for index, (old, new) in enumerate(pairs) if old != new):
            part = self._layout.fragment(index, self._links.rank)
            self._buckets[part.bucket].refresh_master(part.in_shard, part.in_shard + part.numel)
        self._param_versions = versions

    def _agree(self, loss_scale: Tensor | None) -> Agreed:
        """Exchange the one small message of a step."""
        self._step_calls += 1
        gradients, device = self._gradients, self.grad_norm.device
        bins = gradients.bins.clone()
        bins[-1] += gradients.other_bins[-1]  # not finite is not finite, whether clipped or not
        self._replica_sums = bins.new_zeros(len(self._buckets))
        if self._check_replicas and self._links.num_ranks > 1:
            self._replica_sums = checksums([bucket.flat_param for bucket in self._buckets])
        used = gradients.used()
        learns = not self._knows_order and self._links.num_ranks > 1
        self._knows_order = True
        agreed = agree(
            self._links,
            bins=bins,
            used=used,
            step=fingerprint((self._step_calls, self._options()), loss_scale, device),
            replica=self._replica_sums.sum(),
            completed=gradients.completed if learns else None,
            num_buckets=len(self._buckets),
        )
        return agree_across(self._parts, agreed) if self._mesh is not None else agreed

    def _scales(self, bins: Tensor, loss_scale: Tensor | None) -> dict[bool, Tensor]:
        """Return the factor on summed gradients, float64, for groups with clip True and False."""
        norm = norm_from_bins(bins)
        mean = torch.full_like(norm, 1.0 / self._links.num_ranks)
        if loss_scale is not None:
            mean /= loss_scale
        self.grad_norm = norm * mean
        clipped = mean
        if self._max_grad_norm is not None:
            # The same formula as torch.nn.utils.clip_grad_norm_.
            clipped = mean * (self._max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
        return {True: clipped, False: mean}

    def _update(self, used: list[bool], scales: dict[bool, Tensor], skip: Tensor) -> list[int]:
        """Update every shard and send it on its way, in the order in which forward needs them."""
        updated = list(compress(range(len(used)), used))
        for index in updated:
            self._states[index]["step"] += 1
        if self._offload:
            skip = skip.cpu()
            scales = {clip: scale.cpu() for clip, scale in scales.items()}
        # What nobody has used has not changed.
        changed = [
            number
            for number in reversed(self._gradients.order)
            if any(used[index] for index in self._members[number])
        ]
        buckets = [self._buckets[number] for number in changed]
        for number, bucket, grads in zip(changed, buckets, self._incoming(buckets), strict=True):
            group = self.param_groups[bucket.bucket.group]
            for step, work in self._work_of(number, grads, used).items():
                scalars = step_scalars(group, step)
                kernels.update_(work, scalars, grad_scale=scales[group["clip"]], skip=skip)
            bucket.send_back()
            if self._links.world_size > 1:
                handle = self._links.start_gather(bucket.flat_param)
                self._guard.expect(self._watched[number], handle.wait)
        if self._overlap:
            self._guard.arm()
        else:
            self._guard.settle_all()
        return updated

    def _incoming(self, buckets: Sequence[BucketBuffers]) -> Iterable[Tensor]:
        """Return the reduced gradients of each bucket, where they are updated."""
        if self._host_gradients is not None:
            return self._host_gradients.fetch(buckets)
        return (bucket.grad_shard for bucket in buckets)

    def _work_of(
        self, number: int, grads: Tensor, used: list[bool]
    ) -> dict[int, Sequence[Operands]]:
        """Return what to update of this rank's shard of a bucket, by number of the step.

        Almost always that is the whole shard at once. Parameters with another step count than
        their neighbours, or without a gradient on any rank, break it up; and so does stochastic
        rounding, whose noise belongs to the elements of a parameter.
        """
        key = (number, grads.data_ptr())
        work = self._work.get(key)
        if work is None:
            work = self._work[key] = self._plan_work(number, grads)
        indices = self._members[number]
        steps = {self._states[index]["step"] if used[index] else 0 for index in indices}
        if len(steps) == 1 and not storage.is_stochastic(self._state_dtype):
            return {step: [work.whole] for step in steps if step}
        found: dict[int, list[Operands]] = {}
        for index, part in work.parts:
            if used[index]:
                found.setdefault(self._states[index]["step"], []).append(part)
        return dict(found)

    def _plan_work(self, number: int, grads: Tensor) -> _Work:
        whole = self._buckets[number].operands(grads)
        parts = []
        for index in self._members[number]:
            part = self._layout.fragment(index, self._links.rank)
            if part.numel:
                own = storage.cut(whole, part.in_shard, part.in_shard + part.numel)
                key = storage.noise_key(self._seed, index)
                parts.append((index, own._replace(key=key, first=part.in_param)))
        return _Work(whole, parts)

    def _resolve_verdict(self) -> None:
        """Read whether the last step was skipped, and count it back if so.

        A verdict that was deferred is read in the next step.
        """
        if self._verdict is None:
            return
        verdict, updated = Verdict(int(self._verdict[0])), self._verdict[1]
        self._verdict = None
        if verdict == Verdict.UPDATE:
            return
        for index in updated:
            self._states[index]["step"] -= 1
        self._raise_if_apart(verdict)
        self._skipped += 1
        self._gradients.forget_errors()
        if self._links.rank == 0:
            logger.warning(
                "a gradient is not finite: step skipped on all ranks (%d so far)", self._skipped
            )

    def _raise_if_apart(self, verdict: Verdict) -> None:
        if verdict == Verdict.STEPS_DIFFER:
            compare_ranks(
                self._links,
                {"number of the step": [self._step_calls], "options of group": self._options()},
            )
            raise ValueError("ranks disagree about the loss scale; use equal GradScalers.")
        if verdict == Verdict.APART_ELSEWHERE:
            raise RuntimeError(
                "ranks that hold another part of the tensor-parallel model have come apart, see "
                "their error. Nothing was updated."
            )
        if verdict == Verdict.REPLICAS_DIFFER:
            self._guard.settle_all()
            labels = [self._label(index) for index in range(len(self._params))]
            buckets = [
                {
                    labels[slot.param]: local_part(self._params[slot.param])
                    for slot in bucket.bucket.slots
                }
                for bucket in self._buckets
            ]
            raise RuntimeError(replica_fault(self._links, self._replica_sums.tolist(), buckets))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients; the flat buffers stay.

        Args:
            set_to_none: Let backward write the next gradients instead of adding to zeros. At stage
                2 it makes no difference.
        """
        self._gradients.zero_grad(set_to_none=set_to_none)

    # - What a user may read

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because a gradient was not finite."""
        self._resolve_verdict()
        return self._skipped

    @property
    def layout(self) -> Layout:
        """Which rank owns which elements of which parameter."""
        return self._layout

    @property
    def is_part(self) -> bool:
        """Whether parameters are cut over the ranks of a tensor-parallel model."""
        return self._mesh is not None

    @property
    def state_is_8bit(self) -> bool:
        """Whether states are stored as `torch.uint8` codes."""
        return self._state_dtype == torch.uint8

    @property
    def seed(self) -> int:
        """Of the noise that rounds states."""
        return self._seed

    def bytes_per_rank(self) -> dict[str, int]:
        """Return the bytes that this rank really holds, by kind.

        With `offload`, masters, exp_avg and exp_avg_sq are in the host's memory.
        """
        total: dict[str, int] = {}
        for bucket in self._buckets:
            for kind, nbytes in bucket.nbytes().items():
                total[kind] = total.get(kind, 0) + nbytes
        total["gradients"] += self._gradients.nbytes()
        if self._host_gradients is not None:
            total["gradients on the host"] = self._host_gradients.nbytes()
        return total

    # - What a checkpoint of all ranks reads and writes

    @property
    def links(self) -> Collectives:
        """The ranks that share the states, or keep copies of them."""
        return self._links

    @torch.no_grad()
    def settle(self) -> None:
        """Wait for all that is under way: parameters, states and masters are those of this step."""
        self._resolve_verdict()
        self._guard.settle_all()
        versions = [param._version for param in self._params]
        if versions != self._param_versions:
            self._take_over(versions)

    def fragment_tensors(self, index: int) -> dict[str, Tensor]:
        """Return what this rank holds of parameter number `index`, as views; call `settle` first.

        The keys are those of its state, without "master" and "step", and "param": the master, which
        may be the parameter itself, or with "remainder" the upper half of the master. All belong to
        the elements of `layout.fragment`, but "wire_error" to the whole parameter.
        """
        held = {key: value for key, value in self._states[index].items() if key != "step"}
        held.pop("master", None)
        return {**held, "param": self._own_part(index).param}

    @torch.no_grad()
    def take_masters(self, *, skipped_steps: int, seed: int) -> None:
        """Make all parameters those of the masters, which have been written; called by all ranks.

        Args:
            skipped_steps: What `skipped_steps` shall be.
            seed: What `seed` shall be.
        """
        for bucket in self._buckets:
            if bucket.low_param is not None and bucket.remainder is None:
                bucket.low_param.copy_(bucket.master)
            bucket.send_back()
            if self._links.world_size > 1:
                self._links.start_gather(bucket.flat_param).wait()
        self._skipped, self._seed = skipped_steps, seed
        self._work.clear()  # it holds keys of the noise
        self._param_versions = [param._version for param in self._params]

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
        self._resolve_verdict()
        state_dict = super().state_dict()
        state_dict["sharding"] = self._sharding()
        return state_dict

    def _sharding(self) -> dict[str, Any]:
        return {
            "format": SHARD_FORMAT,
            "rank": self._links.rank,
            "world_size": self._links.world_size,
            "layout": self._layout.fingerprint(),
            "part": list(coordinate_of(self._mesh)),
            "skipped_steps": self._skipped,
            "seed": self._seed,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned on the same rank of an equally built optimizer.

        Called by all ranks, after the model's own weights were loaded: weights that are set later
        become the masters.

        Raises:
            ValueError: On every rank, before anything is changed: some rank's is not a shard of
                this optimizer, or of another rank, world size or layout.
        """
        problem, entries = None, []
        try:
            check_state_dict(state_dict, self.param_groups, "ShardedAdaBelief")
            check_sharding(state_dict.get("sharding"), self._sharding())
            for index, param in enumerate(self._params):
                entry = state_dict["state"].get(index, {})
                check_state_entry(self._label(index), entry, self.state[param])
                entries.append(entry)
        except ValueError as error:
            problem = error
        raise_together(self._links, problem)

        self._resolve_verdict()
        self._guard.settle_all()
        for param, entry in zip(self._params, entries, strict=True):
            own = self.state[param]
            for key, value in own.items():
                if isinstance(value, Tensor):
                    value.copy_(entry[key])
            own["step"] = int(entry["step"])
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            group.update({key: saved[key] for key in saved if key not in ("params", "param_names")})
        sharding = state_dict["sharding"]
        self._skipped = int(sharding["skipped_steps"])
        self._seed = int(sharding.get("seed", self._seed))
        self._work.clear()  # it holds keys of the noise
        for bucket in self._buckets:
            bucket.refresh_upper_halves()
        # Weights that were loaded before are not newer than the masters that were loaded now.
        self._param_versions = [param._version for param in self._params]


def _is_unscaled(grad_scaler: GradScaler, optimizer: Optimizer) -> bool:
    return bool(grad_scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.UNSCALED)
