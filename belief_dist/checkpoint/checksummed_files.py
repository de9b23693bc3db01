"""Checksums of DCP's files: computed while they are written, compared before they are read."""

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

from belief_dist.checkpoint.progress import started
from belief_dist.checkpoint.safe_reader import check_name, check_regular

MANIFEST = "manifest.json"
_READ_BYTES = 1 << 22


class Checksum(NamedTuple):
    """Size and CRC-32 of a file."""

    nbytes: int
    crc32: int


class _ChecksumStream:
    """A file, written sequentially, whose checksum is updated with every write."""

    def __init__(self, stream: Any, name: str, owner: _ChecksumFileSystem) -> None:
        self._stream, self._name, self._owner = stream, name, owner
        self._nbytes = self._crc = 0

    def write(self, data: Any) -> int:
        try:
            # Unbuffered, so that a full disk fails here and not in a flush at close.
            view = memoryview(data).cast("B")
            while view:
                view = view[self._stream.write(view) :]
        except OSError as error:
            self._owner.failure = error  # torch reports only "file write failed"
            raise
        self._crc = zlib.crc32(data, self._crc)
        count = memoryview(data).nbytes
        self._nbytes += count
        self._owner.checksums[self._name] = Checksum(self._nbytes, self._crc)
        return count

    def tell(self) -> int:
        return self._nbytes

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._stream.close()

    def fileno(self) -> int:
        return cast(int, self._stream.fileno())


class _ChecksumFileSystem(FileSystem):
    def __init__(self) -> None:
        self.checksums: dict[str, Checksum] = {}
        self.failure: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        path = Path(path)
        with path.open("wb", buffering=0) as raw:
            checksum_stream = _ChecksumStream(raw, path.name, self)
            self.checksums[path.name] = Checksum(0, 0)
            yield checksum_stream

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.checksums[Path(new_path).name] = self.checksums.pop(Path(path).name)


class ChecksumWriter(FileSystemWriter):
    """DCP's writer of one file per rank, with checksums and fsync."""

    def __init__(self, path: Path, aliases: Mapping[str, str]) -> None:
        """Write into an empty directory.

        Args:
            path: The directory.
            aliases: Further keys of an entry, each with the key under which the entry is written.
        """
        super().__init__(path, single_file_per_rank=True, sync_files=True)
        self._aliases = aliases
        self._files = _ChecksumFileSystem()
        self.fs = self._files

    @property
    def checksums(self) -> dict[str, Checksum]:
        """Checksums of the files that this process has written."""
        return self._files.checksums

    def write_data(self, plan: Any, planner: Any) -> Future[list[WriteResult]]:
        """Write a plan's items to one file, one by one.

        `FileSystemWriter` does the same, but keeps the copies of all tensors until the end.
        """
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        results: list[WriteResult] = []
        try:
            with self._files.create_stream(Path(self.path, name), "wb") as stream:
                advance = started("writing the checkpoint")
                for item in plan.items:
                    begin = stream.tell()
                    _write_item(item, planner, stream)
                    length = stream.tell() - begin
                    advance(length)
                    location = _StorageInfo(name, begin, length)
                    results.append(WriteResult(item.index, length, location))
                os.fsync(stream.fileno())
        except Exception as error:
            raise self._files.failure or error from None
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write DCP's metadata, in which aliases refer to the bytes of their entries."""
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
        tensor = tensor.clone()  # torch.save writes a view's whole storage
    torch.save(tensor, stream)


def write_manifest(
    directory: Path, checksums: Mapping[str, Checksum], step: int, serial: int
) -> None:
    """Write the manifest: all files of a checkpoint with their checksums, and its own; then fsync.

    Args:
        directory: The checkpoint.
        checksums: Of its files.
        step: Which it is of.
        serial: Counts the saves of a run.
    """
    files = {name: checksum._asdict() for name, checksum in sorted(checksums.items())}
    content = {"step": step, "serial": serial, "files": files}
    with open(directory / MANIFEST, "w") as file:
        json.dump({**content, "crc32": _crc32_of(content)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(directory: Path) -> tuple[int, dict[str, Checksum]]:
    """Return the step and the checksums of all files.

    Raises:
        ValueError: The manifest is missing or damaged.
    """
    path = directory / MANIFEST
    if not path.exists():
        raise ValueError(f"{directory} is no complete checkpoint: it has no {MANIFEST}.")
    check_regular(path)
    try:
        manifest = parse_manifest(path.read_text())
        return _natural(manifest["step"]), {
            check_name(name): Checksum(_natural(entry["nbytes"]), _natural(entry["crc32"]))
            for name, entry in manifest["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}.") from None


def parse_manifest(text: str) -> dict[str, Any]:
    """Return what a manifest tells, after comparing it with its own checksum.

    Those of older versions have none.

    Raises:
        ValueError: It is no JSON, or was changed.
    """
    manifest = json.loads(text)
    if not isinstance(manifest, dict):
        raise ValueError(f"a table is {type(manifest).__name__}")
    expected = manifest.pop("crc32", None)
    # A damaged key must not make an older manifest of it.
    if expected is None and not manifest.keys() <= {"step", "serial", "files"}:
        raise ValueError("it has no checksum of its own, and keys of later versions")
    if expected is not None and expected != _crc32_of(manifest):
        raise ValueError("it has changed since it was written: its own CRC-32 is another")
    return manifest


def _crc32_of(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.40} is no count")
    return value


def check_files(directory: Path, checksums: Mapping[str, Checksum], names: Sequence[str]) -> None:
    """Compare files with their checksums, reading a few MiB at a time.

    Raises:
        ValueError: A file is missing, truncated or changed.
    """
    advance = started(f"checking {directory.name}", sum(checksums[name].nbytes for name in names))
    for name in names:
        path, expected = directory / name, checksums[name]
        size = check_regular(path).st_size
        if size != expected.nbytes:
            raise ValueError(f"file {path} has {size} bytes, and {expected.nbytes} were written.")
        crc = 0
        with open(path, "rb", buffering=0) as file:
            while block := file.read(_READ_BYTES):
                crc = zlib.crc32(block, crc)
                advance(len(block))
        if crc != expected.crc32:
            raise ValueError(
                f"file {path} has changed since it was written: its CRC-32 is {crc:08x}, and "
                f"{expected.crc32:08x} was written."
            )
