"""Hooks of MkDocs: pages from outside of docs, and links that work both in the repository and on the site.

The repository's Markdown links to any file. On the site, a link to a page is a link to it, and a link to any other file
is its text alone.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
# A file of the repository: its place on the site.
OUTSIDE = {
    "recipes/litv2/README.md": "recipes/litv2.md",
    "recipes/vit22b/README.md": "recipes/vit22b.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_PLACES = {site: source for source, site in OUTSIDE.items()}
_LINK = re.compile(r"(?<!!)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside of docs."""
    for source, site in OUTSIDE.items():
        files.append(File.generated(config, site, content=(ROOT / source).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Rewrite the links of a page."""
    site = page.file.src_uri
    source = _PLACES.get(site, f"docs/{site}")

    def link(found: re.Match[str]) -> str:
        target, _, anchor = found["target"].partition("#")
        if not target or "://" in target:
            return found[0]
        inside = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        there = OUTSIDE.get(inside, inside.removeprefix("docs/"))
        if (
            inside not in OUTSIDE and not inside.startswith("docs/")
        ) or not files.get_file_from_path(there):
            return found["text"]
        path = posixpath.relpath(there, posixpath.dirname(site) or ".")
        return f"[{found['text']}]({path}{'#' if anchor else ''}{anchor})"

    markdown = _LINK.sub(link, markdown)
    return markdown.replace("](../../docs/results/", "](../results/")
