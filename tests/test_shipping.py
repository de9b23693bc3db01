"""What is published: an sdist and a wheel that are whole, and work without the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from belief_dist.version import __version__
from tests.harness.paths import BIN, ROOT

STEP = """
import torch
from belief_dist import AdaBelief, backends, checkpoint, telemetry
import belief_dist
param = torch.nn.Parameter(torch.ones(300))
optimizer = AdaBelief([param], lr=0.1)
param.grad = torch.ones(300)
optimizer.step()
assert abs(param[0].item() - (1 - 0.1 / 0.9)) < 1e-6, param[0]  # g - m is 0.9 of g
print(belief_dist.__file__)
print(*backends(), sep="\\n")
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with sdist and wheel, from the files that git knows."""
    folder = tmp_path_factory.mktemp("shipping")
    listed = run("git", "ls-files", "-z", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # else it was just deleted
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    build = ["-m", "build", "--no-isolation", "--outdir", folder / "dist", "source"]
    run(sys.executable, *build, cwd=folder)
    return folder


def test_the_archives_are_whole(built: Path) -> None:
    """The sdist has all files but those for the repository's hosting; both pass PyPI's checks."""
    wheel, sdist = sorted((built / "dist").iterdir(), key=lambda path: path.suffix == ".gz")
    assert sdist.name == f"belief_dist-{__version__}.tar.gz"
    # One for every Python: the kernel has no Python entry point.
    assert wheel.name.startswith(f"belief_dist-{__version__}-py3-none-linux_")
    run(BIN / "twine", "check", "--strict", wheel, sdist, cwd=built)
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    listed = run("git", "ls-files", cwd=ROOT).split()
    hosting = (".ci/", ".github/", ".dockerignore", ".gitignore", ".pre-commit", ".yamllint")
    assert [name for name in listed if name not in packed and not name.startswith(hosting)] == []
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "belief_dist/kernels/_cpu_kernel.so" in names and "belief_dist/py.typed" in names
    rooms = {name.split("/")[0] for name in names}
    assert rooms == {
        "belief_dist",
        "_belief_dist_autoload.py",
        "_belief_dist_cli",
        f"belief_dist-{__version__}.dist-info",
    }


def test_the_kernel_runs_on_what_the_tag_promises(built: Path) -> None:
    """The C library of manylinux_2_28, no C++ library, and the OpenMP that torch brings."""
    (wheel,) = (built / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        kernel = archive.extract("belief_dist/kernels/_cpu_kernel.so", built / "unpacked")
    read = run("readelf", "--wide", "--dynamic", "--version-info", kernel, cwd=built)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", read)
    assert "libgomp.so.1" in needed and set(needed) <= {"libc.so.6", "libgomp.so.1", "libm.so.6"}
    versions = re.findall(r"Name: ([A-Z]+)_([\d.]+)", read)
    newest = {
        library: max(
            tuple(map(int, number.split("."))) for name, number in versions if name == library
        )
        for library in {name for name, _ in versions}
    }
    assert newest["GLIBC"] <= (2, 28) and newest["GOMP"] <= (4, 0) and newest["OMP"] <= (1, 0)


def test_an_installed_wheel_needs_no_compiler(built: Path) -> None:
    (wheel,) = (built / "dist").glob("*.whl")
    place = built / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", place]
    run(*pip, wheel, cwd=built)
    here = {"PYTHONPATH": str(place), "CXX": "none", "BELIEF_DIST_CACHE": str(built / "cache")}
    out = run(sys.executable, "-c", STEP, cwd=built, **here)
    assert out.startswith(str(place)) and "built at installation" in out
    assert "belief-dist" in run(sys.executable, "-m", "belief_dist", "--help", cwd=built, **here)
    assert not (built / "cache").exists()


def test_an_sdist_is_installed_without_a_compiler(built: Path) -> None:
    """Updates are then plain torch's, with the same bits, and a warning says so."""
    (sdist,) = (built / "dist").glob("*.tar.gz")
    place = built / "from-source"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", place]
    run(*pip, "--no-build-isolation", sdist, cwd=built, CXX="none")
    assert not list(place.rglob("*.so"))
    here = {"PYTHONPATH": str(place), "CXX": "none", "BELIEF_DIST_CACHE": str(built / "cache")}
    out = run(sys.executable, "-c", STEP, cwd=built, **here)
    assert out.startswith(str(place)) and "built at installation" not in out


def test_workflows_and_recipe_are_valid() -> None:
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert len(workflows) == 2
    check = [BIN / "check-jsonschema", "--builtin-schema", "vendor.github-workflows"]
    run(*check, *workflows, cwd=ROOT)
    recipe = (ROOT / "docs" / "packaging" / "recipe.yaml").read_text()
    assert f'version: "{__version__}"' in recipe
