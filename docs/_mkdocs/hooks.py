"""Hooks of MkDocs: pages from outside of docs, and links that work in the repository and on the site.

In the repository, Markdown links to any file. On the site, links to pages stay links. A link to another
file becomes its text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
# Paths on the site, by the path in the repository.
OUTSIDE = {
    "recipes/litv2/README.md": "recipes/litv2.md",
    "recipes/vit22b/README.md": "recipes/vit22b.md",
    "recipes/mocov3/README.md": "recipes/mocov3.md",
    "recipes/dense/README.md": "recipes/dense.md",
    "recipes/evaluate/README.md": "recipes/evaluate.md",
    "recipes/distill/README.md": "recipes/distill.md",
    "recipes/lit/README.md": "recipes/lit.md",
    "recipes/decoders/README.md": "recipes/decoders.md",
    "recipes/video/README.md": "recipes/video.md",
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

    def link(match: re.Match[str]) -> str:
        target, _, anchor = match["target"].partition("#")
        if not target or "://" in target:
            return match[0]
        repository_path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        page_path = OUTSIDE.get(repository_path, repository_path.removeprefix("docs/"))
        if (
            repository_path not in OUTSIDE and not repository_path.startswith("docs/")
        ) or not files.get_file_from_path(page_path):
            return match["text"]
        path = posixpath.relpath(page_path, posixpath.dirname(site) or ".")
        return f"[{match['text']}]({path}{'#' if anchor else ''}{anchor})"

    markdown = _LINK.sub(link, markdown)
    return markdown.replace("](../../docs/results/", "](../results/")
