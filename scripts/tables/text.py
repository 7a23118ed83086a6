"""What the tables share: Markdown, and where a row comes from."""

from __future__ import annotations

from collections.abc import Sequence

from mesa_train.training.records import Row


def origin(row: Row) -> str:
    """Where a row was measured, in one sentence."""
    threads = f", {row['threads']} threads" if row["device_type"] == "cpu" else ""
    return (
        f"{row['device']}{threads}, PyTorch {row['versions']['torch']}, "
        f"commit {row['commit']}, {row['date'][:10]}."
    )


def missing(script: str) -> str:
    return f"No rows yet: `python {script}` makes them.\n"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [head, rule, *lines])
