"""Tests in a process of their own, in which Triton interprets its kernels on CPU tensors.

Triton decides when it is imported whether it compiles or interprets. This module is a plugin of
pytest there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from tests.harness.paths import ROOT


def run_interpreted(*files: str) -> None:
    """Run test files, which must all pass."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", __name__, *files],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "BELIEF_DIST_BACKEND": "triton"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


def pytest_configure() -> None:
    """Let the interpreter replace Triton's language once for each function.

    It does so anew in every call of one, which takes as long as all else.
    """
    from triton.runtime import interpreter

    replace = interpreter._patch_lang
    replaced: set[Any] = set()

    def replace_once(function: Any) -> Any:
        if function not in replaced:
            replaced.add(function)
            replace(function)
        return interpreter._LangPatchScope()  # has nothing to restore

    interpreter._patch_lang = replace_once
