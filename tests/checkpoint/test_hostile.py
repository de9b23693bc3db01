"""Checkpoints that somebody made to do harm: a sentence, nothing run, nothing read outside."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from belief_dist import AdaBelief, checkpoint, cli
from belief_dist.checkpoint.checksummed_files import Checksum, read_manifest, write_manifest
from belief_dist.checkpoint.loading import read_metadata
from belief_dist.checkpoint.safe_reader import SafeReader


def build() -> tuple[torch.nn.Module, AdaBelief]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = AdaBelief(model.named_parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("good")
    model, optimizer = build()
    return checkpoint.save(run, 1, model=model, optimizer=optimizer, extra={"note": [1, "a"]}).path


@pytest.fixture
def victim(good: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run" / good.name
    shutil.copytree(good, folder)
    return folder


def sign(folder: Path) -> None:
    """Write a manifest that fits, as whoever changes a file can."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name != "manifest.json" and path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            files[path.name] = {"nbytes": len(data), "crc32": zlib.crc32(data)}
    (folder / "manifest.json").write_text(json.dumps({"step": 1, "files": files}))


def replace_metadata(folder: Path, data: bytes) -> None:
    (folder / ".metadata").write_bytes(data)
    sign(folder)


class Marks:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def change(folder: Path, edit: Callable[[Metadata], None]) -> None:
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    edit(metadata)
    replace_metadata(folder, pickle.dumps(metadata))


def a_tensor(metadata: Metadata) -> tuple[str, TensorStorageMetadata]:
    return next(
        (key, entry)
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and len(entry.size) == 2
    )


# - What is done to the metadata; `mark` is a path that code would create


def code(folder: Path, mark: Path) -> None:
    replace_metadata(folder, pickle.dumps(Marks(mark)))


def code_deep_inside(folder: Path, mark: Path) -> None:
    def edit(metadata: Metadata) -> None:
        metadata.planner_data = {"a": [Marks(mark)]}

    change(folder, edit)


def code_by_eval(folder: Path, mark: Path) -> None:
    replace_metadata(folder, b"cbuiltins\neval\n(S'__import__(\"os\").mkdir(%r)'\ntR." % str(mark))


def code_through_torch(folder: Path, mark: Path) -> None:
    replace_metadata(folder, b"ctorch.serialization\nload\n(S'/etc/hostname'\ntR.")


def code_through_a_nested_name(folder: Path, mark: Path) -> None:
    name = b"torch.distributed.checkpoint.metadata", b"os.system"
    replace_metadata(folder, b"\x80\x04\x8c%c%b\x8c%c%b\x93." % (len(name[0]), name[0], 9, name[1]))


def an_attribute_of_a_class(folder: Path, mark: Path) -> None:
    module = b"torch.distributed.checkpoint.metadata"
    replace_metadata(folder, b"c%b\nMetadata\n}S'version'\nS'0'\nsb." % module)


def objects_outside(folder: Path, mark: Path) -> None:
    replace_metadata(folder, b"P0\n.")


def many_memo_entries(folder: Path, mark: Path) -> None:
    replace_metadata(folder, b"\x80\x02}r\xff\xff\xff\x7f.")


def no_pickle(folder: Path, mark: Path) -> None:
    replace_metadata(folder, b"hello")


def another_object(folder: Path, mark: Path) -> None:
    replace_metadata(folder, pickle.dumps({"state_dict_metadata": {}}))


def a_path_outside(folder: Path, mark: Path) -> None:
    def edit(metadata: Metadata) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = "../../secret"

    (folder.parent.parent / "secret").write_bytes(b"\0" * 100_000)
    change(folder, edit)


def an_absolute_path(folder: Path, mark: Path) -> None:
    def edit(metadata: Metadata) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = "/etc/passwd"

    change(folder, edit)


def a_link_outside(folder: Path, mark: Path) -> None:
    (data,) = folder.glob("*.distcp")
    moved = folder.parent.parent / "elsewhere"
    data.rename(moved)
    data.symlink_to(moved)


def a_pipe(folder: Path, mark: Path) -> None:
    (data,) = folder.glob("*.distcp")
    data.unlink()
    os.mkfifo(data)


def more_bytes_than_the_file(folder: Path, mark: Path) -> None:
    def edit(metadata: Metadata) -> None:
        for place in metadata.storage_data.values():
            place.length = 1 << 40

    change(folder, edit)


def a_tensor_larger_than_its_parts(folder: Path, mark: Path) -> None:
    def edit(metadata: Metadata) -> None:
        a_tensor(metadata)[1].size = torch.Size([1 << 20, 1 << 30])

    change(folder, edit)


def parts_larger_than_their_file(folder: Path, mark: Path) -> None:
    def edit(metadata: Metadata) -> None:
        _, entry = a_tensor(metadata)
        entry.size = entry.chunks[0].sizes = torch.Size([1 << 20, 1 << 20])

    change(folder, edit)


def parts_outside_of_the_tensor(folder: Path, mark: Path) -> None:
    def edit(metadata: Metadata) -> None:
        key, entry = a_tensor(metadata)
        offsets = torch.Size([7, 7])
        (old,) = (index for index in metadata.storage_data if index.fqn == key)
        place = metadata.storage_data.pop(old)
        metadata.storage_data[MetadataIndex(key, offsets, old.index)] = place
        entry.chunks[0].offsets = offsets

    change(folder, edit)


def negative_sizes(folder: Path, mark: Path) -> None:
    def edit(metadata: Metadata) -> None:
        for place in metadata.storage_data.values():
            place.offset = -5

    change(folder, edit)


HARMS = [
    *[code, code_deep_inside, code_by_eval, code_through_torch, code_through_a_nested_name],
    *[an_attribute_of_a_class, objects_outside, many_memo_entries, no_pickle, another_object],
    *[a_path_outside, an_absolute_path, a_link_outside, a_pipe, more_bytes_than_the_file],
    *[a_tensor_larger_than_its_parts, parts_larger_than_their_file],
    *[parts_outside_of_the_tensor, negative_sizes],
]


@pytest.mark.parametrize("harm", HARMS)
def test_loading_refuses(
    harm: Callable[[Path, Path], None], victim: Path, tmp_path: Path, request: Any
) -> None:
    """In every way that opens the file, within the test's timeout, and with nothing changed."""
    mark = tmp_path / "mark"
    harm(victim, mark)
    model, optimizer = build()
    before = [value.clone() for value in model.state_dict().values()]
    for verify in (True, False):
        with pytest.raises(checkpoint.CheckpointError, match=r"damaged|regular file|changed|bytes"):
            checkpoint.load(victim, model=model, optimizer=optimizer, verify=verify)
    with pytest.raises(ValueError, match=r"\.metadata is damaged, or made to do harm|regular file"):
        read_metadata(victim)
    assert not mark.exists()
    assert all(map(torch.equal, before, model.state_dict().values()))


def test_an_attribute_set_on_a_class_stays_in_its_file(victim: Path) -> None:
    before = dict(vars(Metadata))
    an_attribute_of_a_class(victim, victim)
    with pytest.raises(ValueError, match="damaged"):
        read_metadata(victim)
    assert dict(vars(Metadata)) == before


# - Manifests


def manifest(name: Any, **more: Any) -> str:
    files = {name: {"nbytes": 1, "crc32": 0, **more}}
    return json.dumps({"step": 1, "files": files})


MANIFESTS = {
    "outside": manifest("../../secret"),
    "absolute": manifest("/etc/shadow"),
    "device": manifest("/dev/zero", nbytes=0),
    "here": manifest("."),
    "empty": manifest(""),
    "zero byte": manifest("a\0b"),
    "infinite step": '{"step": Infinity, "files": {}}',
    "nested": "[" * 100_000,
    "list": "[]",
    "negative": manifest("a", nbytes=-1),
    "true": manifest("a", nbytes=True),
    "text": manifest("a", crc32="0"),
    "no files": '{"step": 1}',
    "binary": "\x00\x01",
    "unknown key": '{"step": 1, "files": {}, "crc33": 5}',
    "wrong checksum": '{"step": 1, "files": {}, "crc32": 5}',
}


@pytest.mark.parametrize("name", MANIFESTS)
@pytest.mark.timeout(30)
def test_manifests(name: str, victim: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (victim / "manifest.json").write_text(MANIFESTS[name])
    with pytest.raises(ValueError, match=r"is damaged"):
        read_manifest(victim)
    assert cli.main(["checkpoint", "verify", str(victim)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_every_flipped_bit_of_a_manifest_is_found(tmp_path: Path) -> None:
    """A step of 1 is a bit away from 3; without a checksum of its own, that loaded as step 3."""
    files = {".metadata": Checksum(2893, 0x1234), "__0_0.distcp": Checksum(77, 0xFFFF_FFFF)}
    write_manifest(tmp_path, files, 1, 1)
    path = tmp_path / "manifest.json"
    written = path.read_bytes()
    assert read_manifest(tmp_path) == (1, files)
    for bit in range(8 * len(written)):
        changed = bytearray(written)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="is damaged"):
            read_manifest(tmp_path)


@pytest.mark.parametrize("command", ["inspect", "convert", "diff"])
def test_the_command_line_runs_no_code(command: str, victim: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    code(victim, mark)
    arguments = {
        "inspect": [victim],
        "convert": [victim, tmp_path / "out.pt", "--to", "torch"],
        "diff": [victim, victim],
    }[command]
    done = subprocess.run(
        [sys.executable, "-m", "belief_dist.cli", "checkpoint", command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "made to do harm" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not mark.exists()


# - Any bytes


@pytest.fixture(scope="module")
def fuzzed(good: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("fuzzed") / good.name
    shutil.copytree(good, folder)
    return folder, (folder / ".metadata").read_bytes()


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_change_of_the_metadata_loads_or_is_a_sentence(
    fuzzed: tuple[Path, bytes], data: Any
) -> None:
    folder, original = fuzzed
    changed = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(changed) - 1))
        how = data.draw(st.sampled_from(["flip", "cut", "insert", "repeat"]))
        if how == "flip":
            changed[place] = data.draw(st.integers(0, 255))
        elif how == "cut":
            del changed[place : place + data.draw(st.integers(1, 40))]
        elif how == "insert":
            changed[place:place] = data.draw(st.binary(min_size=1, max_size=12))
        else:
            changed[place:place] = changed[place : place + 20]
        if not changed:
            break
    (folder / ".metadata").write_bytes(changed)
    try:
        SafeReader(folder).read_metadata()
    except ValueError as error:
        assert "made to do harm" in str(error)
