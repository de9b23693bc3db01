"""state_dicts of optimizers on one device, from and to a whole training state.

All number their parameters in the order of the groups. `AdaBelief` and ZeroRedundancyOptimizer
(consolidated) call s exp_avg_sq, adabelief-pytorch and timm exp_avg_var.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from belief_dist.checkpoint.formats.full_state import Whole
from belief_dist.options import DEFAULTS, OPTION_NAMES

_OFFICIAL = {"exp_avg_var": "exp_avg_sq", "max_exp_avg_var": "max_exp_avg_sq"}
# What adabelief-pytorch keeps in the optimizer instead of its state_dict, with its defaults.
OFFICIAL_SWITCHES = {
    "weight_decouple": True,
    "fixed_decay": False,
    "rectify": True,
    "degenerated_to_sgd": True,
}


def from_state_dict(
    state_dict: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    names: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    step: int | None = None,
) -> Whole:
    """Return the training state of an optimizer's state_dict and its model's.

    Args:
        state_dict: Of `AdaBelief`, adabelief-pytorch, timm's AdaBelief, or a consolidated
            ZeroRedundancyOptimizer around one of them.
        weights: The model's state_dict.
        names: Of the parameters, in the order of the groups; None takes "param_names" of the
            groups, or the weights' if they are as many.
        options: For what the state_dict does not tell; adabelief-pytorch keeps rectify (on),
            weight_decouple (on) and others in the optimizer itself.
        step: Of the run; None takes the parameters' largest.

    Raises:
        ValueError: Names are missing, or shapes do not fit.
    """
    groups = state_dict["param_groups"]
    count = sum(len(group["params"]) for group in groups)
    found = list(names) if names is not None else _names(groups, weights, count)
    if len(found) != count:
        raise ValueError(f"the state_dict has {count} parameters, but {len(found)} names are given")
    is_official = any("exp_avg_var" in entry for entry in state_dict["state"].values())
    base = {**DEFAULTS, **(OFFICIAL_SWITCHES if is_official else {})}
    whole = Whole({name: value.detach() for name, value in weights.items()})
    remaining = iter(found)
    for group in groups:
        members = [next(remaining) for _ in group["params"]]
        known = {k: _plain(v) for k, v in group.items() if k in (*OPTION_NAMES, "clip")}
        whole.groups.append({"params": members, "options": {**base, **known, **(options or {})}})
        for index, name in zip(group["params"], members, strict=True):
            entry = state_dict["state"].get(index)
            if name not in weights:
                raise ValueError(f"the weights have no parameter {name!r}, which is optimized.")
            if entry:
                whole.steps[name] = int(entry["step"])
                whole.states[name] = _states(name, entry, weights[name])
    whole.step = max(whole.steps.values(), default=0) if step is None else step
    return whole


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _states(name: str, entry: Mapping[str, Any], weight: Tensor) -> dict[str, Tensor]:
    states: dict[str, Tensor] = {}
    for key, value in entry.items():
        if isinstance(value, Tensor) and value.dim() + weight.dim() > 0 and key != "step":
            if value.shape != weight.shape:
                raise ValueError(
                    f"{key} of {name!r} has shape {tuple(value.shape)}, and its weight has "
                    f"{tuple(weight.shape)}; are names in the order of the groups?"
                )
            states[_OFFICIAL.get(key, key)] = value.detach()
        elif isinstance(value, Tensor) and key != "step":
            states[_OFFICIAL.get(key, key)] = value.detach()
    return states


def _names(
    groups: Sequence[Mapping[str, Any]], weights: Mapping[str, Tensor], count: int
) -> list[str]:
    if all("param_names" in group for group in groups):
        return [name for group in groups for name in group["param_names"]]
    if len(groups) == 1 and len(weights) == count:
        return list(weights)
    raise ValueError(
        f"the state_dict does not name its {count} parameters, and the {len(weights)} weights do "
        f"not tell which they are; pass names, in the order of the param groups."
    )


def to_state_dict(whole: Whole) -> dict[str, Any]:
    """Return a state_dict for `AdaBelief`; ZeroRedundancyOptimizer loads it too."""
    groups: list[dict[str, Any]] = []
    numbers: dict[str, int] = {}
    for group in whole.groups:
        members = list(range(len(numbers), len(numbers) + len(group["params"])))
        numbers |= dict(zip(group["params"], members, strict=True))
        options = {k: v for k, v in group["options"].items() if k != "clip"}
        groups.append({**options, "params": members, "param_names": list(group["params"])})
    state = {
        numbers[name]: {"step": whole.steps[name], **states}
        for name, states in whole.states.items()
    }
    return {"state": state, "param_groups": groups}


def to_official(whole: Whole) -> dict[str, Any]:
    """Return a state_dict for adabelief-pytorch 0.2.1.

    Its switches (weight_decouple, fixed_decay, rectify, degenerated_to_sgd) are arguments of its
    constructor, and do not travel.
    """
    back = {ours: theirs for theirs, ours in _OFFICIAL.items()}
    made = to_state_dict(whole)
    for group in made["param_groups"]:
        kept = ("lr", "betas", "eps", "weight_decay", "amsgrad", "params")
        for key in [key for key in group if key not in kept]:
            del group[key]
        group["buffer"] = [[None, None, None] for _ in range(10)]
    made["state"] = {
        index: {back.get(key, key): value for key, value in entry.items()}
        for index, entry in made["state"].items()
    }
    return made


@torch.no_grad()
def warm_start_from_adam(whole: Whole, *, eps: float = 1e-16) -> Whole:
    """Return AdaBelief's state from Adam's or AdamW's: m is kept, and s estimated.

    Adam's v estimates E[g^2]. For gradients that scatter independently around their mean,
    E[v - m^2] is 2 b1 / (1 + b1) of their variance, and AdaBelief's E[(g - m)^2] is
    2 b1^2 / (1 + b1) of it, so ``s = b1 (v - m^2)``, all corrected for bias. One m is a noisy
    witness: s is at least (1 - b1) v, so that no step is more than about three times Adam's. What
    eps has added in t steps, ``eps (1 - b2^t) / (1 - b2)``, is added.

    Args:
        whole: With Adam's states.
        eps: AdaBelief's; Adam's is something else and is not taken.
    """
    options = {name: group["options"] for group in whole.groups for name in group["params"]}
    states = {}
    for name, entry in whole.states.items():
        beta1, beta2 = options[name]["betas"]
        step = whole.steps[name]
        m, v = entry["exp_avg"], entry["exp_avg_sq"].double()
        first, second = 1 - beta1**step, 1 - beta2**step
        variance = v / second - (m.double() / first) ** 2
        s = torch.maximum(beta1 * variance, (1 - beta1) * v / second)
        s = s * second + eps * second / (1 - beta2)
        states[name] = {"exp_avg": m, "exp_avg_sq": s.to(m.dtype)}
    groups = [
        {"params": g["params"], "options": {**g["options"], "eps": eps, "amsgrad": False}}
        for g in whole.groups
    ]
    return Whole(
        whole.weights, states, whole.steps, groups, whole.dtypes, whole.aliases, whole.step
    )
