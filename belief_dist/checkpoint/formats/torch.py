"""Convert the state_dicts of unsharded optimizers from and to a full training state.

All number their parameters in the order of the groups. The second state is called exp_avg_sq by
`AdaBelief` and ZeroRedundancyOptimizer (consolidated), and exp_avg_var by adabelief-pytorch and
timm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from belief_dist.checkpoint.formats.full_state import FullState
from belief_dist.options import CLIPPING_NAMES, DEFAULTS, OPTION_NAMES
from belief_dist.state_dict import AVERAGE, check_form, count_steps

_OFFICIAL = {"exp_avg_var": "exp_avg_sq", "max_exp_avg_var": "max_exp_avg_sq"}
# Options that adabelief-pytorch does not put into its state_dict, with its defaults.
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
) -> FullState:
    """Return the training state given by the state_dicts of an optimizer and its model.

    Args:
        state_dict: Of `AdaBelief`, adabelief-pytorch, timm's AdaBelief, or a consolidated
            ZeroRedundancyOptimizer around one of them.
        weights: The model's state_dict.
        names: Names of the parameters, in the order of the groups; None takes "param_names" of the
            groups, or the names of the weights if their number is the same.
        options: Options that the state_dict does not hold; adabelief-pytorch keeps rectify (on),
            weight_decouple (on) and others in the optimizer object only.
        step: Step of the run; None takes the largest of the parameters' steps.

    Raises:
        ValueError: Names or states are missing, or shapes do not match.
    """
    groups = check_form(state_dict, "the file")
    count = sum(len(group["params"]) for group in groups)
    found = list(names) if names is not None else _names(groups, weights, count)
    if len(found) != count:
        raise ValueError(
            f"the state_dict has {count} parameters, but {len(found)} names are given."
        )
    is_official = any("exp_avg_var" in entry for entry in state_dict["state"].values())
    base = {**DEFAULTS, **(OFFICIAL_SWITCHES if is_official else {})}
    full = FullState({name: value.detach() for name, value in weights.items()})
    remaining = iter(found)
    for group in groups:
        members = [next(remaining) for _ in group["params"]]
        names = (*OPTION_NAMES, *CLIPPING_NAMES)
        known = {k: _plain(v) for k, v in group.items() if k in names}
        full.groups.append({"params": members, "options": {**base, **known, **(options or {})}})
        for index, name in zip(group["params"], members, strict=True):
            entry = state_dict["state"].get(index)
            if name not in weights:
                raise ValueError(f"the weights have no parameter {name!r}, which is optimized.")
            if entry:
                full.states[name] = _states(name, entry, weights[name])
                full.steps[name] = count_steps(repr(name), entry.get("step"))
    full.step = max(full.steps.values(), default=0) if step is None else step
    return full


def is_of_adam(state_dict: Mapping[str, Any]) -> bool:
    """Return whether the states are Adam's or AdamW's: alike in names, and without our switches.

    adabelief-pytorch and timm call the second state exp_avg_var.
    """
    has_its_name = any("exp_avg_sq" in entry for entry in state_dict["state"].values())
    return has_its_name and not any("weight_decouple" in g for g in state_dict["param_groups"])


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _states(name: str, entry: Mapping[str, Any], weight: Tensor) -> dict[str, Tensor]:
    states: dict[str, Tensor] = {}
    for key, value in entry.items():
        if isinstance(value, Tensor) and key != "step":
            if value.shape != weight.shape:
                raise ValueError(
                    f"{key} of {name!r} has shape {tuple(value.shape)}, and its weight has "
                    f"{tuple(weight.shape)}; are names in the order of the groups?"
                )
            states[_OFFICIAL.get(key, key)] = value.detach()
    if not {"exp_avg", "exp_avg_sq"} <= states.keys():
        raise ValueError(
            f"the state of {name!r} has {sorted(map(str, entry))}, and exp_avg and exp_avg_sq are "
            f"needed."
        )
    return states


def _names(
    groups: Sequence[Mapping[str, Any]], weights: Mapping[str, Tensor], count: int
) -> list[str]:
    if all("param_names" in group for group in groups):
        return [str(name) for group in groups for name in group["param_names"]]
    if len(groups) == 1 and len(weights) == count:
        return list(weights)
    raise ValueError(
        f"the state_dict does not name its {count} parameters, and the {len(weights)} weights do "
        f"not tell which they are; pass names, in the order of the param groups."
    )


def to_state_dict(full: FullState) -> dict[str, Any]:
    """Return a state_dict for `AdaBelief`; ZeroRedundancyOptimizer loads it too.

    Averages of the weights, which these do not keep, are left out.
    """
    groups: list[dict[str, Any]] = []
    numbers: dict[str, int] = {}
    for group in full.groups:
        members = list(range(len(numbers), len(numbers) + len(group["params"])))
        numbers |= dict(zip(group["params"], members, strict=True))
        options = {k: v for k, v in group["options"].items() if k not in CLIPPING_NAMES}
        groups.append({**options, "params": members, "param_names": list(group["params"])})
    state = {
        numbers[name]: {
            "step": full.steps[name],
            **{key: value for key, value in states.items() if key != AVERAGE},
        }
        for name, states in full.states.items()
    }
    return {"state": state, "param_groups": groups}


def to_official(full: FullState) -> dict[str, Any]:
    """Return a state_dict for adabelief-pytorch 0.2.1.

    Its switches (weight_decouple, fixed_decay, rectify, degenerated_to_sgd) are constructor
    arguments there, and not part of the state_dict.
    """
    official_names = {ours: theirs for theirs, ours in _OFFICIAL.items()}
    state_dict = to_state_dict(full)
    for group in state_dict["param_groups"]:
        kept = ("lr", "betas", "eps", "weight_decay", "amsgrad", "params")
        for key in [key for key in group if key not in kept]:
            del group[key]
        group["buffer"] = [[None, None, None] for _ in range(10)]
    state_dict["state"] = {
        index: {official_names.get(key, key): value for key, value in entry.items()}
        for index, entry in state_dict["state"].items()
    }
    return state_dict


@torch.no_grad()
def warm_start_from_adam(full: FullState, *, eps: float = 1e-16) -> FullState:
    """Return AdaBelief's state, estimated from Adam's or AdamW's: m is kept, s computed.

    Adam's v estimates E[g^2]. For gradients that scatter independently around their mean,
    E[v - m^2] is 2 b1 / (1 + b1) of their variance, and AdaBelief's E[(g - m)^2] is
    2 b1^2 / (1 + b1) of it, so ``s = b1 (v - m^2)``, all corrected for bias. As a single m is a
    noisy estimate of the mean, s is at least (1 - b1) v, so that no step is more than about three
    times Adam's. Added to this is what eps contributes in t steps, ``eps (1 - b2^t) / (1 - b2)``.

    Args:
        full: A state with Adam's moments.
        eps: AdaBelief's eps, which is not Adam's and therefore not taken from the state.
    """
    options = {name: group["options"] for group in full.groups for name in group["params"]}
    states = {}
    for name, entry in full.states.items():
        beta1, beta2 = options[name]["betas"]
        step = full.steps[name]
        m, v = entry["exp_avg"], entry["exp_avg_sq"].double()
        first, second = 1 - beta1**step, 1 - beta2**step
        variance = v / second - (m.double() / first) ** 2
        s = torch.maximum(beta1 * variance, (1 - beta1) * v / second)
        s = s * second + eps * second / (1 - beta2)
        states[name] = {"exp_avg": m, "exp_avg_sq": s.to(m.dtype)}
    groups = [
        {"params": g["params"], "options": {**g["options"], "eps": eps, "amsgrad": False}}
        for g in full.groups
    ]
    return FullState(full.weights, states, full.steps, groups, full.dtypes, full.aliases, full.step)
