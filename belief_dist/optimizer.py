"""AdaBelief for one device, DDP, FSDP2 and DeepSpeed's ZeRO stages, which shard around it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from belief_dist import kernels, observers
from belief_dist.async_device import is_capturing
from belief_dist.device_scalars import DeviceScalars, device_scalars
from belief_dist.operands import Operands
from belief_dist.options import complete_options, shown
from belief_dist.params import NoDecay, as_groups, prepare_group, split_by_decay
from belief_dist.phases import Phases
from belief_dist.rule import StepScalars, compute_dtype, step_scalars, update_reference_
from belief_dist.sharding.dtensor import local_part
from belief_dist.state_dict import check_state_dict, check_state_entry, check_values, load_hooks
from belief_dist.state_init_step import is_state_init_step
from belief_dist.step_plan import Part, Plan, look


def _in_memory_order(operands: Operands) -> Operands | None:
    """Return contiguous operands, or None if their elements are laid out differently.

    Works for any dense strides that all tensors share, such as channels-last.
    """
    tensors = [value for value in operands if isinstance(value, Tensor)]
    if all(tensor.is_contiguous() for tensor in tensors):
        return operands
    first = tensors[0]
    dense = sum((n - 1) * s for n, s in zip(first.shape, first.stride(), strict=True)) + 1
    if dense != first.numel() or any(tensor.stride() != first.stride() for tensor in tensors):
        return None
    flat: dict[str, Any] = {
        name: value.as_strided((first.numel(),), (1,))
        for name, value in operands._asdict().items()
        if isinstance(value, Tensor)
    }
    return operands._replace(**flat)


class AdaBelief(Optimizer):
    r"""AdaBelief: Adam whose second moment is that of the gradient's deviation from its prediction.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1-\beta_1) g_t \\
        s_t &= \beta_2 s_{t-1} + (1-\beta_2) (g_t - m_t)^2 + \epsilon \\
        p_t &= (1 - \eta\lambda)\, p_{t-1}
               - \frac{\eta}{1-\beta_1^t} \frac{m_t}{\sqrt{s_t / (1-\beta_2^t)} + \epsilon}

    Args:
        params: Parameters, (name, parameter) pairs, param groups, or an iterator of them; float32,
            float64, bfloat16 or float16. States of 16-bit parameters are float32.
        lr: Learning rate, >= 0; a number or a tensor with one element.
        betas: Decay rates of m and s, each in [0, 1).
        eps: Added to s at every step and to the denominator, > 0. It is *not* Adam's eps: since it
            accumulates in s, the denominator never falls below sqrt(eps / (1 - beta2)). Adam's
            usual 1e-8 would turn AdaBelief into something close to SGD with momentum.
        weight_decay: >= 0.
        weight_decouple: Shrink parameters by 1 - lr * weight_decay (AdamW) instead of adding
            weight_decay * parameter to the gradient.
        fixed_decay: Shrink by 1 - weight_decay, whatever lr is.
        rectify: RAdam's rectification. Off by default (the official class turns it on; the paper
            never used it, and large-model jobs bring their own warm-up).
        degenerated_to_sgd: With rectify, move along m while the variance of s is intractable;
            otherwise leave the parameter alone.
        amsgrad: Divide by the largest s so far. Cannot be combined with rectify.
        maximize: Ascend instead of descending.
        no_decay: "1d" exempts parameters of fewer than 2 dimensions (biases, norms) from weight
            decay; a function of (name, parameter) returns True for those to exempt (name is None
            if parameters came without names). They become a param group of their own, after the
            one that they came in, also in `add_param_group`.
        foreach: True updates all tensors of a group by torch's multi-tensor operations.
        fused: True insists on a compiled kernel and raises without one; False uses plain torch;
            None takes the fastest that is usable.
        capturable: Keep step counts on the device and read them, and learning rates that are
            tensors, there, so that a CUDA graph can capture `step`. Needs Triton on GPUs.

    All options except the last four may differ per param group and travel in the state_dict.
    A parameter's state is ``{"step": int, "exp_avg": m, "exp_avg_sq": s}``, with
    ``max_exp_avg_sq`` under amsgrad; with capturable, step is a tensor that all parameters share
    which have taken the same steps.

    Raises:
        TypeError: An argument has the wrong type, or an option is unknown.
        ValueError: A value is out of range, or there are no parameters.

    Source: arXiv:2010.07468, Algorithm 2; switches as in adabelief-pytorch 0.2.1.
    """

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
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        **other_spellings: Any,
    ) -> None:
        """See the class."""
        defaults = complete_options(locals(), other_spellings, "AdaBelief")
        kernels.check_choice()
        for name, value in {"foreach": foreach, "fused": fused, "capturable": capturable}.items():
            if not (isinstance(value, bool) or (value is None and name != "capturable")):
                allowed = "True or False" if name == "capturable" else "True, False or None"
                raise TypeError(f"{name} must be {allowed}, got {shown(value)}.")
        if fused and foreach:
            raise ValueError("fused=True and foreach=True exclude each other; set one of them.")
        if capturable and (foreach or fused is False):
            raise ValueError(
                "capturable=True needs the compiled kernel, which reads the step on the device; "
                "leave out foreach and fused."
            )
        if fused:
            kernels.require_fused()
        self._fused = fused
        self._foreach = foreach
        self._capturable = capturable
        self._no_decay = no_decay
        self._plans: dict[int, Plan] = {}
        self._phases = Phases()
        super().__init__(as_groups(params, "AdaBelief"), defaults)
        observers.notify(observers.on_built, self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; options that it leaves out are those of the constructor."""
        owned = {id(p) for group in self.param_groups for p in group["params"]}
        prepared = prepare_group(param_group, self.defaults, owned, "AdaBelief")
        for group in split_by_decay(prepared, self._no_decay, "AdaBelief"):
            super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: Computes the loss again and returns it; runs with gradients enabled.

        Raises:
            RuntimeError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        creates_states_only = not self.state and is_state_init_step()
        with self._phases("step"):
            for number, group in enumerate(self.param_groups):
                params = [param for param in group["params"] if param.grad is not None]
                if params and self._update_again(number, params, group):
                    continue
                for param in params:
                    self._complete_state(param, group)
                if params and not creates_states_only:
                    self._update(params, group)
        return loss

    def _complete_state(self, param: Tensor, group: Mapping[str, Any]) -> None:
        if param.grad is not None and param.grad.is_sparse:
            raise RuntimeError(
                f"AdaBelief cannot use a sparse gradient (parameter of shape "
                f"{tuple(param.shape)}); build the embedding with sparse=False."
            )
        state = self.state[param]
        if not state:
            self.state[param] = self._new_state(param, group["amsgrad"], param.device)
        elif group["amsgrad"] and "max_exp_avg_sq" not in state:  # switched on later
            state["max_exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])

    @staticmethod
    def _new_state(param: Tensor, amsgrad: bool, device: torch.device | str) -> dict[str, Any]:
        keys = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * amsgrad
        dtype = compute_dtype(param.dtype)
        return {
            "step": 0,
            **{key: torch.zeros_like(param, dtype=dtype, device=device) for key in keys},
        }

    def _advance(self, params: list[Tensor]) -> None:
        """Count one more step of each parameter."""
        if not self._capturable:
            for param in params:
                state = self.state[param]
                # Rebound, never changed in place: DeepSpeed's stage-3 loader shares one step
                # object between all sub-groups.
                state["step"] = int(state["step"]) + 1
            return
        sharing = Counter(id(state["step"]) for state in self.state.values() if state)
        together: dict[int, list[Tensor]] = {}
        for param in params:
            together.setdefault(id(self.state[param]["step"]), []).append(param)
        for name, same in together.items():
            step = self.state[same[0]]["step"]
            if len(same) == sharing[name]:
                step += 1  # in place: a captured graph counts on at every replay
                continue
            if is_capturing(step.device):
                raise RuntimeError(
                    "the parameters with a gradient are others than in the step before: run one "
                    "such step before a CUDA graph captures it."
                )
            step = step + 1  # others have no gradient this time
            for param in same:
                self.state[param]["step"] = step

    def _share_steps(self) -> None:
        """Let parameters whose counts are numbers, and equal, share a tensor that counts."""
        shared: dict[tuple[int, torch.device], Tensor] = {}
        for param, state in self.state.items():
            if not isinstance(state.get("step"), int):
                continue  # a captured graph may count on it
            key = (state["step"], param.device)
            if key not in shared:
                shared[key] = torch.tensor(key[0], dtype=torch.float32, device=param.device)
            state["step"] = shared[key]

    def _update(self, params: list[Tensor], group: Mapping[str, Any]) -> None:
        if self._capturable and any(type(self.state[param]["step"]) is int for param in params):
            self._share_steps()
        self._advance(params)
        for members in self._together(params):
            entries = [self._operands(params[member]) for member in members]
            scalars = self._scalars(params[members[0]], group)
            if isinstance(scalars, StepScalars) and kernels.prefers_foreach(
                entries[0].param, self._foreach, self._fused
            ):
                kernels.foreach_update_(entries, scalars)
            else:
                self._update_flat(entries, scalars)

    def _together(self, params: Sequence[Tensor]) -> list[list[int]]:
        """Return which parameters one call can take: nearly always all of a group."""
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for number, param in enumerate(params):
            step = self.state[param]["step"]
            count = step if isinstance(step, int) else id(step)
            kind = (count, param.device, param.dtype, cast(Tensor, param.grad).dtype)
            kinds.setdefault(kind, []).append(number)
        return list(kinds.values())

    def _operands(self, param: Tensor) -> Operands:
        state = self.state[param]
        return Operands(
            local_part(param),
            local_part(cast(Tensor, param.grad)),
            local_part(state["exp_avg"]),
            local_part(state["exp_avg_sq"]),
            local_part(state["max_exp_avg_sq"]) if "max_exp_avg_sq" in state else None,
        )

    def _scalars(self, param: Tensor, group: Mapping[str, Any]) -> StepScalars | DeviceScalars:
        step = self.state[param]["step"]
        if self._capturable:
            return device_scalars(group, step, group["lr"])
        return step_scalars(group, step)

    def _update_again(self, number: int, params: list[Tensor], group: Mapping[str, Any]) -> bool:
        """Update as in the step before if all is as it was; return whether it was done."""
        device = params[0].device
        if self._foreach or self._fused is False or kernels.serving(device) != "triton":
            return False
        seen = look(params, self.state, amsgrad=group["amsgrad"], capturable=self._capturable)
        plan = self._plans.get(number)
        if seen is None or plan is None or plan.rests_on != seen.rests_on:
            self._plans.pop(number, None)
            if seen is not None:
                self._plans[number] = Plan(seen.rests_on)
            return False
        if plan.parts is None:
            plan.parts = self._parts(params)
        if not plan.parts:
            return False
        if self._capturable:
            self._advance(params)
        else:
            for state in seen.states:
                state["step"] += 1  # an integer: `look` finds nothing else without capturable
        for launch, members in plan.parts:
            scalars = self._scalars(params[members[0]], group)
            if not launch.update_([seen.grads[member] for member in members], scalars):
                # A graph is captured, and these gradients were not there before.
                self._update_flat([self._operands(params[member]) for member in members], scalars)
        return True

    def _parts(self, params: Sequence[Tensor]) -> list[Part]:
        """Return the launches that update all of `params`; none if some need another way."""
        parts = []
        for members in self._together(params):
            work = [_in_memory_order(self._operands(params[member])) for member in members]
            present = [operands for operands in work if operands is not None]
            launch = kernels.again(present) if len(present) == len(work) else None
            if launch is None or any(operands.param.numel() == 0 for operands in present):
                return []
            parts.append(Part(launch, members))
        return parts

    def _update_flat(self, work: list[Operands], scalars: StepScalars | DeviceScalars) -> None:
        flat = [_in_memory_order(operands) for operands in work]
        kernels.update_([o for o in flat if o is not None], scalars, fused=self._fused)
        for operands, in_order in zip(work, flat, strict=True):
            if in_order is None:  # laid out in different ways
                host = scalars if isinstance(scalars, StepScalars) else scalars.on_host()[0]
                update_reference_(*operands[:4], host, max_exp_avg_sq=operands.max_exp_avg_sq)

    def state_dict(self) -> dict[str, Any]:
        """Return states and groups in torch's form; steps are numbers, with capturable too."""
        state_dict = super().state_dict()
        if self._capturable:
            state_dict["state"] = {
                index: {**state, "step": int(state["step"])} if state else state
                for index, state in state_dict["state"].items()
            }
        return state_dict

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles need; torch's own leaves out what it does not know."""
        own = ("_fused", "_foreach", "_capturable", "_no_decay")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` returned; plans are of other tensors."""
        self._plans = {}
        self._phases = Phases()
        super().__setstate__(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of AdaBelief; states keep their own dtype, whatever the parameter's.

        Raises:
            TypeError: An option of a saved group has the wrong type.
            ValueError: It does not fit these parameters, comes from another optimizer, or is
                damaged. The optimizer is then as it was.
        """
        with load_hooks(self, state_dict) as loaded:
            self._load(loaded)

    def _load(self, loaded: dict[str, Any]) -> None:
        saved_groups = check_state_dict(loaded, self.param_groups, "AdaBelief")
        # Ours are taken as they are; torch, which casts states to the parameter's dtype, gets what
        # wrappers keep beside them.
        entries: dict[Any, tuple[str, Tensor, dict[str, Any]]] = {}
        others: dict[Any, dict[str, Any]] = {}
        for saved, group in zip(saved_groups, self.param_groups, strict=True):
            for index, param in zip(saved["params"], group["params"], strict=True):
                entry = loaded["state"].get(index)
                if entry is None or (isinstance(entry, Mapping) and not entry):
                    continue  # it has not had a gradient yet
                own = self._new_state(param, saved["amsgrad"], "meta")
                label = index if isinstance(index, str) else f"number {index}"
                check_state_entry(label, entry, own)
                entries[index] = label, param, {key: entry[key] for key in own}
                others[index] = {key: entry[key] for key in entry if key not in own}
        check_values(
            (label, {key: local_part(value) for key, value in entry.items() if key != "step"})
            for label, _, entry in entries.values()
        )
        try:
            super().load_state_dict({**loaded, "state": others, "param_groups": saved_groups})
        except (TypeError, NotImplementedError) as error:
            raise TypeError(
                f"AdaBelief.load_state_dict: torch cannot copy what others keep beside the states: "
                f"{error}."
            ) from error
        for _, param, entry in entries.values():
            dtype = compute_dtype(param.dtype)
            own = {
                key: value.detach().to(device=param.device, dtype=dtype, copy=True)
                for key, value in entry.items()
                if key != "step"
            }
            self.state[param] = {"step": int(entry["step"]), **own, **self.state[param]}
