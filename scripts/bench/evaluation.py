"""Keep the numbers of an evaluation of several models as a row of docs/results/evaluation.jsonl.

recipes/evaluate/README.md has the commands that train two models and write their report. A table is
made of the newest row.

    python recipes/evaluate/run.py --model ... --model ...
    python scripts/bench/evaluation.py runs/evaluate/report.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mesa_train.utils import records

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/evaluation.jsonl"
# The command has paths of the machine.
LEFT_OUT = ("command", "features computed")


def main(
    report: Annotated[Path, typer.Argument(help="report.json of recipes/evaluate/run.py.")],
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
) -> None:
    """Append a row with the models and values of a report."""
    try:
        found = json.loads(report.read_text(encoding="utf-8"))
        row = row_of(found["models"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(
            f"evaluation: {report} is no report of several models ({type(error).__name__}: {error})"
        ) from None
    records.append(out, row)


def row_of(models: list[records.Row]) -> records.Row:
    """The row of a report's models."""
    abouts = [{k: v for k, v in m["about"].items() if k not in LEFT_OUT} for m in models]
    values: dict[tuple[str, str, str], records.Row] = {}
    for place, model in enumerate(models):
        for line in model["rows"]:
            key = line["task"], line["data"], line["metric"]
            row = values.setdefault(
                key, {**dict(zip(("task", "data", "metric"), key, strict=True)),
                      "share": line["share"], "values": [None] * len(models)},
            )  # fmt: skip
            row["values"][place] = line["value"]
    return {"models": abouts, "rows": list(values.values())}


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
