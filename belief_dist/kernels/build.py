"""Find the compiled CPU kernel, or compile it: about a second, once for each user and machine.

A library that was installed with the package is used if it was built from the present source.
Otherwise the compiler writes a temporary file that is renamed into a cache directory, so that a
killed job leaves no broken library behind. Ranks that start together take turns by a file lock,
which the operating system releases when its holder dies. Every wait has a deadline.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

INSTALLED = Path(__file__).parent  # where setup.py puts the library
SOURCES = (INSTALLED / "cpu_kernel.cpp", INSTALLED / "signals.cpp")
FLAGS = (
    "-O3 -std=c++17 -shared -fPIC -fopenmp "
    # -ffp-contract=off: no fused multiply-adds, for reproducible bits (see the source's head). The
    # other two let loops with roots and divisions vectorize; they do not change results.
    "-ffp-contract=off -fno-math-errno -fno-trapping-math"
).split()
_COMPILE_SECONDS = 120
_LOCK_SECONDS = 60


class Unavailable(Exception):
    """The compiled kernel cannot be used here; the message says why."""


def source_hash() -> str:
    """Return a hash of the sources and the compiler flags."""
    texts = [source.read_bytes() for source in SOURCES]
    return hashlib.sha256(b"".join(texts) + " ".join(FLAGS).encode()).hexdigest()[:16]


def find_library() -> tuple[ctypes.CDLL, str]:
    """Return the compiled kernel and where it came from.

    Raises:
        Unavailable: It is not installed and cannot be compiled here.
    """
    for path in sorted(INSTALLED.glob("_cpu_kernel*.so")):
        library = _open(path)
        if library is not None:
            return library, "built at installation"
    command = compiler()
    try:
        return _from_cache(command)
    except OSError as error:  # a full disk, say
        raise Unavailable(f"the compiled library cannot be stored: {error}") from error


def _from_cache(command: list[str]) -> tuple[ctypes.CDLL, str]:
    with _cache_folder() as folder:
        stem = f"cpu_kernel-{source_hash()}-{_fingerprint(command)}"
        library = _load_cached(folder, stem)
        if library is not None:
            return library, "compiled before"
        with _lock(folder / f"{stem}.lock"):
            library = _load_cached(folder, stem)  # another rank may have compiled it meanwhile
            if library is None:
                fresh = folder / f"{stem}.{os.getpid()}.tmp"
                compile_library(command, fresh)
                os.replace(fresh, folder / f"{stem}-{_digest(fresh)}.so")
                library = _load_cached(folder, stem)
    if library is None:
        raise Unavailable(f"the library that {command[0]} made cannot be loaded")
    return library, "compiled now"


def _load_cached(folder: Path, stem: str) -> ctypes.CDLL | None:
    """Load a library from the cache if it is intact.

    Its name ends in a digest of its content. Loading a truncated file, which a crash can leave,
    would end the process with a bus error.
    """
    for path in folder.glob(f"{stem}-*.so"):
        with contextlib.suppress(FileNotFoundError):
            if path.stem.endswith(_digest(path)):
                return _open(path)
            path.unlink()
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def compiler() -> list[str]:
    """Return the command of the C++ compiler: $CXX, else g++.

    Raises:
        Unavailable: There is no such program.
    """
    wanted = os.environ.get("CXX", "")
    try:
        command = shlex.split(wanted) or ["g++"]
    except ValueError as error:
        raise Unavailable(f"CXX={wanted!r} is no command: {error}") from error
    if shutil.which(command[0]) is None:
        raise Unavailable(f"there is no C++ compiler ({command[0]} is not on PATH)")
    return command


def compile_library(command: list[str], path: Path) -> None:
    """Compile the sources to `path`, atomically.

    Raises:
        Unavailable: The compiler failed; the message has its first error.
    """
    descriptor, temporary = tempfile.mkstemp(suffix=".so.tmp", dir=path.parent)
    os.close(descriptor)
    define = f'-DBELIEF_SOURCE_HASH="{source_hash()}"'
    arguments = [*FLAGS, define, "-o", temporary, *map(str, SOURCES)]
    try:
        done = subprocess.run(
            [*command, *arguments],
            capture_output=True,
            text=True,
            errors="replace",  # a compiler's messages are in any encoding
            timeout=_COMPILE_SECONDS,
        )
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            first = (errors or done.stderr.splitlines() or ["no message"])[0]
            raise Unavailable(f"{command[0]} failed: {first}")
        if not _loads(temporary):
            raise Unavailable(f"{command[0]} made a library that cannot be loaded")
        os.chmod(temporary, 0o755)  # mkstemp's mode is for one user, an installation is for all
        os.replace(temporary, path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} failed: {error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _loads(path: str) -> bool:
    """Try a new library in another process, which a damaged one would end with a bus error."""
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).belief_source_hash"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, path], capture_output=True, timeout=_COMPILE_SECONDS
    )
    return done.returncode == 0


def _open(path: Path) -> ctypes.CDLL | None:
    """Load a library unless it is damaged or built from another source."""
    try:
        library = ctypes.CDLL(str(path))
        library.belief_source_hash.restype = ctypes.c_char_p
        same = library.belief_source_hash() == source_hash().encode()
    except (OSError, AttributeError):
        return None
    return library if same else None


def _fingerprint(command: list[str]) -> str:
    """Return a hash of compiler version and machine type, as hosts may share a home directory."""
    try:
        version = subprocess.run(
            [*command, "--version"], capture_output=True, timeout=_COMPILE_SECONDS
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} failed: {error}") from error
    return hashlib.sha256(version + platform.machine().encode()).hexdigest()[:8]


@contextlib.contextmanager
def _cache_folder() -> Iterator[Path]:
    """Yield a directory that only this user can write to: the cache, or a temporary one."""
    chosen = os.environ.get("BELIEF_DIST_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(chosen) if chosen else Path(home) / "belief_dist"
    try:
        if not chosen and not Path(home).is_absolute():  # there is neither HOME nor a user
            raise FileNotFoundError(home)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
        # Never load a library that another user could have put there.
        private = about.st_uid == os.getuid() and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        usable = private and os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        usable = False
    if usable:
        yield folder
    else:
        # A loaded library stays usable after its file is gone.
        with tempfile.TemporaryDirectory(prefix="belief_dist-") as temporary:
            yield Path(temporary)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock that is released if the process dies; after a deadline go on without it.

    Without the lock, two processes would only compile the same library twice.
    """
    deadline = time.monotonic() + _LOCK_SECONDS
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.05)
        yield


def one_line(error: BaseException) -> str:
    """Return what is wrong. Compilers show much source and a caret first, or only name a cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines()]
    if "^" in lines:
        lines = lines[len(lines) - lines[::-1].index("^") :]
    said = " ".join(filter(None, lines))
    return f"{type(error).__name__}: {said[:300]}" if said else type(error).__name__
