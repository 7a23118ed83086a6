"""Images by index and as a stream: orders, corrupt files, formats."""

import io
import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image

from mesa_train.training.classification.config import of_dict
from mesa_train.training.classification.dry_run import Plan
from mesa_train.training.config_schema import ConfigError
from mesa_train.training.data import sources
from mesa_train.training.data.config import AugmentConfig, DataConfig
from mesa_train.training.data.loader import Loader, Stream

AUGMENT = AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1")


def loader_of(config, found, plan, rank, transforms):
    """A rank's batches under a configuration and its plan."""
    return Loader(
        found,
        transforms,
        config.data,
        batch_size=config.train.micro_batch,
        seed=config.train.seed,
        steps_per_epoch=plan.steps_per_epoch,
        accumulation=plan.accumulation,
        rank=rank,
        world=plan.world,
        pin_memory=False,
    )


def picture(value):
    return Image.fromarray(np.full((20, 24, 3), value, np.uint8))


def encoded(value):
    buffer = io.BytesIO()
    picture(value).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Two classes; the last training image of the first is no image."""
    for split, count in (("train", 6), ("validation", 4)):
        for label in ("cat", "dog"):
            place = tmp_path / "images" / split / label
            place.mkdir(parents=True)
            for index in range(count):
                picture(10 * index).save(place / f"{index}.png")
    (tmp_path / "images/train/cat/5.png").write_bytes(b"not an image")
    return tmp_path / "images"


def save(kind, path, split, count):
    """Parquet files as a hub holds them, Arrow files as `save_to_disk` writes them."""
    import datasets

    rows = {
        "image": [{"bytes": encoded(i), "path": None} for i in range(count)],
        "label": [i % 3 for i in range(count)],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    data = datasets.Dataset.from_dict(rows, features=features)
    if kind == "parquet":
        data.to_parquet(path / f"{split}-0.parquet")
    else:
        data.save_to_disk(path / split)


def samples(records, on_corrupt="raise", replace=True, seed=0):
    train, _ = sources.transforms(DataConfig(image_size=16), AUGMENT)
    return sources.Samples(records, train, 16, seed, on_corrupt, replace)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_cut_the_same_permutation(world):
    cut = {"count": 103, "seed": 3, "epoch": 2, "first": 0, "micro": 4 // world, "accum": 2}
    per_rank = [list(sources.train_order(**cut, rank=r, world=world)) for r in range(world)]
    steps = [
        sorted(
            pair for batches in per_rank for batch in batches[2 * s : 2 * s + 2] for pair in batch
        )
        for s in range(len(per_rank[0]) // 2)
    ]
    alone = list(sources.train_order(**{**cut, "micro": 4}, rank=0, world=1))
    expected = [sorted(alone[2 * s] + alone[2 * s + 1]) for s in range(len(alone) // 2)]
    assert steps == expected
    assert len(steps) == 103 // 8
    indices = [i for step in steps for _, i in step]
    assert len(set(indices)) == len(indices)


def test_an_order_continues_in_the_middle():
    cut = {"count": 50, "seed": 1, "epoch": 0, "rank": 1, "world": 2, "micro": 3, "accum": 2}
    assert (
        list(sources.train_order(**cut, first=2)) == list(sources.train_order(**cut, first=0))[4:]
    )


def test_validation_sees_every_image_once():
    parts = [list(sources.val_order(10, rank=r, world=2, batch=3)) for r in range(2)]
    assert len(parts[0]) == len(parts[1])
    seen = [i for part in parts for batch in part for _, i in batch if i >= 0]
    assert sorted(seen) == list(range(10))


def test_a_sample_depends_on_seed_epoch_and_index_alone():
    records = sources.load(DataConfig(source="digits"), None).train
    data = samples(records)
    stream = torch.get_rng_state()
    first = data[0, 5][0]
    assert torch.equal(torch.get_rng_state(), stream)
    torch.manual_seed(99)
    assert torch.equal(data[0, 5][0], first)
    assert not torch.equal(data[1, 5][0], first)
    assert not torch.equal(samples(records, seed=1)[0, 5][0], first)


def test_a_sample_seeds_no_device(monkeypatch):
    """`torch.manual_seed` takes a millisecond in a process that has not initialised CUDA."""
    data = samples(sources.load(DataConfig(source="digits"), None).train)
    known = sources.seed_cpu

    def of_all_devices(*numbers):
        torch.manual_seed(known(*numbers))

    with monkeypatch.context() as patch:
        patch.setattr(sources, "seed_cpu", of_all_devices)
        expected = data[2, 5][0]

    def refuse(seed):
        raise AssertionError(f"torch.manual_seed({seed})")

    monkeypatch.setattr(torch, "manual_seed", refuse)
    assert torch.equal(data[2, 5][0], expected)


@pytest.mark.parametrize("accelerator", [False, True])
def test_a_step_seeds_the_devices_that_there_are(monkeypatch, accelerator):
    seeds = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    sources.seed_all(1, 2)
    drawn = random.random(), np.random.rand(), torch.rand(())  # noqa: NPY002
    assert sources.seed_cpu(1, 2) == torch.initial_seed()
    assert seeds == [torch.initial_seed()] * accelerator
    assert drawn == (random.random(), np.random.rand(), torch.rand(()))  # noqa: NPY002


def test_folders_of_images_and_corrupt_ones(folder):
    found = sources.load(DataConfig(source="imagefolder", path=str(folder)), 2)
    assert (found.classes, found.train.count, found.val.count) == (2, 12, 8)
    with pytest.raises(sources.CorruptImage, match=r"cat/5\.png.*data\.on_corrupt=skip"):
        samples(found.train)[0, 5]
    image, label, skipped = samples(found.train, "skip")[0, 5]
    assert image.shape == (3, 16, 16)
    assert label == 1
    assert [s.endswith("cat/5.png") for s in skipped] == [True]
    image, label, skipped = samples(found.train, "skip", replace=False)[0, 5]
    assert (label, len(skipped)) == (sources.IGNORED, 1)


# `datasets` waits for five seconds at the end of a stream's shuffle buffer.
@pytest.mark.parametrize("streaming", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_files_whole_and_streamed(tmp_path, kind, streaming):
    for split, count in (("train", 40), ("validation", 7)):
        save(kind, tmp_path, split, count)
    values = {
        "data": {
            "source": kind, "path": str(tmp_path), "streaming": streaming,
            "train_images": 40, "image_size": 16, "workers": 0, "pin_memory": False,
        },
        "augment": {"mixup": 0, "cutmix": 0},
        "train": {"global_batch": 8, "micro_batch": 2, "device": "cpu"},
    }  # fmt: skip
    config = of_dict(values)
    found = sources.load(config.data, 3)
    assert (found.classes, found.train.count) == (3, 40)
    plan = Plan(world=2, accumulation=2, steps_per_epoch=5, steps=5)
    transforms = sources.transforms(config.data, config.augment)
    ranks = [loader_of(config, found, plan, rank, transforms) for rank in range(2)]
    batches = [list(rank.training(0, 0)) for rank in ranks]
    labels = [[batch[1].tolist() for batch in own] for own in batches]
    assert [len(own) for own in labels] == [10, 10]
    together = sorted(value for rank in labels for batch in rank for value in batch)
    assert together == sorted(i % 3 for i in range(40))
    # From step 3 on the rest of the same epoch, image for image.
    whole = [batch[0] for batch in batches[1]]
    rest = [batch[0] for batch in ranks[1].training(0, 3)]
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[6:], strict=True))
    seen = [v for rank in ranks for b in rank.validation() for v in b[1].tolist() if v >= 0]
    assert sorted(seen) == sorted(i % 3 for i in range(7))


@pytest.mark.slow
def test_a_folder_of_images_streamed(folder):
    config = of_dict(
        {
            "model": {"classes": 2},
            "data": {
                "source": "imagefolder", "path": str(folder), "streaming": True, "workers": 0,
                "train_images": 12, "image_size": 16, "on_corrupt": "skip", "pin_memory": False,
            },
            "augment": {"mixup": 0, "cutmix": 0},
            "train": {"global_batch": 4, "micro_batch": 4, "device": "cpu"},
        }
    )  # fmt: skip
    found = sources.load(config.data, 2)
    transforms = sources.transforms(config.data, config.augment)
    loader = loader_of(config, found, Plan(1, 1, 3, 3), 0, transforms)
    batches = list(loader.training(0, 0))
    # Eleven of the twelve can be decoded; another image stands in for the broken one.
    assert [len(labels) for _, labels, _ in batches] == [4, 4, 4]
    assert [p.endswith("cat/5.png") for _, _, skipped in batches for p in skipped] == [True]
    # Whatever was skipped before, the rest of an epoch is the same after a restart.
    for first in (1, 2):
        again = list(loader.training(0, first))
        assert len(again) == 3 - first
        for ours, whole in zip(again, batches[first:], strict=True):
            assert torch.equal(ours[0], whole[0])
            assert torch.equal(ours[1], whole[1])
    labels = [label for _, own, _ in loader.validation() for label in own.tolist()]
    assert sorted(labels) == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("change", "classes", "message"),
    [
        ({}, 5, "model.classes=5 but imagefolder has 2"),
        ({"val_split": "test"}, None, r"data\.val_split: imagefolder has no split 'test'; it has"),
        ({"image_key": "img"}, None, r"data\.image_key: imagefolder has no column 'img'; image"),
        ({"label_key": "y"}, None, r"data\.label_key: imagefolder has no column 'y'"),
        ({"source": "arrow"}, None, r"data\.train_split: .* neither train\*\.arrow nor train/\*"),
    ],
)
def test_what_does_not_fit_is_named(folder, change, classes, message):
    with pytest.raises(ConfigError, match=message):
        sources.load(DataConfig(**{"source": "imagefolder", "path": str(folder)} | change), classes)


def test_a_mistyped_source_is_looked_for_on_a_hub_and_the_nearest_is_named(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"source=mnst5k: .*\(did you mean mnist5k\?\)"):
        sources.load(DataConfig(source="mnst5k"), None)


class Rows(list):
    """Stands for a streamed data set of `datasets`, whose end costs five seconds each."""

    def shuffle(self, seed, buffer_size):
        order = np.random.RandomState(seed).permutation(len(self))
        return [self[i] for i in order]


def stream(rows, on_corrupt="skip", replace=True, **place):
    records = sources.Records(lambda row: (*row, f"image {row[1]}"), len(rows), Rows(rows))
    place = {"epoch": 0, "rank": 0, "world": 1, "first": 0} | place
    return Stream(samples(records, on_corrupt, replace), **place)


def test_a_stream_fills_its_epoch_whatever_is_broken_and_however_short_it_is():
    rows = [(b"none" if i % 3 == 0 else encoded(i), i) for i in range(10)]
    take = lambda n, **place: list(itertools.islice(stream(rows, **place), n))  # noqa: E731
    whole = take(35)
    assert {label for _, label, _ in whole} == {1, 2, 4, 5, 7, 8}
    assert len({path for _, _, paths in whole for path in paths}) == 4
    for first in (1, 9, 10, 11, 23):
        for ours, expected in zip(take(35 - first, first=first), whole[first:], strict=True):
            assert ours[1] == expected[1]
            assert torch.equal(ours[0], expected[0])
    # Two ranks share the places of every turn between them.
    ranks = [take(15, rank=rank, world=2) for rank in range(2)]
    assert all(len(own) == 15 for own in ranks)
    assert [label for _, label, _ in stream(rows, replace=False)] == [1, 2, 4, 5, 7, 8]


def test_a_stream_of_nothing_that_can_be_decoded():
    with pytest.raises(sources.CorruptImage, match="none of 3 images of the stream"):
        next(iter(stream([(b"none", i) for i in range(3)])))
    with pytest.raises(sources.CorruptImage, match=r"image 1 cannot be decoded"):
        next(iter(stream([(b"none", 1)], on_corrupt="raise")))


def test_a_test_image_is_resized_and_cropped_or_squashed():
    image = picture(200)
    for crop in (True, False):
        _, test = sources.transforms(DataConfig(image_size=16, crop=crop), AUGMENT)
        assert test(image).shape == (3, 16, 16)


# PyTorch's threads do not mind being forked here: workers decode images and compute nothing.
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_the_number_of_workers_changes_nothing():
    found = sources.load(DataConfig(source="digits"), None)
    seen = []
    for workers in (0, 2):
        config = of_dict(
            {
                "data": {"source": "digits", "image_size": 16, "workers": workers},
                "train": {"global_batch": 8, "micro_batch": 8, "device": "cpu"},
            }
        )
        plan = Plan(world=1, accumulation=1, steps_per_epoch=179, steps=179)
        transforms = sources.transforms(config.data, config.augment)
        batches = loader_of(config, found, plan, 0, transforms).training(1, 175)
        seen.append([batch[0] for batch in batches])
    assert len(seen[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def _bomb():
    """A PNG that says it is 30,000 pixels wide and high, above Pillow's limit."""
    import struct
    import zlib

    def chunk(kind, body):
        whole = kind + body
        return struct.pack(">I", len(body)) + whole + struct.pack(">I", zlib.crc32(whole))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


BROKEN = {
    "bomb.png": _bomb(),
    "empty.png": b"",
    "text.jpg": b"no image",
    "cut.png": encoded(3)[:60],
    "cut.avif": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(40),
    # A damaged chunk: SyntaxError in Pillow.
    "chunk.png": encoded(3)[:33] + b"\0\0\0\x0dIDAX" + bytes(30),
}


@pytest.mark.parametrize("name", [*BROKEN, "gone.png"])
def test_whatever_decoding_raises_is_a_corrupt_image_with_its_path(tmp_path, name):
    for split in ("train", "validation"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            picture(5).save(tmp_path / split / label / "0.png")
    broken = tmp_path / "train/a" / name
    if name in BROKEN:
        broken.write_bytes(BROKEN[name])
    else:
        broken.symlink_to("nowhere.png")
    found = sources.load(DataConfig(source="imagefolder", path=str(tmp_path)), None)
    index = next(i for i in range(3) if found.train.read(i)[2] == str(broken))
    with pytest.raises(sources.CorruptImage) as error:
        samples(found.train)[0, index]
    assert str(error.value).startswith(f"{broken} cannot be decoded (")
    assert "\n" not in str(error.value)
    image, _, skipped = samples(found.train, "skip")[0, index]
    assert (image.shape, skipped) == ((3, 16, 16), [str(broken)])


# PyTorch's threads do not mind being forked here: workers decode images and compute nothing.
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("streaming", [False, True])
def test_a_worker_process_tells_a_broken_image_in_one_line(folder, streaming):
    config = of_dict(
        {
            "data": {
                "source": "imagefolder", "path": str(folder), "image_size": 16, "workers": 1,
                "streaming": streaming, "train_images": 12,
            },
            "train": {"global_batch": 6, "micro_batch": 6, "device": "cpu"},
        }
    )  # fmt: skip
    found = sources.load(config.data, 2)
    transforms = sources.transforms(config.data, config.augment)
    batches = loader_of(config, found, Plan(1, 1, 2, 2), 0, transforms).training(0, 0)
    with pytest.raises(sources.CorruptImage) as error:
        list(batches)
    assert str(error.value).startswith(f"{folder}/train/cat/5.png cannot be decoded (")
    assert "\n" not in str(error.value)


def test_when_no_image_can_be_decoded_the_error_says_why():
    records = sources.Records(lambda i: (b"none", 0, f"image {i}"), 3)
    with pytest.raises(
        sources.CorruptImage, match=r"none of 3 images can be decoded: image 1 cannot be decoded \("
    ):
        samples(records, "skip")[0, 2]


def test_ranks_share_the_validation_images_of_a_stream():
    """Also after a restart: validation begins with the first image whatever the step."""
    rows = Rows((encoded(20 * i), i) for i in range(9))
    records = sources.Records(lambda row: (*row, f"image {row[1]}"), len(rows), rows)
    config = of_dict(
        {
            "data": {"source": "parquet", "path": ".", "image_size": 16, "workers": 0,
                     "train_images": 9, "streaming": True, "pin_memory": False},
            "augment": {"mixup": 0, "cutmix": 0},
            "train": {"global_batch": 8, "micro_batch": 4, "device": "cpu"},
        }
    )  # fmt: skip
    transforms = sources.transforms(config.data, config.augment)
    plan = Plan(world=2, accumulation=1, steps_per_epoch=1, steps=1)
    found = sources.Sources(records, records, 9)
    seen = [
        [label for _, own, _ in loader_of(config, found, plan, rank, transforms).validation() for label in own.tolist()]
        for rank in range(2)
    ]  # fmt: skip
    assert seen == [[0, 2, 4, 6, 8], [1, 3, 5, 7]]
