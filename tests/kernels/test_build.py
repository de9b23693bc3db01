"""The compiled kernel is found, compiled or done without; whatever happened here before."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from belief_dist.kernels import build

# What an optimizer asks for in a step; to make one would import much more than the kernel.
UPDATE = """
import logging, sys, torch
logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout, level=logging.INFO)
from pathlib import Path
from belief_dist import kernels
from belief_dist.kernels import build
from belief_dist.operands import Operands
from belief_dist.options import DEFAULTS
from belief_dist.rule import step_scalars
build.INSTALLED = Path(sys.argv[1])
p, m, s = torch.ones(3), torch.zeros(3), torch.zeros(3)
for step in (1, 2):
    kernels.update_([Operands(p, torch.ones(3), m, s)], step_scalars(DEFAULTS, step))
assert p[0] < 1, p
"""


def start(cache: Path, **environment: str) -> subprocess.Popen[str]:
    """Train two steps in a process that knows of no installed library."""
    return subprocess.Popen(
        [sys.executable, "-c", UPDATE, str(cache / "no-installed-library")],
        env=os.environ | {"BELIEF_DIST_CACHE": str(cache)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def says(process: subprocess.Popen[str]) -> str:
    """Return the lines that a process logs; it must succeed."""
    said, _ = process.communicate(timeout=150)
    assert process.returncode == 0, said
    return said


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    yield folder
    folder.chmod(0o700)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a library of this source, compiled here."""
    file = tmp_path_factory.mktemp("compiled") / "kernel.so"
    build.compile_library(build.compiler(), file)
    return file


def libraries(folder: Path) -> list[Path]:
    return list(folder.glob("*.so"))


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix not in (".so", ".lock")]


def test_compiled_once_then_reused(cache: Path) -> None:
    assert "compiled now" in says(start(cache))
    (library,) = libraries(cache)
    written = library.stat().st_mtime_ns
    assert "compiled before" in says(start(cache))
    assert library.stat().st_mtime_ns == written
    assert not leftovers(cache)


def test_ranks_that_start_together_take_turns(cache: Path) -> None:
    said = [says(rank) for rank in [start(cache) for _ in range(4)]]
    assert sum("compiled now" in line for line in said) >= 1
    assert len(libraries(cache)) == 1
    assert not leftovers(cache)


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler", "there is no C++ compiler (no-such-compiler is not on PATH)"),
        ("false", "false failed"),
        ("g++ '", 'CXX="g++ \'" is no command: No closing quotation'),
    ],
)
def test_without_a_compiler_plain_torch_serves(cache: Path, compiler: str, reason: str) -> None:
    """One warning with the reason, and the same training."""
    (line,) = says(start(cache, CXX=compiler)).splitlines()
    assert line.startswith("WARNING CPU updates run in chunked plain torch")
    assert reason in line
    assert not leftovers(cache)


def compiler_that(cache: Path, does: str) -> str:
    """Return a compiler that has a version, and otherwise does something of its own."""
    script = cache / "compiler"
    script.write_text(f'#!/bin/sh\ncase "$*" in *--version*) exec g++ "$@";; esac\n{does}\n')
    script.chmod(0o700)
    return str(script)


def test_a_compiler_that_writes_another_encoding(cache: Path) -> None:
    does = "printf 'fatal error: \\351\\350\\n' >&2; exit 1"
    said = says(start(cache, CXX=compiler_that(cache, does)))
    assert "compiler failed: fatal error: \ufffd\ufffd" in said


@pytest.mark.parametrize("nbytes", [0, 5000])
def test_a_compiler_that_makes_half_a_library(cache: Path, nbytes: int) -> None:
    """And says that all went well: loading it would end the process with a bus error."""
    does = f'g++ "$@" && for f; do case "$f" in *.tmp) truncate -s {nbytes} "$f";; esac; done'
    said = says(start(cache, CXX=compiler_that(cache, does)))
    assert "made a library that cannot be loaded" in said
    assert not libraries(cache)


def test_without_a_home_nothing_is_written_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose user has no entry: "~" would be a folder of this name."""
    monkeypatch.chdir(tmp_path)
    for name in ("BELIEF_DIST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build.os.path, "expanduser", lambda path: path)
    with build._cache_folder() as folder:
        assert folder.is_absolute() and folder.is_dir()
    assert not folder.exists() and not list(tmp_path.iterdir())


def test_who_insists_on_the_kernel_gets_an_error(cache: Path) -> None:
    process = start(cache, CXX="no-such-compiler", BELIEF_DIST_BACKEND="cpp")
    said, _ = process.communicate(timeout=150)
    assert process.returncode != 0
    assert "BELIEF_DIST_BACKEND=cpp, but there is no C++ compiler" in said
    assert "apt install g++" in said


@pytest.mark.parametrize("kept", [0, 100, 50_000])
def test_a_damaged_library_is_replaced(cache: Path, library: Path, kept: int) -> None:
    """A crash or a full disk has cut it off; to load what is left would kill the process."""
    command = build.compiler()
    damaged = cache / f"cpu_kernel-{build.source_hash()}-{build._fingerprint(command)}-0123.so"
    damaged.write_bytes(library.read_bytes()[:kept])
    assert "compiled now" in says(start(cache))
    assert "compiled before" in says(start(cache))
    assert not damaged.exists()


def test_a_full_disk_is_no_reason_to_stop(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "INSTALLED", cache)
    monkeypatch.setenv("BELIEF_DIST_CACHE", str(cache))
    monkeypatch.setattr(build.tempfile, "mkstemp", full)
    with pytest.raises(build.Unavailable, match="No space left on device"):
        build.find_library()


def test_a_killed_build_leaves_nothing_that_blocks(cache: Path) -> None:
    """Kill it with the compiler under way: the lock vanishes with its holder."""
    slow = cache / "slow-compiler"
    slow.write_text('#!/bin/sh\ncase "$*" in *--version*) exec g++ "$@";; esac\nsleep 60\n')
    slow.chmod(0o700)
    process = start(cache, CXX=str(slow))
    deadline = time.monotonic() + 60
    while not list(cache.glob("*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(cache.glob("*.tmp")), "the compiler never started"
    process.kill()
    process.communicate()
    started = time.monotonic()
    assert "compiled now" in says(start(cache))
    assert time.monotonic() - started < 50  # well inside the time that a lock is waited for


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_cache_that_others_can_write_to_is_not_trusted(cache: Path, mode: int) -> None:
    """Who could put a library there could run code in our process."""
    cache.chmod(mode)
    assert "compiled now" in says(start(cache))
    assert not libraries(cache)


def test_a_cache_that_cannot_be_made_is_done_without(tmp_path: Path) -> None:
    """A file is in the way; the same goes for folders without permission."""
    (tmp_path / "file").touch()
    assert "compiled now" in says(start(tmp_path / "file" / "cache"))


def test_a_library_of_another_source_is_not_loaded(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build._open(library) is not None
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-DOTHER"])
    assert build._open(library) is None


def test_the_installed_library_comes_first(cache: Path, library: Path) -> None:
    """What the installation has built is loaded without a compiler and without a cache."""
    installed = cache / "installed"
    installed.mkdir()
    shutil.copy(library, installed / "_cpu_kernel.test.so")
    process = subprocess.run(
        [sys.executable, "-c", UPDATE, str(installed)],
        env=os.environ | {"BELIEF_DIST_CACHE": str(cache), "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert "built at installation" in process.stdout, process.stdout + process.stderr
    assert not libraries(cache)
