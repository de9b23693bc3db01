"""The options of a param group: names, defaults, aliases, and one clear sentence for each mistake.

Validation happens here, once, for both optimizers, so that kernels and the engine never see a
value that they would have to check again.
"""

from __future__ import annotations

import difflib
import functools
import logging
import math
import numbers
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger("belief_dist")

# Spellings of other packages (timm, pytorch_optimizer, DeepSpeed's Adam) for the same switch.
ALIASES = {
    "decoupled_decay": "weight_decouple",
    "ams_bound": "amsgrad",
    "beta": "betas",
    "wd": "weight_decay",
    "learning_rate": "lr",
    "adam_w_mode": "weight_decouple",
    "adamw_mode": "weight_decouple",
}
# What is left over where a configuration said Adam before: the values that change nothing here,
# and why.
OF_ADAM: dict[str, tuple[tuple[Any, ...], str]] = {
    "torch_adam": ((True, False), "it chooses among implementations of Adam"),
    "bias_correction": ((True,), "AdaBelief always corrects the bias of its moments"),
    "fp32_optimizer_states": ((True,), "states are float32"),
    "set_grad_none": ((True, False), "zero_grad decides that"),
    "differentiable": ((False,), "steps are not differentiable"),
}
# How alike a key of a param group must be to one of ours to be taken for a slip of the pen. Other
# keys belong to schedulers, wrappers (SAM's rho) or the script (lr_scale, max_lr, name): as in any
# torch optimizer they are kept and saved.
_ALIKE = 0.75
# Alike all the same, but torch's and the schedulers' own.
_FOREIGN_GROUP_KEYS = {"decoupled_weight_decay", "max_lr", "min_lr", "initial_lr", "lr_scale"}
# The smallest positive number that float32 has; below half of it everything is rounded to 0.
LEAST_FLOAT32 = 2.0**-149
# The largest one.
_FLOAT32_MAX = (2.0 - 2.0**-23) * 2.0**127
# Of this size or more, eps is probably one that was meant for Adam.
_ADAMS_EPS = 1e-8
DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-16,
    "weight_decay": 0.0,
    "weight_decouple": True,
    "fixed_decay": False,
    "rectify": False,
    "degenerated_to_sgd": True,
    "amsgrad": False,
    "maximize": False,
}
OPTION_NAMES = tuple(DEFAULTS)
# What a param group of `ShardedAdaBelief` has beside these.
CLIPPING_NAMES = ("clip", "max_grad_norm")
# Of a constructor's local names, those that are no option.
_NO_OPTIONS = {"self", "params", "other_spellings", "__class__"}
_SWITCHES = tuple(name for name, value in DEFAULTS.items() if isinstance(value, bool))


def shown(value: Any) -> str:
    """Return what an error calls a value: one line, however long or odd the value is."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an int of many digits, or an object that cannot describe itself
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."


def is_one_of(value: Any, allowed: Iterable[Any]) -> bool:
    """Return whether a value equals one of the `allowed`; tensors and arrays never do."""
    if isinstance(value, Tensor) or getattr(value, "shape", ()) != ():
        return False
    return any(value == each for each in allowed)


def resolve_aliases(
    given: Mapping[str, Any], known: Iterable[str], where: str, *, also: Iterable[str] = ()
) -> dict[str, Any]:
    """Return `given` with other packages' spellings replaced by ours.

    Args:
        given: Keyword options as the user wrote them.
        known: Every name that is allowed here.
        where: Named in the error, for example "AdaBelief".
        also: Names that are written elsewhere, and which a misspelled one may have meant.

    Raises:
        TypeError: A name is unknown, or an alias and its target are both given.
    """
    allowed = sorted(set(known))
    resolved: dict[str, Any] = {}
    for name, value in given.items():
        target = ALIASES.get(name, name)
        if target not in allowed:
            allowed = sorted({*allowed, *also})
            guess = difflib.get_close_matches(name, [*allowed, *ALIASES], n=1)
            hint = f" Did you mean {ALIASES.get(guess[0], guess[0])!r}?" if guess else ""
            raise TypeError(f"{where} has no option {name!r}.{hint} Allowed: {', '.join(allowed)}.")
        if target != name and (target in given or target in resolved):
            raise TypeError(f"{where} got both {name!r} and {target!r}, which mean the same.")
        if target != name:
            _warn(f"{where}: option {name!r} is spelled {target!r} here; it was accepted.")
        resolved[target] = value
    return resolved


def is_first_rank() -> bool:
    """Return whether this process speaks for all: rank 0, or one without torch.distributed."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0)


def _warn(sentence: str) -> None:
    """Warn the caller of the optimizer's constructor, on one of all ranks."""
    if is_first_rank():
        warnings.warn(sentence, stacklevel=5)


@functools.cache  # once per process
def _warn_of_large_eps(eps: float, floor: float) -> None:
    if is_first_rank():
        logger.warning(
            "eps=%g is large for AdaBelief, which adds it to exp_avg_sq in every step: where "
            "gradients deviate from exp_avg by less than about %.0e, steps shrink with them as "
            "SGD's do. If this value was meant for Adam, or the Transformers Trainer put it in for "
            '"auto", leave eps out (the default is 1e-16).',
            eps,
            floor,
        )


def without_adams(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return `given` without what concerns Adam alone.

    Raises:
        ValueError: A value asks for what AdaBelief does not do.
    """
    kept = dict(given)
    for name in given.keys() & OF_ADAM.keys():
        value = kept.pop(name)
        harmless, reason = OF_ADAM[name]
        if not is_one_of(value, harmless):
            raise ValueError(f"{where} cannot serve {name}={shown(value)}: {reason}. Remove it.")
        _warn(f"{where}: option {name!r} is Adam's and was ignored: {reason}.")
    return kept


def _refuse_auto(given: Mapping[str, Any], where: str) -> None:
    for name, value in given.items():
        if isinstance(value, str) and value == "auto":
            raise TypeError(
                f"{where} got {name}='auto', which only the Transformers Trainer replaces, and "
                f"only for lr, betas, eps and weight_decay; write a value, or leave {name} out for "
                f"{DEFAULTS[name]!r}."
            )


def as_float(name: str, value: Any) -> float:
    """Return a number, or the one of a tensor with one element, as a float.

    Raises:
        TypeError: It is none.
        ValueError: It is an integer that no float can hold, or a tensor of more elements.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{name} must be one number, got a tensor of shape {tuple(value.shape)}."
            )
        if value.is_meta or value.is_complex() or value.dtype == torch.bool:
            kind = "on the meta device" if value.is_meta else f"of dtype {value.dtype}"
            raise TypeError(f"{name} must be a real number, got a tensor {kind}.")
        return float(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):  # NumPy's are, too
        raise TypeError(
            f"{name} must be a number, got {shown(value)} of type {type(value).__name__}; "
            f"write it without quotes in JSON or YAML, and with a point in YAML: 1.0e-16, where "
            f"1e-16 is text."
        )
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, and is larger than any float.") from None


def positive_or_none(name: str, value: Any) -> float | None:
    """Return a limit of a norm, or None.

    Raises:
        TypeError: It is no number.
        ValueError: It is not positive, or would not be in float32.
    """
    if value is None:
        return None
    limit = as_float(name, value)
    if not limit > 0.0:
        raise ValueError(f"{name} must be > 0 or None, got {limit}.")
    if limit < LEAST_FLOAT32:
        raise ValueError(
            f"{name} must be at least {LEAST_FLOAT32:.0e}, got {limit}: in float32 it would be 0, "
            f"and with it every gradient."
        )
    return limit


def _fits_float32(name: str, value: float, what: str) -> None:
    if value > _FLOAT32_MAX:
        raise ValueError(
            f"{name} is too large: {what} would be infinite in float32, whose largest number is "
            f"{_FLOAT32_MAX:.3g}."
        )


def plain_pair(betas: Any) -> Any:
    """Return another library's sequence, such as the one Hydra passes, as a tuple; else `betas`."""
    is_foreign = isinstance(betas, Sequence) and not isinstance(betas, (tuple, list, str, bytes))
    return tuple(betas) if is_foreign else betas


def validate_options(group: Mapping[str, Any]) -> None:
    """Check every option of a complete param group.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range, or two options exclude each other.
    """
    lr = as_float("lr", group["lr"])
    if not (math.isfinite(lr) and lr >= 0.0):
        raise ValueError(f"lr must be finite and >= 0, got {lr}.")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be a pair (beta1, beta2), got {shown(betas)}.")
    beta1, beta2 = (as_float(f"betas[{i}]", beta) for i, beta in enumerate(betas))
    for i, beta in enumerate((beta1, beta2)):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"betas[{i}] must be in [0, 1), got {beta}.")
    if beta1 == 0.0:
        warnings.warn(
            "betas[0] = 0 makes the gradient its own prediction: exp_avg_sq is eps alone and steps "
            "become about lr * gradient / sqrt(eps / (1 - beta2)), which usually ends in NaN; "
            "use betas[0] > 0.",
            stacklevel=4,
        )
    eps = as_float("eps", group["eps"])
    if not (math.isfinite(eps) and eps > 0.0):
        raise ValueError(
            f"eps must be finite and > 0, got {eps}: with 0 a parameter whose gradient is zero "
            f"becomes 0 / 0. The published default is 1e-16."
        )
    if eps < LEAST_FLOAT32:
        raise ValueError(
            f"eps must be at least {LEAST_FLOAT32:.0e}, got {eps}: in float32 it would be 0, and a "
            f"parameter whose gradient is zero would become 0 / 0."
        )
    weight_decay = as_float("weight_decay", group["weight_decay"])
    if not (math.isfinite(weight_decay) and weight_decay >= 0.0):
        raise ValueError(f"weight_decay must be finite and >= 0, got {weight_decay}.")
    _fits_float32(f"lr={lr}", lr / (1.0 - beta1), "the first step's lr / (1 - betas[0])")
    _fits_float32(f"eps={eps}", eps / (1.0 - beta2), "what it adds up to, eps / (1 - betas[1]),")
    for factor in (1.0, lr):
        _fits_float32(f"weight_decay={weight_decay}", factor * weight_decay, "a step's decay")
    for name in _SWITCHES:
        if not isinstance(group[name], bool):
            raise TypeError(f"{name} must be True or False, got {shown(group[name])}.")
    if group["rectify"] and group["amsgrad"]:
        raise ValueError(
            "rectify=True cannot be combined with amsgrad=True: the official package silently "
            "ignores amsgrad then. Choose one."
        )
    if group["fixed_decay"] and not group["weight_decouple"]:
        raise ValueError("fixed_decay=True needs weight_decouple=True.")


def normalize_group_names(group: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a param group with aliases resolved, and with keys of others kept.

    Raises:
        TypeError: A key is nearly one of ours, or an alias and its target are both given.
        ValueError: A key is an argument of the constructor alone.
    """
    for name in group:
        if not isinstance(name, str):
            raise TypeError(f"{where}: the keys of a param group are strings, got {shown(name)}.")
    for name in ("capturable", "no_decay"):
        if not is_one_of(group.get(name), (None, False)):
            hint = ""
            if name == "no_decay":
                hint = (
                    " ZeroRedundancyOptimizer hands it to every group: give it two groups instead, "
                    "one of them with weight_decay 0.0."
                )
            raise ValueError(
                f"{where} takes {name} for all groups or none: pass it to the constructor.{hint}"
            )
    kept = {name: value for name, value in group.items() if _is_foreign(name)}
    options = {name: value for name, value in group.items() if name not in kept}
    named = {**kept, **resolve_aliases(options, OPTION_NAMES, where)}
    return named | {"betas": plain_pair(named["betas"])} if "betas" in named else named


def _is_foreign(name: str) -> bool:
    """Return whether a key of a param group is none of ours, nor one of ours misspelled."""
    ours = [*OPTION_NAMES, *ALIASES]
    if name in ours:
        return False
    return name in _FOREIGN_GROUP_KEYS or not difflib.get_close_matches(name, ours, 1, _ALIKE)


def complete_options(
    given: Mapping[str, Any], other_spellings: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Return the checked rule options from a constructor's arguments, aliases included.

    Raises:
        TypeError: `other_spellings` holds an unknown name, or a type is wrong.
        ValueError: A value is out of range.
    """
    options = {name: given[name] for name in OPTION_NAMES}
    other_spellings = without_adams(other_spellings, where)
    for name in other_spellings:
        target = ALIASES.get(name, name)
        if target in options and not is_one_of(options[target], [DEFAULTS[target]]):
            raise TypeError(f"{where} got {target!r} in two spellings; keep one of them.")
    arguments = given.keys() - _NO_OPTIONS
    options.update(resolve_aliases(other_spellings, OPTION_NAMES, where, also=arguments))
    _refuse_auto(options, where)
    options["betas"] = plain_pair(options["betas"])
    validate_options(options)
    no_decay = given["no_decay"]
    if not is_one_of(no_decay, (None, "1d")) and not callable(no_decay):
        raise ValueError(
            f"no_decay must be None, '1d' (no weight decay for parameters of fewer than 2 "
            f"dimensions) or a function of (name, parameter), got {shown(no_decay)}."
        )
    eps = float(options["eps"])
    if eps >= _ADAMS_EPS:
        _warn_of_large_eps(eps, math.sqrt(eps / (1.0 - float(options["betas"][1]))))
    return options
