"""Read and write weights as safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from torch import Tensor

from belief_dist.checkpoint.atomic_file import atomic_file


def _library() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError(
            "reading and writing .safetensors needs the package safetensors: "
            "pip install 'belief-dist[safetensors]'."
        ) from None
    return safetensors.torch


def write_safetensors(weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Write tensors to a file, atomically.

    Raises:
        ValueError: The library is not installed, the format lacks a dtype, or there is something
            else than a file at `path`.
    """
    library, path = _library(), Path(path)
    # Cloned, because the library refuses tensors that share memory, such as tied weights.
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    with atomic_file(path) as temporary:
        try:
            library.save_file(own, temporary, metadata={"format": "pt"})
        except KeyError as error:
            raise ValueError(f"safetensors cannot hold the dtype {error}.") from None


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of a file.

    Raises:
        ValueError: The library is not installed, or the file is damaged.
    """
    library = _library()
    from safetensors import SafetensorError

    if not Path(path).is_file():
        raise ValueError(f"{path} is no file.")
    try:
        found: dict[str, Tensor] = library.load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}.") from None
    return found
