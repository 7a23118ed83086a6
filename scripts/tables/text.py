"""What the tables share: where their rows lie, Markdown, and where a row comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from mesa_train.training import records
from mesa_train.training.records import Row


class Table(NamedTuple):
    """A kind of table: what makes Markdown of the rows that `script` left in `file`.

    by: the column that the marker's words name a value of, None for a table without words.
    """

    render: Callable[[Sequence[Row]], str]
    file: str
    script: str
    by: str | None

    def markdown(self, results: Path, words: Sequence[str]) -> str:
        """The table from the folder of rows. ValueError for words too many or missing."""
        name = self.render.__name__
        if bool(words) != bool(self.by):
            wanted = f"a {self.by}" if self.by else "no words"
            raise ValueError(f"the table {name!r} takes {wanted}, got {' '.join(words) or 'none'}")
        rows = records.read(results / self.file)
        if self.by:
            rows = [row for row in rows if row[self.by] == " ".join(words)]
        return self.render(rows) if rows else f"No rows yet: `{self.script}` makes them.\n"


def table(file: str, script: str, by: str | None = None) -> Callable[..., Table]:
    """Decorates a function from rows, never none, to Markdown."""
    return lambda render: Table(render, file, script, by)


def newest_run(rows: Sequence[Row]) -> list[Row]:
    """The rows with the date of the last one."""
    return [row for row in rows if row["date"] == rows[-1]["date"]]


def origin(row: Row) -> str:
    """Where a row was measured, in one sentence."""
    threads = f", {row['threads']} threads" if row["device_type"] == "cpu" else ""
    return (
        f"{row['device']}{threads}, PyTorch {row['versions']['torch']}, "
        f"commit {row['commit']}, {row['date'][:10]}."
    )


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [head, rule, *lines])
