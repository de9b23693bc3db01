"""The kernels compile with every Triton that is promised, to code that keeps the bits.

Each CUDA build of torch brings the Triton that it was made with, and what one of them compiles
another may refuse or round differently. So test_triton.py's checks of machine code run again, in a
process of its own for each version; that of the environment itself is among the other tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from belief_dist.kernels.triton_launch import OLDEST
from tests.harness.installed import installed
from tests.harness.paths import ROOT

# The oldest one promised, that of the last CUDA builds of torch before this environment's, and the
# newest. constraints.txt can name one version only: that of the environment.
VERSIONS = ["3.4.0", "3.6.0", "3.9.0"]
# All forms of what an optimizer calls on one architecture, and the simplest of all else.
MANY = "update_many and (90 or 80-float32 or 100-float32)"
NVIDIA = (
    f"nvidia and ({MANY} or update_flat-90-float32 or (codec and 90)) or (reduce and (90 or cuda))"
)
AMD = "amd and (update_many and (float32 or 8) or codec or ranks) or (reduce and hip)"


def linker(folder: Path) -> Path:
    """Return a program that links nothing: some wheels lack AMD's, and no test reads its output."""
    program = folder / "ld.lld"
    program.write_text('#!/bin/sh\n[ "$6" ] && cp "$4" "$6" || echo "LLD 18.0.0"\n')
    program.chmod(0o755)
    return program


def test_the_oldest_version_is_the_one_that_is_promised() -> None:
    oldest = ".".join(map(str, OLDEST))
    assert f'"triton>={oldest};' in (ROOT / "pyproject.toml").read_text()
    assert VERSIONS[0].startswith(f"{oldest}.")


@pytest.mark.parametrize("version", VERSIONS)
def test_every_form_compiles(version: str, tmp_path: Path) -> None:
    folder = installed(f"triton=={version}", alone=True)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "TRITON_HIP_LLD_PATH": str(linker(tmp_path)),
    }
    for vendor, chosen in ((None, NVIDIA), ("6.4", AMD)):
        # Which vendor torch was built for decides how the kernels divide.
        code = (
            "import sys, torch, triton, pytest; "
            f"assert triton.__version__ == {version!r}; torch.version.hip = {vendor!r}; "
            "sys.exit(pytest.main(sys.argv[1:]))"
        )
        files = ["tests/kernels/test_triton.py", "tests/kernels/test_triton_reduce.py"]
        arguments = ["-q", "-p", "no:cacheprovider", *files]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments, "-k", chosen],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
