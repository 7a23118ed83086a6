"""Wrong labels are found when a data set is opened, and named by file and row."""

import io

import pytest
from PIL import Image

from mesa_train.training.config_schema import ConfigError
from mesa_train.training.data import sources
from mesa_train.training.data.config import DataConfig

datasets = pytest.importorskip("datasets")


def encoded(value=0):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def table(labels, names=None):
    label = datasets.ClassLabel(names=names) if names else None
    rows = {"image": [{"bytes": encoded(i), "path": None} for i in range(len(labels))]}
    data = datasets.Dataset.from_dict(rows | {"label": labels})
    data = data.cast_column("image", datasets.Image())
    return data.cast_column("label", label) if label else data


def load(folder, kind="parquet", classes=None, **options):
    return sources.load(DataConfig(source=kind, path=str(folder), **options), classes)


@pytest.fixture
def saved(tmp_path):
    """Writes training files and a validation file of labels; returns their folder."""

    def save(*parts, val=(0, 1), names=None):
        folder = tmp_path / "[a] b*"
        folder.mkdir()
        for number, labels in enumerate(parts):
            table(list(labels), names).to_parquet(folder / f"train-{number}.parquet")
        table(list(val), names).to_parquet(folder / "validation-0.parquet")
        return folder

    return save


def test_right_labels_and_names_with_brackets(saved):
    found = load(saved([0, 2], [1]))
    assert (found.classes, found.train.count) == (3, 3)
    assert [found.train.read(i)[1] for i in range(3)] == [0, 2, 1]
    # An image that came without a path is named by its place.
    assert found.train.read(2)[2].endswith("train-1.parquet row 0")


@pytest.mark.parametrize(
    ("parts", "val", "message"),
    [
        (
            ([0, 1], [1, -1]),
            [0],
            r"train-1\.parquet row 1 is -1; a label must be an integer from 0",
        ),
        (([0, 1],), [0, 1, 2], r"validation-0\.parquet row 2 is 2, but there are 2 classes"),
        (([0, 1],), [-1, -1], r"validation-0\.parquet row 0 is -1"),
        (([0, None, 1],), [0], r"train-0\.parquet row 1 is null"),
        ((["a", "b"],), ["a"], r"train-0\.parquet row 0 is 'a', text"),
        (([0.0, 1.0],), [0.0], r"train-0\.parquet row 0 is 0\.0, a float"),
        (([True, False],), [True], r"train-0\.parquet row 0 is True, a bool"),
        (([[0, 1], [1]],), [[0]], r"train-0\.parquet row 0 is \[0, 1\], a list"),
        (([None, None],), [None], r"train-0\.parquet row 0 is null"),
    ],
)
def test_wrong_labels_of_files(saved, parts, val, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(saved(*parts, val=val))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("data.label_key=label: the label of ")


def test_images_without_a_label_in_a_set_with_named_classes(saved):
    """`datasets` keeps -1 for them in a column of classes."""
    with pytest.raises(ConfigError, match=r"validation-0\.parquet row 1 is -1"):
        load(saved([0, 1], val=[0, -1], names=["a", "b"]))


def test_arrow_files_name_their_rows_too(tmp_path):
    table([0, 1, 2]).save_to_disk(tmp_path / "train", num_shards=2)
    table([0, 3]).save_to_disk(tmp_path / "validation")
    with pytest.raises(ConfigError, match=r"00000-of-00001\.arrow row 1 is 3, but there are 3"):
        load(tmp_path, "arrow")


def test_a_stream_checks_a_label_when_it_is_read(saved):
    found = load(saved([0, 1, 5]), classes=2, streaming=True, train_images=3)
    rows = list(found.train.stream)
    assert found.train.read(rows[1])[1] == 1
    with pytest.raises(ConfigError, match=r"an image of parquet is 5, but there are 2 classes"):
        found.train.read(rows[2])


def test_a_split_takes_its_own_files_alone(saved):
    """`val` is no beginning of `validation-0.parquet`, and no file belongs to both splits."""
    folder = saved([0, 1])
    with pytest.raises(ConfigError, match=r"data\.val_split: .* neither val\*\.parquet nor val/"):
        load(folder, val_split="val")
    (folder / "validation-0.parquet").rename(folder / "train_val.parquet")
    with pytest.raises(ConfigError, match=r"train_val\.parquet is of both 'train' and 'train_val'"):
        load(folder, val_split="train_val")


def test_files_that_cannot_be_read_or_hold_no_images(saved, tmp_path):
    folder = saved([0, 1])
    with pytest.raises(ConfigError, match=r"data\.image_key=label: the column holds int64, no im"):
        load(folder, image_key="label")
    (folder / "train-0.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigError, match=r"data\.source=parquet in .*: ") as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_an_image_that_is_null_is_named_and_skipped(tmp_path):
    images = [{"bytes": encoded(), "path": None}, None, {"bytes": None, "path": None}]
    data = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 1]})
    for split in ("train", "validation"):
        data.cast_column("image", datasets.Image()).to_parquet(tmp_path / f"{split}.parquet")
    found = load(tmp_path)
    config = DataConfig(image_size=8)
    transform = sources.transforms(config, sources.AugmentConfig())[1]
    strict = sources.Samples(found.train, transform, 8, 0, "raise", replace=True)
    for row in (1, 2):
        with pytest.raises(
            sources.CorruptImage, match=rf"train\.parquet row {row} cannot be decoded \(.* null"
        ):
            strict[0, row]
    lenient = sources.Samples(found.train, transform, 8, 0, "skip", replace=True)
    image, label, skipped = lenient[0, 1]
    assert (image.shape, label, len(skipped)) == ((3, 8, 8), 0, 2)
