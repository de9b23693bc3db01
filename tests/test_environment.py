"""The package's own environment variables are those that docs/environment.md lists."""

from __future__ import annotations

import re

from tests.harness.paths import ROOT

SOURCES = ("belief_dist/**/*.py", "launch/**/*.sh", "*.py")


def test_every_variable_of_ours_is_documented() -> None:
    read = {
        name
        for pattern in SOURCES
        for path in ROOT.glob(pattern)
        for name in re.findall(r"\bBELIEF_DIST_[A-Z]+\b", path.read_text())
    }
    listed = set(re.findall(r"`(BELIEF_DIST_[A-Z]+)`", (ROOT / "docs/environment.md").read_text()))
    assert read == listed
