"""DCP's files with checksums: made while they are written, compared before they are read."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch.distributed.checkpoint.filesystem import (
    DEFAULT_SUFFIX,
    FileSystem,
    FileSystemWriter,
    _StorageInfo,
)
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

MANIFEST = "manifest.json"
_AT_ONCE = 1 << 22


class Checksum(NamedTuple):
    """Of a file's contents."""

    nbytes: int
    crc32: int


class _Summing:
    """A file that is written once, from front to back."""

    def __init__(self, stream: Any, name: str, owner: _SummingFiles) -> None:
        self._stream, self._name, self._owner = stream, name, owner
        self._nbytes = self._crc = 0

    def write(self, data: Any) -> int:
        try:
            # Unbuffered: a buffer's late failure would have no one to tell.
            view = memoryview(data).cast("B")
            while view:
                view = view[self._stream.write(view) :]
        except OSError as error:
            self._owner.failure = error  # torch tells of it as "file write failed"
            raise
        self._crc = zlib.crc32(data, self._crc)
        count = memoryview(data).nbytes
        self._nbytes += count
        self._owner.sums[self._name] = Checksum(self._nbytes, self._crc)
        return count

    def tell(self) -> int:
        return self._nbytes

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._stream.close()

    def fileno(self) -> int:
        return cast(int, self._stream.fileno())


class _SummingFiles(FileSystem):
    def __init__(self) -> None:
        self.sums: dict[str, Checksum] = {}
        self.failure: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        path = Path(path)
        with path.open("wb", buffering=0) as raw:
            summing = _Summing(raw, path.name, self)
            self.sums[path.name] = Checksum(0, 0)
            yield summing

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


class SummingWriter(FileSystemWriter):
    """DCP's writer of one file for each rank, flushed to the disk, with checksums."""

    def __init__(self, path: Path, aliases: Mapping[str, str]) -> None:
        """Write into an empty folder.

        Args:
            path: The folder.
            aliases: More keys under which an entry shall be found, each with the entry's own.
        """
        super().__init__(path, single_file_per_rank=True, sync_files=True)
        self._aliases = aliases
        self._files = _SummingFiles()
        self.fs = self._files

    @property
    def sums(self) -> dict[str, Checksum]:
        """Of the files that this process has written."""
        return self._files.sums

    def write_data(self, plan: Any, planner: Any) -> Future[list[WriteResult]]:
        """See `FileSystemWriter`, which keeps every tensor that it has copied until the end."""
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        results: list[WriteResult] = []
        try:
            with self._files.create_stream(Path(self.path, name), "wb") as stream:
                for item in plan.items:
                    begin = stream.tell()
                    _write_item(item, planner, stream)
                    length = stream.tell() - begin
                    place = _StorageInfo(name, begin, length)
                    results.append(WriteResult(item.index, length, place))
                os.fsync(stream.fileno())
        except Exception as error:
            raise self._files.failure or error from None
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """See `FileSystemWriter`; entries get their other keys, which take no room."""
        for alias, key in self._aliases.items():
            metadata.state_dict_metadata[alias] = metadata.state_dict_metadata[key]
            if isinstance(metadata.planner_data, dict):
                metadata.planner_data[alias] = (alias,)
        aliased = [
            replace(result, index=replace(result.index, fqn=alias))
            for alias, key in self._aliases.items()
            for own in results
            for result in own
            if result.index.fqn == key
        ]
        super().finish(metadata, [*results, aliased])


def _write_item(item: WriteItem, planner: Any, stream: Any) -> None:
    data = planner.resolve_data(item)
    if item.type == WriteItemType.BYTE_IO:
        stream.write(data.getbuffer())
        return
    tensor = data.detach().cpu()
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.clone()  # torch.save writes all of the memory that a tensor is a part of
    torch.save(tensor, stream)


def write_manifest(folder: Path, sums: Mapping[str, Checksum], step: int) -> None:
    """Write the list of all files of a checkpoint and their checksums, and flush it."""
    files = {name: checksum._asdict() for name, checksum in sorted(sums.items())}
    with open(folder / MANIFEST, "w") as file:
        json.dump({"step": step, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> tuple[int, dict[str, Checksum]]:
    """Return the step and the checksums of all files.

    Raises:
        ValueError: The manifest is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        return int(manifest["step"]), {
            name: Checksum(int(entry["nbytes"]), int(entry["crc32"]))
            for name, entry in manifest["files"].items()
        }
    except FileNotFoundError:
        raise ValueError(f"{folder} is no complete checkpoint: it has no {MANIFEST}.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}.") from None


def check_files(folder: Path, sums: Mapping[str, Checksum], names: Sequence[str]) -> None:
    """Read files and compare them with their checksums, a few MiB at a time.

    Raises:
        ValueError: A file is missing, truncated or changed.
    """
    for name in names:
        path, expected = folder / name, sums[name]
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise ValueError(f"file {path} is missing.") from None
        if size != expected.nbytes:
            raise ValueError(f"file {path} has {size} bytes, and {expected.nbytes} were written.")
        crc = 0
        with open(path, "rb", buffering=0) as file:
            while block := file.read(_AT_ONCE):
                crc = zlib.crc32(block, crc)
        if crc != expected.crc32:
            raise ValueError(
                f"file {path} has changed since it was written: its CRC-32 is {crc:08x}, and "
                f"{expected.crc32:08x} was written."
            )
