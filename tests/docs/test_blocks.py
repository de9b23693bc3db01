"""Every block of code in the pages does what a reader would do with it."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import _belief_dist_cli
from _belief_dist_cli import checkpoints, machine, training_files
from pages import PAGES, Block, fenced, indented, with_language
from tests.harness.paths import ROOT

# Blocks of Python that are not run here, by page; each says why before it.
NOT_RUN = {
    "docs/clients.md": 1,
    "docs/doors.md": 6,
    "docs/mpi.md": 1,
    "docs/start-deepspeed.md": 1,
    "docs/start-trainer.md": 1,
}
LANGUAGES = {"", "diff", "json", "python", "yaml"}
# Beginnings of what is a file of the repository, where a command names it.
FOLDERS = ("benchmarks/", "configs/", "docker/", "examples/", "launch/", "tests/")


def test_python_blocks_run(tmp_path: Path) -> None:
    """All pages in one process: importing torch costs more than all blocks together."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, Path(__file__).with_name("run_blocks.py"), tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    failed = json.loads((tmp_path / "failed.json").read_text())
    assert not failed, "\n".join(f"{page}:{line}: {error}" for page, line, error in failed)


def test_blocks_that_do_not_run_are_known_and_say_why() -> None:
    left_out = [block for block in with_language("python") if block.reason]
    print(*(f"{block.page}:{block.line}: {block.reason}" for block in left_out), sep="\n")
    assert Counter(block.page for block in left_out) == NOT_RUN
    for block in left_out:
        compile(block.text, block.page, "exec")


def test_every_block_has_a_language_that_is_checked() -> None:
    blocks = [block for path in PAGES for block in fenced(path)]
    assert {block.language for block in blocks} <= LANGUAGES
    # What was meant to be fenced as Python would not be run.
    loose = [block for path in PAGES for block in indented(path)]
    assert not [block for block in loose if re.search(r"^(import|from) \w", block.text, re.M)]


def test_json_and_yaml_blocks_are_read() -> None:
    for block in with_language("json"):
        whole = block.text if block.text.startswith("{") else f"{{{block.text}}}"
        assert json.loads(whole), f"{block.page}:{block.line}"
    for block in with_language("yaml"):
        assert yaml.safe_load(block.text), f"{block.page}:{block.line}"


def commands() -> Iterator[tuple[Block, list[str]]]:
    """Give the command lines of all blocks, as words; of `a|b`, both."""
    blocks = (block for path in PAGES for block in (*indented(path), *fenced(path)))
    for block in blocks:
        if block.language:
            continue
        for line in re.sub(r" *\\\n *", " ", block.text).splitlines():
            with contextlib.suppress(ValueError):  # what a program prints has apostrophes
                for words in alternatives(shlex.split(line, comments=True)):
                    yield block, words


def alternatives(words: list[str]) -> Iterator[list[str]]:
    """Give a line with each choice of what it separates by |."""
    choices = [word.split("|") if re.fullmatch(r"\w+(\|\w+)+", word) else [word] for word in words]
    for chosen in itertools.product(*choices):
        yield list(chosen)


def parses(words: list[str]) -> bool:
    with contextlib.redirect_stderr(None):
        return _belief_dist_cli.main(words) == 0


def test_lines_of_our_command_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (checkpoints, machine, training_files):
        monkeypatch.setattr(module, "act", lambda action, **arguments: 0)
    found = 0
    for block, words in commands():
        for name in ("belief-dist", "belief_dist.cli"):
            if name in words:
                assert parses(words[words.index(name) + 1 :]), f"{block.page}: {words}"
                found += 1
    assert found > 10  # or the pages are read wrongly
    assert not parses(["plan", "7e9", "--rank", "many"])


def has_module(name: str) -> bool:
    """Say whether `python -m NAME` finds something, without importing it."""
    top, *rest = name.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not rest:
        return spec is not None
    inside = [Path(folder, *rest) for folder in spec.submodule_search_locations or ()]
    return any(path.is_dir() or path.with_suffix(".py").exists() for path in inside)


def benchmarks() -> set[str]:
    """Return the commands of `python -m benchmarks`: what its lists name."""
    module = ast.parse((ROOT / "benchmarks" / "__main__.py").read_text())
    lists = [node.value for node in module.body if isinstance(node, ast.Assign)]
    elements = [each.elts for each in lists if isinstance(each, ast.List)]
    return {name.id for some in elements for name in some if isinstance(name, ast.Name)}


def test_what_lines_name_exists() -> None:
    known, targets = benchmarks(), (ROOT / "Makefile").read_text()
    modules = files = 0
    for block, words in commands():
        where = f"{block.page}: {' '.join(words)}"
        for flag, name in itertools.pairwise(words):
            if flag == "-m" and "pytest" not in words:
                assert has_module(name), where
                modules += 1
                if name == "benchmarks":
                    assert words[words.index(name) + 1] in known, where
        if words[:1] == ["make"] and len(words) > 1:
            assert re.search(rf"^{words[1].split('=')[0]}\b", targets, re.M), where
        for word in words:
            if word.startswith(FOLDERS):
                assert any(ROOT.glob(word.rstrip("/"))), where
                files += 1
    assert modules > 20 and files > 20


@pytest.mark.parametrize("name", ["benchmarks", "json.tool", "belief_dist.cli"])
def test_modules_are_found(name: str) -> None:
    assert has_module(name) and not has_module(f"{name}.nothing") and not has_module("nothing.x")
