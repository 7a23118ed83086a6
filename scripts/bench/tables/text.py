"""Shared parts of the tables: the folder of their rows, Markdown, and the origin of a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from mesa_train.utils import records
from mesa_train.utils.records import Row


class Table(NamedTuple):
    """A kind of table.

    Args:
        render: makes Markdown of rows.
        file: file of the rows.
        script: command that writes the rows.
        by: columns whose values are the words of a marker, in order. The first is required. Empty for
            a table without words.
        beside: more files. `render` gets the rows of each as another argument.
    """

    render: Callable[..., str]
    file: str
    script: str
    by: tuple[str, ...]
    beside: tuple[str, ...] = ()

    def markdown(self, results: Path, words: Sequence[str]) -> str:
        """Make the table from the folder of rows. ValueError if words are missing or too many."""
        name = self.render.__name__
        if len(self.by) == 1 and words:
            words = [" ".join(words)]
        if bool(words) != bool(self.by) or len(words) > len(self.by):
            optional = "".join(f" and optionally a {column}" for column in self.by[1:])
            expected = f"a {self.by[0]}{optional}" if self.by else "no words"
            raise ValueError(
                f"the table {name!r} takes {expected}, got {' '.join(words) or 'none'}"
            )
        values = dict(zip(self.by, words, strict=False))
        rows = [
            row
            for row in records.read(results / self.file)
            if all(row.get(column) == word for column, word in values.items())
        ]
        if not rows:
            return f"No rows yet: `{self.script}` makes them.\n"
        return self.render(rows, *[records.read(results / file) for file in self.beside])


def table(file: str, script: str, by: str = "", beside: str = "") -> Callable[..., Table]:
    """Decorates a function from rows, never none, to Markdown. by: columns, with spaces between.

    beside: more files, with spaces between. They may have no rows.
    """
    return lambda render: Table(render, file, script, tuple(by.split()), tuple(beside.split()))


def newest_run(rows: Sequence[Row]) -> list[Row]:
    """The rows with the date of the last one."""
    return [row for row in rows if row["date"] == rows[-1]["date"]]


def origin(row: Row) -> str:
    """The origin of a row in one sentence: machine, versions, commit, date."""
    return origins([row])


def origins(rows: Sequence[Row]) -> str:
    """The origin of rows of several runs in one sentence: the commits and the first and last day of each machine.

    A machine is a device with its threads and its version of PyTorch. Without rows, the text is empty.
    """
    machines: dict[str, list[Row]] = {}
    for row in rows:
        threads = f", {row['threads']} threads" if row["device_type"] == "cpu" else ""
        device = (
            f"{row['device']} ({row['arithmetic']})" if row.get("arithmetic") else row["device"]
        )
        machine = f"{device}{threads}, PyTorch {row['versions']['torch']}"
        machines.setdefault(machine, []).append(row)
    texts = []
    for machine, its_rows in machines.items():
        commits = list(dict.fromkeys(row["commit"] for row in its_rows))
        days = sorted({row["date"][:10] for row in its_rows})
        texts.append(
            f"{machine}, {'commit' if len(commits) == 1 else 'commits'} {', '.join(commits)}, "
            + (days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}")
        )
    return "; ".join(texts) + "." if texts else ""


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [head, rule, *lines])
