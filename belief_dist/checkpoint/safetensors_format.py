"""Weights as a safetensors file: an 8-byte length, a JSON header, and the bytes of all tensors.

Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Write tensors; the file is there as a whole or not at all.

    Raises:
        ValueError: A dtype has no place in the format.
    """
    path = Path(path)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in weights.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(f"safetensors cannot hold {name!r}, whose dtype is {tensor.dtype}.")
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in weights.values():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            # Not through numpy, which torch does without.
            file.write((ctypes.c_char * flat.nbytes).from_address(flat.data_ptr()))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Read what `write_safetensors`, or the library itself, has written."""
    dtypes = {name: dtype for dtype, name in _NAMES.items()}
    data = bytearray(Path(path).read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        flat = torch.frombuffer(data[start:end] or bytearray(1), dtype=torch.uint8)
        flat = flat[: end - start].clone()
        found[name] = flat.view(dtypes[entry["dtype"]]).view(entry["shape"])
    return found
