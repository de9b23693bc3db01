"""Open a file of torch.save that anybody may have written: what it is, or one sentence."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from belief_dist.checkpoint.progress import started


def read_torch_file(path: Path, *, trust: bool = False) -> Any:
    """Return what a file holds, on the CPU.

    Args:
        path: The file.
        trust: Whether it may run code.

    Raises:
        ValueError: There is no such file, or it is damaged, or needs code without `trust`.
    """
    if not path.is_file():  # a pipe could wait for ever
        raise ValueError(f"{path} is no file.")
    nbytes = path.stat().st_size
    advance = started(f"reading {path.name}", nbytes)
    try:
        found = torch.load(path, map_location="cpu", weights_only=not trust)
        advance(nbytes)
        return found
    except OSError:
        raise
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is damaged, or holds other objects than tensors, numbers, strings, lists and "
            f"dicts, which could run code; save a state_dict."
        ) from None
    except Exception as error:  # a damaged pickle or archive can raise anything
        raise ValueError(
            f"{path} is damaged, or no file of torch.save ({type(error).__name__})."
        ) from None
