"""Convert between checkpoints and files of other packages; the source's format is detected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from belief_dist.checkpoint.atomic_file import atomic_file
from belief_dist.checkpoint.entries import STATES
from belief_dist.checkpoint.formats.deepspeed import read_universal, read_zero, write_universal
from belief_dist.checkpoint.formats.full_state import FullState, read_full_state, write_full_state
from belief_dist.checkpoint.formats.safetensors import read_safetensors, write_safetensors
from belief_dist.checkpoint.formats.torch import (
    from_state_dict,
    is_of_adam,
    to_official,
    to_state_dict,
    warm_start_from_adam,
)
from belief_dist.checkpoint.formats.torch_file import read_torch_file
from belief_dist.checkpoint.progress import started
from belief_dist.options import validate_options
from belief_dist.state_dict import check_form

TARGETS = ("belief_dist", "torch", "official", "universal", "safetensors")


def read(
    source: str | Path,
    *,
    weights: str | Path | None = None,
    names: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    step: int | None = None,
    trust: bool = False,
    from_adam: bool = False,
    eps: float = 1e-16,
) -> FullState:
    """Read a training state in any of the supported formats.

    Args:
        source: A belief_dist checkpoint or run directory; the directory of a DeepSpeed tag, ZeRO or
            universal; or a file with an optimizer's state_dict.
        weights: For a state_dict: the file with the model's weights (torch.save or safetensors).
        names: For a state_dict without names: the names of its parameters, in order.
        options: For a state_dict: hyperparameters that it does not hold.
        step: Which checkpoint of a run; None means the newest.
        trust: Unpickle a DeepSpeed checkpoint, which can run any code.
        from_adam: The states are Adam's; estimate AdaBelief's from them.
        eps: AdaBelief's eps, with `from_adam`.

    Raises:
        ValueError: The format is none of these, or an argument is missing.
    """
    source = Path(source)
    if source.is_dir():
        universal = (source / "zero").is_dir()
        if universal or any(source.glob("*_states.pt")):
            if not trust:
                raise ValueError(
                    f"{source} is a DeepSpeed checkpoint, whose pickles can run any code; pass "
                    f"trust=True (--trust) if you know where it comes from."
                )
            full = read_universal(source) if universal else read_zero(source)
        else:
            full = read_full_state(source, step=step)
    elif source.is_file():
        if weights is None:
            raise ValueError(f"{source} holds an optimizer's state_dict: pass weights, too.")
        saved = read_torch_file(source)
        check_form(saved, str(source))
        if not from_adam and is_of_adam(saved):
            raise ValueError(
                f"{source} holds states of Adam or AdamW, whose exp_avg_sq is another quantity "
                f"than AdaBelief's; pass from_adam=True (--from_adam) to estimate AdaBelief's "
                f"from them."
            )
        full = from_state_dict(
            saved, _weights(Path(weights)), names=names, options=options, step=step
        )
        for number, group in enumerate(full.groups):
            # Adam's own eps does not count.
            own = {**group["options"], "eps": eps} if from_adam else group["options"]
            try:
                validate_options(own)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{source}: in param group {number}, {error}") from None
    else:
        raise ValueError(f"there is nothing at {source}.")
    return warm_start_from_adam(full, eps=eps) if from_adam else full


def _weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    found: dict[str, Tensor] = read_torch_file(path)
    if not isinstance(found, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
    ):
        raise ValueError(f"{path} holds no model's weights, which are a dict of named tensors.")
    return found


def write(
    full: FullState,
    target: str | Path,
    to: str,
    *,
    template: str | Path | None = None,
    averages: bool = False,
) -> Path:
    """Write a training state.

    Args:
        full: The state.
        target: A run directory ("belief_dist"), a new directory ("universal"), or a file.
        to: One of `TARGETS`. "torch" and "official" write the optimizer's state_dict only;
            "safetensors" writes weights only, in the model's dtypes.
        template: For "universal": a universal checkpoint of the same job.
        averages: For "safetensors": the averages of the weights in their stead.

    Returns:
        The path that was written.

    Raises:
        ValueError: `to` is unknown, the template is missing, there are no averages, or a file would
            replace something else.
    """
    target = Path(target)
    if averages and to != "safetensors":
        raise ValueError(f"averages alone are weights to use: to 'safetensors', not {to!r}.")
    if not full.groups and to in ("torch", "official", "universal"):
        raise ValueError("the source holds weights alone, and no optimizer's states to convert.")
    if to == "belief_dist":
        return write_full_state(full, target)
    if to in ("torch", "official"):
        started(f"writing {target.name}")
        with atomic_file(target) as temporary:
            torch.save(to_state_dict(full) if to == "torch" else to_official(full), temporary)
    elif to == "safetensors":
        started(f"writing {target.name}")
        write_safetensors(full.model_weights(averaged=averages), target)
    elif to == "universal":
        if template is None:
            raise ValueError("a universal checkpoint needs a template: one of the same job.")
        write_universal(full, target, template)
    else:
        raise ValueError(f"cannot convert to {to!r}; choose one of {', '.join(TARGETS)}.")
    return target


def differences(one: FullState, other: FullState) -> list[str]:
    """Return a sentence for every entry in which two training states differ by any bit."""
    found = []
    pairs = _pairs(one, other)
    nbytes = sum(a.nbytes for _, ours, _ in pairs for a in ours.values() if isinstance(a, Tensor))
    advance = started("comparing", nbytes)
    for what, ours, theirs in pairs:
        for name in sorted(set(ours) | set(theirs)):
            if name not in ours or name not in theirs:
                found.append(
                    f"{what} of {name}: only in the {'first' if name in ours else 'other'}"
                )
                continue
            a, b = ours[name], theirs[name]
            if isinstance(a, Tensor):
                if a.shape != b.shape or a.dtype != b.dtype:
                    found.append(
                        f"{what} of {name}: {a.dtype} {tuple(a.shape)} and {b.dtype} "
                        f"{tuple(b.shape)}"
                    )
                elif odd := int((_bits_of(a) != _bits_of(b)).any(-1).sum()):
                    gap = (a.double() - b.double()).abs().max().item()
                    found.append(
                        f"{what} of {name}: {odd} of {a.numel()} elements differ, "
                        f"by up to {gap:.3g}"
                    )
                advance(a.nbytes)
            elif a != b:
                found.append(f"{what} of {name}: {a!r} and {b!r}")
    return found


def _bits_of(tensor: Tensor) -> Tensor:
    """Return (elements, bytes of each)."""
    return tensor.contiguous().view(tensor.numel(), 1).view(torch.uint8)


def _pairs(
    one: FullState, other: FullState
) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    def options(full: FullState) -> dict[str, Any]:
        return {name: group["options"] for group in full.groups for name in group["params"]}

    pairs: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = [
        ("weight", one.weights, other.weights),
        ("step", one.steps, other.steps),
        ("options", options(one), options(other)),
    ]
    for key in STATES:
        ours = {name: states[key] for name, states in one.states.items() if key in states}
        theirs = {name: states[key] for name, states in other.states.items() if key in states}
        pairs.append((key, ours, theirs))
    return pairs
