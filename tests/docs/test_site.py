"""The site is built without a warning: every page has its place, every link and anchor leads on."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import ModuleType

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

import belief_dist
from belief_dist import checkpoint, distributed
from tests.harness.paths import ROOT


@pytest.mark.parametrize("module", [belief_dist, checkpoint, distributed])
def test_the_reference_has_all_that_is_public(module: ModuleType) -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    described = set(re.findall(r"(?::::|heading:) ([\w.]+)", page))
    told = {"__version__", "distributed", "TIMEOUT"}  # in words, or by their own page
    assert {f"{module.__name__}.{name}" for name in set(module.__all__) - told} <= described


def test_the_site_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")  # of the theme, about a version that is not out
    monkeypatch.chdir(ROOT)
    warned: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("mkdocs")
    logger.addHandler(handler)
    try:
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=False))
    finally:
        logger.removeHandler(handler)
    assert not warned, "\n".join(warned)
    reference = (tmp_path / "api.html").read_text()
    for name in ("ShardedAdaBelief.step", "AdaBelief", "checkpoint.save", "telemetry.StepMonitor"):
        assert f'id="belief_dist.{name}"' in reference
    # The home page is README, whose links were written for the repository.
    home = (tmp_path / "index.html").read_text()
    assert 'href="start-ddp.html"' in home and "docs/start-ddp" not in re.sub(r">[^<]*<", "", home)
