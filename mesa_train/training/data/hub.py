"""Images through `datasets`: Parquet and Arrow files, or a data set on a hub by name.

This file lists local files itself and passes escaped names, because `datasets` reads names as
patterns. All labels are checked when the data set is opened (`labels.py`). The labels of a stream
are checked when a row is read. An image without a path is named by its file and row.
"""

from __future__ import annotations

import bisect
import difflib
import glob
import itertools
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mesa_train.training.config_schema import ConfigError

from . import labels
from . import packaged as builtin
from .config import FILES, DataConfig
from .image_records import Records, Sources

_TEXT_OR_BYTES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


def load(config: DataConfig, wanted: int | None) -> Sources:
    """Open a data set.

    Args:
        config: the section `data`.
        wanted: configured number of classes; a stream needs it.
    Raises:
        ConfigError: the data set cannot be read, lacks a split or a column, or has a wrong label.
    """
    splits = _splits(config)
    train, val = splits.opened
    features = train.features or {}
    for field, key in (("image_key", config.image_key), ("label_key", config.label_key)):
        if key not in features:
            raise ConfigError(
                f"data.{field}: {config.source} has no column {key!r}; {', '.join(features)}"
            )
    _check_images(features[config.image_key], config.image_key)
    classes = getattr(features[config.label_key], "num_classes", None)
    if config.streaming:
        classes = classes or wanted
        if classes is None:
            raise ConfigError("model.classes is missing: a stream cannot be searched for them")
    else:
        classes = _checked(config, splits, classes)
    return Sources(
        _records(config, train, splits.where(0), config.train_images or 0, classes),
        _records(config, val, splits.where(1), 0, classes),
        classes,
    )


class _Splits:
    """The opened training and validation split, and functions that name their rows."""

    def __init__(
        self, opened: tuple[Any, Any], names: tuple[str, str], files: Sequence[list[str]] = ()
    ) -> None:
        self.opened, self.names = opened, names
        self.tables = [_Files(paths) for paths in files]

    def where(self, which: int) -> Callable[[int], str]:
        """A function that names a row of split 0 (training) or 1 (validation)."""
        if self.tables:
            return self.tables[which].row
        return lambda index: f"split {self.names[which]!r} row {index}"


class _Files:
    """The Parquet or Arrow files of one split, in order."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def row(self, index: int) -> str:
        """File and row of a row of the split, both counted from 0."""
        which = bisect.bisect_right(self._ends, index)
        if which == len(self.paths):
            return f"row {index} of {len(self.paths)} files"
        start = self._ends[which - 1] if which else 0
        return f"{self.paths[which]} row {index - start}"

    @cached_property
    def _ends(self) -> list[int]:
        """The number of rows up to the end of each file."""
        return list(itertools.accumulate(map(_rows_of, self.paths)))


def _rows_of(path: str) -> int:
    """Number of rows of a Parquet or Arrow file, from its metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.endswith(".parquet"):
        return int(pq.ParquetFile(path).metadata.num_rows)
    with pa.memory_map(path) as file:
        try:
            batches = pa.ipc.open_stream(file)
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        return sum(batch.num_rows for batch in batches)


def _splits(config: DataConfig) -> _Splits:
    """Open both splits of a data set."""
    kind, names = config.source, (config.train_split, config.val_split)
    options: dict[str, Any] = {"data_dir": config.path} if config.path else {}
    files: list[list[str]] = []
    if kind in FILES:
        files = _files(config)
        # The configured names may be names that `datasets` does not allow.
        names = ("train", "validation")
        options = {
            "data_files": {
                name: [glob.escape(str(Path(path).absolute())) for path in paths]
                for name, paths in zip(names, files, strict=True)
            }
        }
    import datasets

    try:
        found = datasets.load_dataset(kind, streaming=config.streaming, **options)
    except Exception as error:  # from datasets, pyarrow, fsspec, the hub's client or the network
        near = difflib.get_close_matches(kind, [*builtin.BUILTIN, "imagefolder", *FILES], n=1)
        hint = f" (did you mean {near[0]}?)" if near and near[0] != kind else ""
        reason = " ".join(f"{error}{_cause(error)}".split())
        at = f" in {config.path}" if config.path else ""
        raise ConfigError(f"data.source={kind}{at}: {reason}{hint}") from None
    for field, split in zip(("train", "val"), names, strict=True):
        if split not in found:
            raise ConfigError(
                f"data.{field}_split: {kind} has no split {split!r}; it has {', '.join(found)}"
            )
    return _Splits((found[names[0]], found[names[1]]), names, files)


def _cause(error: BaseException) -> str:
    """The cause of an error: `datasets` puts the reason there, not in its own message."""
    return f" ({error.__cause__})" if error.__cause__ is not None else ""


def _files(config: DataConfig) -> list[list[str]]:
    """The files of both splits: SPLIT*.KIND in the folder, or in a folder SPLIT.

    `datasets` saves a split as a folder SPLIT. A letter after SPLIT makes a different name:
    `validation-0.parquet` does not belong to split `val`.
    """
    folder, kind = Path(config.path or "."), config.source
    found = []
    for name, split in (("train", config.train_split), ("val", config.val_split)):
        files = [
            *(p for p in _ending(folder, kind) if _belongs(p, split)),
            *_ending(folder / split, kind),
        ]
        if not files:
            raise ConfigError(
                f"data.{name}_split: {folder} has neither {split}*.{kind} nor {split}/*.{kind}"
            )
        found.append(sorted(map(str, files)))
    both = sorted(set(found[0]) & set(found[1]))
    if both and config.train_split != config.val_split:
        raise ConfigError(
            f"data.val_split: {both[0]} is of both {config.train_split!r} and "
            f"{config.val_split!r}; rename it, or keep each split in a folder of its own"
        )
    return found


def _belongs(path: Path, split: str) -> bool:
    """True if a file belongs to a split, by its name."""
    rest = path.name.removeprefix(split)
    return path.name.startswith(split) and not rest[:1].isalpha()


def _ending(folder: Path, kind: str) -> list[Path]:
    """The files of a kind in a folder; empty if there is no folder."""
    if not folder.is_dir():
        return []
    return [
        path
        for path in folder.iterdir()
        if path.name.endswith(f".{kind}") and not path.name.startswith(".") and path.is_file()
    ]


def _check_images(feature: Any, key: str) -> None:
    """Raise ConfigError for a column that holds no images, no bytes of files and no paths."""
    import datasets

    if isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in _TEXT_OR_BYTES:
        return
    if isinstance(feature, dict) and {"bytes", "path"} <= feature.keys():
        return
    kind = getattr(feature, "dtype", type(feature).__name__)
    raise ConfigError(f"data.image_key={key}: the column holds {kind}, no images")


def _checked(config: DataConfig, splits: _Splits, classes: int | None) -> int:
    """Check all labels of both splits. Returns the number of classes."""
    for index, (split, name) in enumerate(zip(splits.opened, ("train", "val"), strict=True)):
        if not len(split):
            raise ConfigError(f"data.{name}_split: {splits.names[index]!r} holds no images")
        column = split.data.column(config.label_key)
        largest = labels.check(column, splits.where(index), classes, config.label_key)
        # If the data set does not name its classes, the training labels give their number.
        classes = 1 + largest if classes is None else classes
    assert classes is not None
    return classes


def _records(
    config: DataConfig, split: Any, where: Callable[[int], str], count: int, classes: int
) -> Records:
    """The records of one split."""
    import datasets

    split = split.cast_column(config.image_key, datasets.Image(decode=False))

    def of_row(row: Any, name: str) -> tuple[Any, int, str]:
        image = row[config.image_key] or {}
        path = image.get("path")
        return image.get("bytes") or path, row[config.label_key], path or name

    def of_index(index: int) -> tuple[Any, int, str]:
        encoded, label, path = of_row(split[index], "")
        if not path:
            return encoded, label, where(index)
        return encoded, label, path if encoded is path else f"{path} (image {index})"

    def of_stream(row: Any) -> tuple[Any, int, str]:
        found = of_row(row, f"an image of {config.source}")
        fault = labels.wrong(found[1], classes)
        if fault is not None:
            raise ConfigError(
                f"data.label_key={config.label_key}: the label of {found[2]} {fault}; {labels.RULE}"
            )
        return found

    if config.streaming:
        return Records(of_stream, count, split)
    return Records(of_index, len(split))
