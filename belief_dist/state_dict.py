"""Loading a state_dict: is it one of this optimizer, for this model?"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from belief_dist.options import DEFAULTS, OPTION_NAMES, as_float, shown, validate_options

logger = logging.getLogger("belief_dist")

SHARD_FORMAT = 1  # of what ShardedAdaBelief.state_dict returns
# What shards of older versions lack of their description.
_CAME_LATER = ("seed", "spike_history")

# Without these a saved group is another optimizer's; what else it lacks came later.
_FIRST_OPTIONS = (
    "lr betas eps weight_decay weight_decouple fixed_decay rectify degenerated_to_sgd"
).split()
AVERAGE = "param_ema"  # of a weight, among the states of its parameter
# Further keys of a parameter's state are those of wrappers (Lookahead's slow weights).
_OWN_KEYS = {
    *["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "remainder", "wire_error"],
    AVERAGE,
    *["exp_avg_exponent", "exp_avg_sq_exponent", "max_exp_avg_sq_exponent", "exp_avg_var"],
}
# More than any run takes, and no more than every float64 counts to.
_MOST_STEPS = 2**53
# What the values of a state must be: at least, at most, and in words. Of 8 bits, the exponents of
# their blocks tell. Where a gradient's square was infinite, s is: its elements do not move then.
_INF, _FINITE = float("inf"), 2.0**1023
_RANGES = {
    **dict.fromkeys(["exp_avg", "wire_error"], (-_FINITE, _FINITE, "finite numbers")),
    **dict.fromkeys(["exp_avg_sq", "max_exp_avg_sq"], (0.0, _INF, "numbers >= 0")),
    "exp_avg_exponent": (0, 248, "exponents of at most 248"),
    **dict.fromkeys(
        ["exp_avg_sq_exponent", "max_exp_avg_sq_exponent"], (0, 224, "exponents of at most 224")
    ),
}


def check_state_dict(
    state_dict: Any, param_groups: list[dict[str, Any]], where: str
) -> list[dict[str, Any]]:
    """Return the saved param groups after comparing their form with the optimizer's.

    Options that a group lacks get their defaults.

    Raises:
        TypeError: An option of a saved group has the wrong type.
        ValueError: This is no optimizer's state_dict, groups differ in number or length, or an
            option is out of range.
    """
    where = f"{where}.load_state_dict"
    saved = check_form(state_dict, where)
    have = [len(group["params"]) for group in saved]
    want = [len(group["params"]) for group in param_groups]
    if have != want:
        raise ValueError(
            f"{where}: the saved param groups hold {have} parameters, these hold "
            f"{want}; build the optimizer with the same model and groups as when saving."
        )
    complete = []
    for position, group in enumerate(saved):
        missing = [name for name in _FIRST_OPTIONS if name not in group]
        if missing:
            raise ValueError(
                f"{where}: saved param group {position} has no {missing[0]!r}; "
                f"this is the state_dict of another optimizer."
            )
        complete.append({**{name: DEFAULTS[name] for name in OPTION_NAMES}, **group})
        try:
            validate_options(complete[-1])
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: in saved param group {position}, {error}") from None
    return complete


def check_form(state_dict: Any, where: str) -> list[Mapping[str, Any]]:
    """Return the param groups of a state_dict that has the form which torch's optimizers give it.

    Args:
        state_dict: Of any optimizer.
        where: Begins the error.

    Raises:
        ValueError: It has another form, or states of parameters that no group lists.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        keys = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else state_dict
        raise ValueError(
            f"{where} needs a dict with 'state' and 'param_groups', got {shown(keys)}."
        )
    saved, state = state_dict["param_groups"], state_dict["state"]
    if not isinstance(state, Mapping) or not isinstance(saved, (list, tuple)):
        raise ValueError(
            f"{where} needs a dict of states and a list of param groups, got {shown(state)} and "
            f"{shown(saved)}."
        )
    for position, group in enumerate(saved):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            raise ValueError(
                f"{where}: saved param group {position} must be a dict with a list 'params', got "
                f"{shown(group)}."
            )
    _check_numbers(state, [each for group in saved for each in group["params"]], where)
    for label, entry in state.items():
        if not isinstance(entry, (Mapping, type(None))):
            raise ValueError(
                f"cannot load the state of parameter {shown(label)}: it must be a dict, got "
                f"{shown(entry)}."
            )
    return list(saved)


def _check_numbers(state: Mapping[Any, Any], params: Sequence[Any], where: str) -> None:
    """Refuse parameters that are listed twice, and states of parameters that are not listed."""
    # Numbers as torch gives them, or names, as in the forms that torch.distributed makes of them.
    odd = [each for each in params if isinstance(each, bool) or not isinstance(each, (int, str))]
    if odd or len(set(params)) < len(params):
        raise ValueError(
            f"{where}: the saved param groups must list each parameter once, by its number, got "
            f"{shown(odd or params)}."
        )
    for key in state:
        if isinstance(key, bool) or key not in params:
            raise ValueError(
                f"{where}: there is a state of {shown(key)}, a parameter that no saved param group "
                f"lists."
            )


def check_state_entry(label: str, entry: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse one parameter's loaded state unless it has the keys and shapes of its `own` state.

    Keys of others are let through.

    Args:
        label: Names the parameter in the error.
        entry: The loaded state.
        own: The state that it would replace.

    Raises:
        ValueError: It does not fit; the sentence tells whose state it looks like.
    """
    own = {key: value for key, value in own.items() if key in _OWN_KEYS}
    if _OWN_KEYS.intersection(entry) != set(own):
        origin = ""
        if "exp_avg_var" in entry:
            origin = " This is a state of adabelief-pytorch or timm, whose s is called exp_avg_var."
        elif {"exp_avg", "exp_avg_sq"} <= set(entry):
            origin = " Was it saved with another amsgrad, master, state_dtype or parameter dtype?"
        raise ValueError(
            f"cannot load the state of parameter {label}: it has {sorted(map(str, entry))}, "
            f"but {sorted(own)} are needed.{origin}"
        )
    count_steps(label, entry["step"])
    for key, value in own.items():
        if isinstance(value, Tensor):
            _check_tensor(f"cannot load {key} of parameter {label}", entry[key], value)


def _check_tensor(what: str, loaded: Any, own: Tensor) -> None:
    if not isinstance(loaded, Tensor):
        raise ValueError(f"{what}: it must be a tensor, got {shown(loaded)}.")
    if loaded.shape != own.shape:
        raise ValueError(
            f"{what}: its shape is {tuple(loaded.shape)}, {tuple(own.shape)} is needed."
        )
    if loaded.layout != torch.strided or loaded.is_meta:
        kind = "on the meta device" if loaded.is_meta else f"{loaded.layout}"
        raise ValueError(f"{what}: it must be a dense tensor, got one {kind}.")
    # Numbers widen and narrow; codes of 8-bit states and halves of masters are no numbers.
    if loaded.dtype != own.dtype and not (loaded.is_floating_point() and own.is_floating_point()):
        raise ValueError(
            f"{what}: its dtype is {loaded.dtype}, {own.dtype} is needed; build the optimizer with "
            f"the master and state_dtype that were used when saving."
        )


def count_steps(label: str, step: Any) -> int:
    """Return the loaded number of steps of a parameter: an int, or a tensor with one number.

    Raises:
        ValueError: It is no count.
    """
    try:
        value = as_float("step", step)
    except (TypeError, ValueError):
        value = -1.0
    if not (0.0 <= value <= _MOST_STEPS and value == int(value)):
        raise ValueError(
            f"cannot load the step of parameter {label}: it must be a whole number >= 0, got "
            f"{shown(step)}."
        )
    return int(value)


@torch.no_grad()
def check_values(states: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Refuse states with which the next step would make NaN of parameters.

    Every tensor is read once, where it is, and the host waits once for each device.

    Args:
        states: A parameter's label, and what this process holds of its loaded state.

    Raises:
        ValueError: s is negative somewhere, or something else is no number.
    """
    found: dict[torch.device, list[tuple[str, str, Tensor]]] = {}
    for label, state in states:
        for key in _RANGES.keys() & state.keys():
            if state[key].numel():
                low_high = torch.stack(torch.aminmax(state[key])).to(torch.float64)
                found.setdefault(low_high.device, []).append((label, key, low_high))
    for each in found.values():
        extremes = torch.stack([low_high for _, _, low_high in each]).tolist()
        for (label, key, _), (low, high) in zip(each, extremes, strict=True):
            least, most, what = _RANGES[key]
            if not (low >= least and high <= most):  # which NaN is not, either
                raise ValueError(
                    f"cannot load {key} of parameter {label}: it must hold {what}, got values "
                    f"from {low:.3g} to {high:.3g}; it is damaged, or the run had diverged. Load "
                    f"an earlier checkpoint."
                )


def check_sharding(saved: Any, own: Mapping[str, Any]) -> None:
    """Refuse a shard that another rank, world size or layout has saved.

    Args:
        saved: The entry "sharding" of the loaded state_dict.
        own: The same description of the optimizer that loads it.

    Raises:
        ValueError: It does not fit.
    """
    form = type(saved.get("format")) if isinstance(saved, Mapping) else None
    if form is not int or saved["format"] != SHARD_FORMAT:
        raise ValueError(
            f"ShardedAdaBelief.load_state_dict needs its own shard with sharding format "
            f"{SHARD_FORMAT}, got {shown(saved)}."
        )
    for key, value in own.items():
        loaded = saved.get(key, value if key in _CAME_LATER else None)
        fits = type(loaded) is type(value) and (key != "skipped_steps" or loaded >= 0)
        if fits and key == "spike_history":
            fits = all(type(each) is float and 0 <= each < math.inf for each in loaded)
        if not fits or (key == "part" and any(type(each) is not int for each in loaded)):
            raise ValueError(
                f"ShardedAdaBelief.load_state_dict: the shard is damaged, its {key} is "
                f"{shown(loaded)}."
            )
    if (saved["rank"], saved["world_size"]) != (own["rank"], own["world_size"]):
        raise ValueError(
            f"this is the shard of rank {saved['rank']} of {saved['world_size']}, but this process "
            f"is rank {own['rank']} of {own['world_size']}; every rank loads the shard that the "
            f"same rank saved."
        )
    if saved["part"] != own["part"]:
        raise ValueError(
            f"this shard belongs to part {saved['part']} of a tensor-parallel model, but this "
            f"process holds part {own['part']}."
        )
    if saved["layout"] != own["layout"]:
        raise ValueError(
            "this shard was saved with another layout; build the optimizer with the same "
            "parameters, groups, bucket_bytes, state_dtype and reduce_dtype as when saving, or use "
            "belief_dist.checkpoint, which loads any of them."
        )


def check_shard(
    state_dict: Any,
    param_groups: list[dict[str, Any]],
    states: Sequence[Mapping[str, Any]],
    sharding: Mapping[str, Any],
    label: Callable[[int], str],
) -> None:
    """Refuse what is not a shard that the optimizer which loads it could have saved.

    Args:
        state_dict: The loaded one.
        param_groups: Of the optimizer that loads it.
        states: Its state for every parameter.
        sharding: Its own entry "sharding".
        label: Names a parameter in errors.

    Raises:
        ValueError: It is none, or of another rank, world size or layout.
    """
    where = "ShardedAdaBelief"
    groups = check_state_dict(state_dict, param_groups, where)
    check_sharding(state_dict.get("sharding"), sharding)
    for position, (saved, group) in enumerate(zip(groups, param_groups, strict=True)):
        clip = saved.get("clip", True)
        if not isinstance(clip, bool):
            raise ValueError(
                f"{where}.load_state_dict: in saved param group {position}, clip must be True or "
                f"False, got {shown(clip)}."
            )
        if saved["amsgrad"] != group["amsgrad"]:
            raise ValueError(
                f"{where}.load_state_dict: saved param group {position} has "
                f"amsgrad={saved['amsgrad']}, and this one {group['amsgrad']}; build it alike."
            )
    if [each for group in groups for each in group["params"]] != list(range(len(states))):
        raise ValueError(
            f"{where}.load_state_dict: the saved param groups do not list the parameters in order; "
            f"the shard is damaged."
        )
    for index, own in enumerate(states):
        entry = state_dict["state"].get(index) or {}
        if (AVERAGE in entry) != (AVERAGE in own):  # it starts anew, or is left out
            entry, own = ({k: v for k, v in e.items() if k != AVERAGE} for e in (entry, own))
        check_state_entry(label(index), entry, own)
    check_values((label(index), state_dict["state"][index]) for index in range(len(states)))


def copy_shard_(
    state_dict: Mapping[str, Any],
    param_groups: list[dict[str, Any]],
    states: Sequence[dict[str, Any]],
) -> list[int]:
    """Copy a shard that passed `check_shard` into states, in place, and into group options.

    Returns:
        Of which parameters it holds no average, though one is kept here.
    """
    entries = [state_dict["state"][index] for index in range(len(states))]
    others = [
        {key: deepcopy(entry[key]) for key in entry if key not in _OWN_KEYS} for entry in entries
    ]
    for own, entry, other in zip(states, entries, others, strict=True):
        for key, value in own.items():
            if isinstance(value, Tensor) and key in _OWN_KEYS & entry.keys():
                value.copy_(entry[key])
        own["step"] = int(entry["step"])
        own.update(other)
    # The limit of a group's norm stays, as that of the model's: it says how to train from here on.
    kept = ("params", "param_names", "max_grad_norm")
    for saved, group in zip(state_dict["param_groups"], param_groups, strict=True):
        group.update({key: saved[key] for key in saved if key not in kept})
    pairs = enumerate(zip(states, entries, strict=True))
    without = [i for i, (own, entry) in pairs if AVERAGE in own and AVERAGE not in entry]
    if without:
        logger.info("the shard holds no averages: they start from the weights")
    return without


@contextmanager
def load_hooks(optimizer: Optimizer, state_dict: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Run the hooks that users have registered for `load_state_dict` around the loading itself.

    torch runs them inside its own `load_state_dict`, which ours check and complete: a hook that
    converts a state must come before the check, and one that looks at the result after all.

    Yields:
        What is to be loaded: the argument, or what the pre-hooks have made of it.
    """
    hooks = vars(optimizer)
    before = hooks["_optimizer_load_state_dict_pre_hooks"]
    after = hooks["_optimizer_load_state_dict_post_hooks"]
    if before and isinstance(state_dict, Mapping):  # what is none of it is refused below
        state_dict = dict(state_dict)
    for hook in before.values():
        changed = hook(optimizer, state_dict)
        if changed is not None:
            state_dict = changed
    names = ("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks")
    try:
        hooks.update({name: OrderedDict() for name in names})
        yield state_dict
    finally:
        hooks.update(zip(names, (before, after), strict=True))
    for hook in after.values():
        hook(optimizer)


@contextmanager
def answered_by(optimizer: Optimizer, **methods: Callable[..., Any]) -> Iterator[None]:
    """Have functions answer calls of an optimizer's methods inside the context.

    For frameworks that call `state_dict` and `load_state_dict`, and would take a shard for more.
    """
    for name, method in methods.items():
        setattr(optimizer, name, method)  # the instance's, in front of the class's
    try:
        yield
    finally:
        for name in methods:
            delattr(optimizer, name)
