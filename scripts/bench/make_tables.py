"""Write measured rows into the tables of README.md, docs and recipes.

A table is between two markers. This script replaces all text between them:

    <!-- table:step vit_small_patch16_224 -->
    <!-- /table -->

    python scripts/bench/make_tables.py            rewrites the files
    python scripts/bench/make_tables.py --check    fails if a table differs from its rows

The first word is the name of a decorated function in scripts/bench/tables. The other words are values
of its columns.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from tables import (
    codes,
    dense,
    efficient,
    engine,
    fallback,
    families,
    gpu,
    open_world,
    recipes,
    training,
    transfer,
)
from tables.text import Table

MODULES = (
    *(codes, dense, efficient, engine, fallback, families, gpu, open_world, recipes, training),
    transfer,
)
REPOSITORY = Path(__file__).resolve().parents[2]
MARKED = re.compile(
    r"(?P<open><!-- table:(?P<words>[^>]+?) -->\n)(?P<body>.*?)(?P<close><!-- /table -->)",
    re.DOTALL,
)


def main(
    check: Annotated[bool, typer.Option("--check", help="Change nothing; fail if stale.")] = False,
    root: Annotated[Path, typer.Option(help="Folder with README.md and docs.")] = REPOSITORY,
) -> None:
    """Rewrite every marked table from docs/results/*.jsonl."""
    stale = []
    folders = [path for name in ("docs", "recipes") for path in sorted((root / name).rglob("*.md"))]
    for path in [root / "README.md", *folders]:
        if not path.exists():
            continue
        text = path.read_text(encoding="utf-8")
        try:
            renewed = renew(text, root / "docs/results")
        except ValueError as error:
            raise SystemExit(f"make_tables: {path.relative_to(root)}: {error}") from None
        if renewed == text:
            continue
        stale.append(str(path.relative_to(root)))
        if not check:
            path.write_text(renewed, encoding="utf-8")
    if check and stale:
        raise SystemExit(
            f"make_tables: {', '.join(stale)} differ from the rows; run scripts/bench/make_tables.py"
        )


def renew(text: str, results: Path) -> str:
    """Return `text` with new bodies of all marked tables. ValueError for an unknown table."""

    def table(match: re.Match[str]) -> str:
        name, *words = match["words"].split()
        if name not in TABLES:
            raise ValueError(f"no table {name!r}; choose from {', '.join(TABLES)}")
        return match["open"] + TABLES[name].markdown(results, words) + match["close"]

    if text.count("<!-- table:") != len(MARKED.findall(text)):
        raise ValueError("a table marker is not closed by <!-- /table -->")
    return MARKED.sub(table, text)


TABLES: dict[str, Table] = {
    name: table
    for module in MODULES
    for name, table in vars(module).items()
    if isinstance(table, Table)
}


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
