"""Between checkpoints and the files of other packages, by what lies at a path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from belief_dist.checkpoint.checksummed_files import MANIFEST
from belief_dist.checkpoint.formats.deepspeed import read_universal, read_zero, write_universal
from belief_dist.checkpoint.formats.full_state import Whole, read_whole, write_whole
from belief_dist.checkpoint.formats.safetensors import read_safetensors, write_safetensors
from belief_dist.checkpoint.formats.torch import (
    from_state_dict,
    to_official,
    to_state_dict,
    warm_start_from_adam,
)

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
) -> Whole:
    """Read a training state, whatever it is.

    Args:
        source: A checkpoint of ours or a run's folder; the folder of a DeepSpeed tag, ZeRO or
            universal; or a file with an optimizer's state_dict.
        weights: With a state_dict: the file of the model's (torch.save or safetensors).
        names: With a state_dict without names: those of the parameters, in order.
        options: With a state_dict: hyperparameters that it does not tell.
        step: Which checkpoint of a run.
        trust: Run the code that a DeepSpeed checkpoint's pickles hold.
        from_adam: The states are Adam's; estimate AdaBelief's from them.
        eps: AdaBelief's, with `from_adam`.

    Raises:
        ValueError: It is nothing of these, or an argument is missing.
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
            whole = read_universal(source) if universal else read_zero(source)
        else:
            whole = read_whole(source, step=step)
    elif source.is_file():
        if weights is None:
            raise ValueError(f"{source} holds an optimizer's state_dict: pass weights, too.")
        saved = torch.load(source, map_location="cpu", weights_only=True)
        if not isinstance(saved, Mapping) or "param_groups" not in saved:
            raise ValueError(f"{source} holds no optimizer's state_dict.")
        whole = from_state_dict(
            saved, _weights(Path(weights)), names=names, options=options, step=step
        )
    else:
        raise ValueError(f"there is nothing at {source}.")
    return warm_start_from_adam(whole, eps=eps) if from_adam else whole


def _weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    found: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return found


def write(whole: Whole, target: str | Path, to: str, *, template: str | Path | None = None) -> Path:
    """Write a training state.

    Args:
        whole: The state.
        target: A run's folder ("belief_dist"), a new folder ("universal"), or a file.
        to: One of `TARGETS`. "torch" and "official" hold the optimizer's state_dict alone;
            "safetensors" holds weights alone, in the model's dtypes.
        template: With "universal": a universal checkpoint of the same job.

    Returns:
        What was written.

    Raises:
        ValueError: `to` is unknown, or the template is missing.
    """
    target = Path(target)
    if to == "belief_dist":
        return write_whole(whole, target)
    if to in ("torch", "official"):
        torch.save(to_state_dict(whole) if to == "torch" else to_official(whole), target)
    elif to == "safetensors":
        write_safetensors(whole.model_weights(), target)
    elif to == "universal":
        if template is None:
            raise ValueError("a universal checkpoint needs a template: one of the same job.")
        write_universal(whole, target, template)
    else:
        raise ValueError(f"cannot convert to {to!r}; choose one of {', '.join(TARGETS)}.")
    return target


def differences(one: Whole, other: Whole) -> list[str]:
    """Return a sentence for everything in which two training states differ, bit for bit."""
    found = []
    for what, ours, theirs in _pairs(one, other):
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
                elif not torch.equal(a, b):
                    odd = (a != b).sum().item()
                    gap = (a.double() - b.double()).abs().max().item()
                    found.append(
                        f"{what} of {name}: {odd} of {a.numel()} elements differ, "
                        f"by up to {gap:.3g}"
                    )
            elif a != b:
                found.append(f"{what} of {name}: {a!r} and {b!r}")
    return found


def _pairs(one: Whole, other: Whole) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    def options(whole: Whole) -> dict[str, Any]:
        return {name: group["options"] for group in whole.groups for name in group["params"]}

    pairs: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = [
        ("weight", one.weights, other.weights),
        ("step", one.steps, other.steps),
        ("options", options(one), options(other)),
    ]
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        ours = {name: states[key] for name, states in one.states.items() if key in states}
        theirs = {name: states[key] for name, states in other.states.items() if key in states}
        pairs.append((key, ours, theirs))
    return pairs


def is_ours(path: str | Path) -> bool:
    """Tell whether a folder is a checkpoint of ours, or a run with some."""
    path = Path(path)
    return (path / MANIFEST).exists() or any(path.glob(f"step-*/{MANIFEST}"))
