"""What the pages hold for a machine: their blocks of code, and the remarks about these."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_REMARK = re.compile(r"<!-- (prelude|not run here):\s((?:(?!-->).)*?)\s*-->\n\Z", re.DOTALL)
_INDENTED = re.compile(r"(?:^|\n\n)((?: {4}.*\n|\n(?= {4}))+)")


class Block(NamedTuple):
    """A block of code.

    Attributes:
        page: The file that it is in, from the repository's root.
        line: Where it begins, counted from 1.
        language: As behind the fence; "" of an indented or plain one.
        text: What it says.
        prelude: Code that gives what a reader has and the page does not.
        reason: Why it is not run; "" if it is.
    """

    page: str
    line: int
    language: str
    text: str
    prelude: str = ""
    reason: str = ""


def fenced(path: Path) -> Iterator[Block]:
    """Give the fenced blocks of a page, in order."""
    page = path.read_text()
    for match in _FENCE.finditer(page):
        indent, language, text = match.groups()
        remark = _REMARK.search(page[: match.start()])
        kind, said = remark.groups() if remark else ("", "")
        yield Block(
            path.relative_to(ROOT).as_posix(),
            page.count("\n", 0, match.start()) + 1,
            language,
            re.sub(f"^{indent}", "", text, flags=re.MULTILINE),
            said if kind == "prelude" else "",
            " ".join(said.split()) if kind == "not run here" else "",
        )


def indented(path: Path) -> Iterator[Block]:
    """Give the indented blocks of a page, which are commands, and what they print."""
    page = _FENCE.sub(lambda match: "\n" * match[0].count("\n"), path.read_text())
    for match in _INDENTED.finditer(page):
        yield Block(
            path.relative_to(ROOT).as_posix(),
            page.count("\n", 0, match.start(1)) + 1,
            "",
            re.sub("^ {4}", "", match[1], flags=re.MULTILINE),
        )


def with_language(*languages: str) -> list[Block]:
    """Return the fenced blocks of all pages in these languages."""
    blocks = (block for path in PAGES for block in fenced(path))
    return [block for block in blocks if block.language in languages]
