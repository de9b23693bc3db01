"""Opens a checkpoint that anybody may have written: nothing of it runs, nothing outside is read.

torch.distributed.checkpoint unpickles `.metadata`, and a pickle can run any code; a checksum is no
signature. Here it is read by an unpickler that knows the few classes of such metadata, its contents
are checked against the files, and then made anew.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

METADATA_FILE = ".metadata"

# By module, the names that torch writes. Each class is replaced by one without any behaviour, so
# that not even an attribute of the real ones can be set.
_CLASSES = {
    dcp_metadata.__name__: (
        "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta "
        "TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING"
    ).split(),
    FileSystemReader.__module__: ["_StorageInfo", "_StoragePrefix"],
    "pathlib": ["Path", "PosixPath", "WindowsPath", "PurePosixPath"],
    "pathlib._local": ["Path", "PosixPath"],
}
_DTYPES = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}


class _Record:
    """What was saved of an object: its class's name, arguments and attributes."""

    kind = ""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        # A dataclass with slots saves (None, {...}), torch's TensorProperties a tuple.
        self.state = state

    def __hash__(self) -> int:
        return id(self)

    def field(self, name: str, default: Any = None) -> Any:
        """Return an attribute, for a dict of them."""
        state = getattr(self, "state", {})
        return state.get(name, default) if isinstance(state, dict) else default


def _record_of(kind: str) -> type[_Record]:
    return type(kind, (_Record,), {"kind": kind})


def _layout(name: object) -> object:
    return name


# Python's own: that in C allots memory for any number of memo entries that a file claims.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return _record_of(name)
        if (module, name) == ("torch", "Size"):
            return _sizes
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _layout
        raise ValueError(f"it asks for {module}.{name}, which no checkpoint needs")

    def persistent_load(self, pid: Any) -> Any:
        raise ValueError("it refers to objects outside")


def _sizes(values: Any) -> torch.Size:
    if not isinstance(values, (tuple, list)) or not all(
        type(each) is int and 0 <= each < 1 << 62 for each in values
    ):
        raise ValueError(f"a size or an offset is {values!r:.80}")
    return torch.Size(values)


class SafeReader(FileSystemReader):
    """DCP's reader of files, for folders that anybody may have written."""

    def __init__(self, path: Path, sizes: Mapping[str, int] | None = None) -> None:
        """Read a folder.

        Args:
            path: The folder.
            sizes: Of files that may be elsewhere, in bytes; those that are read must be there.
        """
        super().__init__(path)
        self._sizes = dict(sizes or {})

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata, which agrees with the files.

        Raises:
            ValueError: It is damaged, asks for code, or claims what the files do not hold.
        """
        folder = Path(self.path)
        path = folder / METADATA_FILE
        check_regular(path)
        try:
            raw = _Unpickler(io.BytesIO(path.read_bytes())).load()
            found = _rebuild(raw)
            _check_against_files(folder, found, self._sizes)
        except Exception as error:  # a damaged pickle can raise anything
            reason = str(error) or type(error).__name__
            raise ValueError(
                f"file {path} is damaged, or made to do harm: {reason}. Nothing of it was run."
            ) from None
        found.storage_meta = StorageMeta(load_id=self.load_id)
        return found


def check_regular(path: Path) -> os.stat_result:
    """Return what the file system says of a file that may be opened.

    Raises:
        ValueError: It is missing, a link, or no file: a pipe or a device could wait for ever.
    """
    try:
        about = path.lstat()
    except FileNotFoundError:
        raise ValueError(f"file {path} is missing.") from None
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"{path} is no regular file (a link, pipe, device or folder).")
    return about


def check_name(name: object) -> str:
    """Return the name of a file inside a checkpoint.

    Raises:
        ValueError: It would lead out of the folder.
    """
    if not isinstance(name, str) or not name or name in (".", "..") or set(name) & set("/\\\0"):
        raise ValueError(f"{name!r:.80} is no name of a file in a checkpoint.")
    return name


# - From records to metadata


def _expect(record: Any, kind: str) -> _Record:
    if not isinstance(record, _Record) or record.kind != kind:
        raise ValueError(f"{kind} is expected, and {type(record).__name__} was found")
    return record


def _rebuild(raw: Any) -> Metadata:
    whole = _expect(raw, "Metadata")
    entries: dict[str, Any] = {}
    for key, entry in _items(whole.field("state_dict_metadata")):
        if not isinstance(key, str):
            raise ValueError(f"a key is {key!r:.80}")
        is_bytes = isinstance(entry, _Record) and entry.kind == "BytesStorageMetadata"
        entries[key] = BytesStorageMetadata() if is_bytes else _tensor(entry)
    storage = {_index(key): _place(value) for key, value in _items(whole.field("storage_data"))}
    planner = whole.field("planner_data")
    version = whole.field("version")
    return Metadata(
        entries,
        planner_data=planner if _is_paths(planner) else None,
        storage_data=storage,
        version=version if isinstance(version, str) else None,
    )


def _items(mapping: Any) -> Iterator[tuple[Any, Any]]:
    if not isinstance(mapping, dict):
        raise ValueError(f"a table is {type(mapping).__name__}")
    return iter(mapping.items())


def _is_paths(planner: Any) -> bool:
    return isinstance(planner, dict) and all(
        isinstance(key, str)
        and isinstance(path, tuple)
        and all(isinstance(part, (str, int)) for part in path)
        for key, path in planner.items()
    )


def _tensor(entry: Any) -> TensorStorageMetadata:
    entry = _expect(entry, "TensorStorageMetadata")
    properties = _expect(entry.field("properties"), "TensorProperties")
    # torch saves (dtype, layout, requires_grad, memory format, pin_memory).
    state = getattr(properties, "state", None)
    dtype = state[0] if isinstance(state, tuple) and state else properties.field("dtype")
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a dtype is {dtype!r:.80}")
    chunks = [_expect(each, "ChunkStorageMetadata") for each in entry.field("chunks") or ()]
    return TensorStorageMetadata(
        TensorProperties(dtype=dtype),
        _sizes(entry.field("size")),
        [
            ChunkStorageMetadata(_sizes(each.field("offsets")), _sizes(each.field("sizes")))
            for each in chunks
        ],
    )


def _index(record: Any) -> MetadataIndex:
    record = _expect(record, "MetadataIndex")
    key, offset, index = (record.field(name) for name in ("fqn", "offset", "index"))
    if not isinstance(key, str) or not (index is None or type(index) is int):
        raise ValueError(f"an index is {key!r:.40}, {index!r:.40}")
    return MetadataIndex(key, None if offset is None else _sizes(offset), index)


def _place(record: Any) -> _StorageInfo:
    record = _expect(record, "_StorageInfo")
    offset, length = _sizes([record.field("offset"), record.field("length")])
    if record.field("transform_descriptors"):
        raise ValueError("its files are transformed, which belief_dist does not write")
    return _StorageInfo(check_name(record.field("relative_path")), offset, length)


def _check_against_files(folder: Path, found: Metadata, known: Mapping[str, int]) -> None:
    """Check that files are as long as they are said to be, and tensors no larger than files."""
    sizes = dict(known)
    lengths: dict[tuple[str, torch.Size | None], int] = {}
    for index, place in found.storage_data.items():
        name = place.relative_path
        if name not in sizes:
            sizes[name] = check_regular(folder / name).st_size
        if place.offset + place.length > sizes[name]:
            raise ValueError(
                f"{index.fqn!r:.80} lies at bytes {place.offset} to {place.offset + place.length} "
                f"of {name}, which has {sizes[name]}"
            )
        lengths[index.fqn, index.offset] = place.length
    for key, entry in found.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            _check_tensor(key, entry, lengths)
        elif (key, None) not in lengths:
            raise ValueError(f"{key!r:.80} is in no file")


def _check_tensor(
    key: str, entry: TensorStorageMetadata, lengths: Mapping[tuple[str, torch.Size | None], int]
) -> None:
    covered = 0
    for chunk in entry.chunks:
        fits = len(chunk.offsets) == len(chunk.sizes) == len(entry.size) and all(
            offset + size <= whole
            for offset, size, whole in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
        )
        length = lengths.get((key, chunk.offsets))
        numel = math.prod(chunk.sizes)
        if not fits or length is None or numel * entry.properties.dtype.itemsize > length:
            raise ValueError(f"a part of {key!r:.80} is larger than its tensor or its file")
        covered += numel
    if covered < math.prod(entry.size):
        raise ValueError(f"{key!r:.80} has {math.prod(entry.size)} elements, and {covered} parts")
