"""Names of parameters in a checkpoint: those of the model without wrappers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

# Prefixes that torch.compile and activation checkpointing add to names.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def bare(model: torch.nn.Module) -> torch.nn.Module:
    """Return the module that DistributedDataParallel wraps, or the module itself."""
    module: torch.nn.Module = model
    while isinstance(module, DistributedDataParallel):
        module = module.module
    return module


def clean(name: str) -> str:
    """Return a name without the prefixes that wrappers have added."""
    for part in _WRAPPERS:
        name = name.replace(part, "")
    return name


def model_tensors(model: torch.nn.Module) -> Iterator[tuple[str, object]]:
    """Yield (name, value) of the model's state_dict; tied parameters under each of their names."""
    for name, value in bare(model).state_dict(keep_vars=True).items():
        yield clean(name), value


def parameter_names(optimizer: Optimizer, model: torch.nn.Module | None) -> list[str]:
    """Return one name for each parameter, in the optimizer's order.

    Args:
        optimizer: The optimizer.
        model: The model that has the names; None if the optimizer was built from named parameters.

    Raises:
        ValueError: A parameter has no name, or two have the same name.
    """
    known: dict[int, str] = {}
    if model is not None:
        known = {id(p): clean(name) for name, p in bare(model).named_parameters()}
    names: list[str] = []
    for group in optimizer.param_groups:
        given = group.get("param_names")
        for position, param in enumerate(group["params"]):
            name = known.get(id(param))
            if name is None and model is not None:
                raise ValueError(
                    f"the optimizer's parameter number {len(names)}, of shape "
                    f"{tuple(param.shape)}, is not in the model; pass the model that it trains."
                )
            if name is None and given is not None:
                name = clean(given[position])
            if name is None:
                raise ValueError(
                    f"the optimizer's parameter number {len(names)} has no name, under which a "
                    f"checkpoint could hold it; pass model=, or build the optimizer from "
                    f"model.named_parameters()."
                )
            names.append(name)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"several parameters are called {twice!r}; names must differ.")
    return names


def dtype_name(tensor: Tensor) -> str:
    """Return the name of a tensor's dtype, such as "bfloat16"."""
    return str(tensor.dtype).removeprefix("torch.")
