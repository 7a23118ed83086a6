"""Reader of a user's CSV file, which may come from a spreadsheet."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from mesa_train.training.config_schema import ConfigError


def read_table(path: Path, columns: Sequence[str], name: str) -> list[dict[str, str]]:
    """Rows of a CSV file in UTF-8, with or without a byte order mark.

    Args:
        path: of the file.
        columns: that it must have; it may have more.
        name: of the option, for messages.
    Raises:
        ConfigError: the file is missing, is no CSV in UTF-8, lacks a column or has no rows.
    """
    if not path.is_file():
        raise ConfigError(f"{name}: no file {path}")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            found = list(reader.fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{name}: {path} is no CSV file in UTF-8 ({error})") from None
    lacking = [column for column in columns if column not in found]
    if lacking:
        hint = "; commas separate columns" if len(found) == 1 else ""
        raise ConfigError(
            f"{name}: {path} must have the columns {', '.join(columns)}; it lacks "
            f"{', '.join(lacking)} and has {', '.join(map(repr, found)) or 'none'}{hint}"
        )
    if not rows:
        raise ConfigError(f"{name}: {path} has no rows")
    for number, row in enumerate(rows, start=2):
        short = [column for column in columns if row[column] is None]
        if short:
            raise ConfigError(f"{name}: {path}, line {number} has no {', '.join(short)}")
    return rows
