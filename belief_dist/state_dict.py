"""Loading a state_dict: is it one of this optimizer, for this model?"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from belief_dist.options import DEFAULTS, OPTION_NAMES

SHARD_FORMAT = 1  # of what ShardedAdaBelief.state_dict returns

# Without these a saved group is another optimizer's; what else it lacks came later.
_FIRST_OPTIONS = (
    "lr betas eps weight_decay weight_decouple fixed_decay rectify degenerated_to_sgd"
).split()
# Further keys of a parameter's state are those of wrappers (Lookahead's slow weights).
_OWN_KEYS = {
    *["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "remainder", "wire_error"],
    *["exp_avg_exponent", "exp_avg_sq_exponent", "max_exp_avg_sq_exponent", "exp_avg_var"],
}


def check_state_dict(
    state_dict: Any, param_groups: list[dict[str, Any]], where: str
) -> list[dict[str, Any]]:
    """Return the saved param groups after comparing their form with the optimizer's.

    Options that a group lacks get their defaults.

    Raises:
        ValueError: This is no optimizer's state_dict, or groups differ in number or length.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        keys = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else state_dict
        raise ValueError(
            f"{where}.load_state_dict needs a dict with 'state' and 'param_groups', "
            f"got {keys!r:.200}."
        )
    saved: list[dict[str, Any]] = list(state_dict["param_groups"])
    have = [len(group["params"]) for group in saved]
    want = [len(group["params"]) for group in param_groups]
    if have != want:
        raise ValueError(
            f"{where}.load_state_dict: the saved param groups hold {have} parameters, these hold "
            f"{want}; build the optimizer with the same model and groups as when saving."
        )
    for index, group in enumerate(saved):
        missing = [name for name in _FIRST_OPTIONS if name not in group]
        if missing:
            raise ValueError(
                f"{where}.load_state_dict: saved param group {index} has no {missing[0]!r}; "
                f"this is the state_dict of another optimizer."
            )
    return [{**{name: DEFAULTS[name] for name in OPTION_NAMES}, **group} for group in saved]


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
    if set(entry) & _OWN_KEYS != set(own):
        origin = ""
        if "exp_avg_var" in entry:
            origin = " This is a state of adabelief-pytorch or timm, whose s is called exp_avg_var."
        elif {"exp_avg", "exp_avg_sq"} <= set(entry):
            origin = " Was it saved with another amsgrad, master, state_dtype or parameter dtype?"
        raise ValueError(
            f"cannot load the state of parameter {label}: it has {sorted(entry)}, "
            f"but {sorted(own)} are needed.{origin}"
        )
    for key, value in own.items():
        if not isinstance(value, Tensor):
            continue
        loaded = entry[key]
        if not isinstance(loaded, Tensor):
            raise ValueError(
                f"cannot load {key} of parameter {label}: it must be a tensor, got {loaded!r:.50}."
            )
        if loaded.shape != value.shape:
            raise ValueError(
                f"cannot load {key} of parameter {label}: its shape is "
                f"{tuple(loaded.shape)}, {tuple(value.shape)} is needed."
            )
        # Numbers widen and narrow; codes of 8-bit states and halves of masters are no numbers.
        if loaded.dtype != value.dtype and not (
            loaded.is_floating_point() and value.is_floating_point()
        ):
            raise ValueError(
                f"cannot load {key} of parameter {label}: its dtype is {loaded.dtype}, "
                f"{value.dtype} is needed; build the optimizer with the state_dtype that was used "
                f"when saving."
            )


def check_sharding(saved: Any, own: Mapping[str, Any]) -> None:
    """Refuse a shard that another rank, world size or layout has saved.

    Args:
        saved: The entry "sharding" of the loaded state_dict.
        own: The same description of the optimizer that loads it.

    Raises:
        ValueError: It does not fit.
    """
    if not isinstance(saved, Mapping) or saved.get("format") != SHARD_FORMAT:
        raise ValueError(
            f"ShardedAdaBelief.load_state_dict needs its own shard with sharding format "
            f"{SHARD_FORMAT}, got {saved!r:.100}."
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
    check_state_dict(state_dict, param_groups, "ShardedAdaBelief")
    check_sharding(state_dict.get("sharding"), sharding)
    for index, own in enumerate(states):
        check_state_entry(label(index), state_dict["state"].get(index, {}), own)


def copy_shard_(
    state_dict: Mapping[str, Any],
    param_groups: list[dict[str, Any]],
    states: Sequence[dict[str, Any]],
) -> None:
    """Copy a shard that passed `check_shard` into states, in place, and into group options."""
    for index, own in enumerate(states):
        entry = state_dict["state"][index]
        for key, value in own.items():
            if isinstance(value, Tensor) and key in _OWN_KEYS:
                value.copy_(entry[key])
        own["step"] = int(entry["step"])
        own.update({key: deepcopy(entry[key]) for key in entry if key not in _OWN_KEYS})
    for saved, group in zip(state_dict["param_groups"], param_groups, strict=True):
        group.update({key: saved[key] for key in saved if key not in ("params", "param_names")})


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
    state_dict = state_dict.copy() if before else state_dict
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
