"""What the site has otherwise than the plain files: pages from outside docs/, links, the API.

A page must also read well where nothing runs this, so that all is written as for plain files, and
translated here.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import normpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
# Files of the repository that are pages of the site.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
_LINK = re.compile(r"(?<!!)\[((?:[^][]|\[[^][]*\])*)\]\(([^()\s]+)\)")
_IMAGE = re.compile(r"!\[([^]]*)\]\(([^()\s]+)\)")
_API = re.compile(r"^<!-- (::: [\w.]+)((?:\n {4}.*)*) -->$", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside docs/."""
    for source, page in PAGES.items():
        content = (ROOT / source).read_text()
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Translate a page's links, and let mkdocstrings describe what it marks."""
    outside = page.file.src_uri in PAGES.values()
    return _API.sub(r"\1\2", with_site_links(markdown, "." if outside else "docs"))


def with_site_links(markdown: str, folder: str) -> str:
    """Return a page whose links lead to the site's pages.

    Args:
        markdown: The page, with links between files of the repository.
        folder: Where it lies, "docs" or ".". What it links to outside docs/ is no part of the
            site, and remains as its words alone.
    """

    def target(path: str) -> str | None:
        if re.match(r"[a-z]+:|#", path):
            return path
        file, hash_sign, anchor = path.partition("#")
        found = normpath(f"{folder}/{file}")
        if found in PAGES:
            return PAGES[found] + hash_sign + anchor
        if found.startswith("docs/"):
            return found.removeprefix("docs/") + hash_sign + anchor
        return None

    def link(match: re.Match[str]) -> str:
        found = target(match[2])
        return match[1] if found is None else f"[{match[1]}]({found})"

    def image(match: re.Match[str]) -> str:
        return f"![{match[1]}]({target(match[2])})"

    return _LINK.sub(link, _IMAGE.sub(image, markdown))
