"""Images of the ViT-22B recipes: one global batch whatever the ranks, from folders and parquet too."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from mesa_train.training.vit22b import data as sharded_data
from mesa_train.training.vit22b.config import ConfigError, load

TINY = Path(__file__).resolve().parents[3] / "recipes/vit22b/tiny.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 images of two colours to train with, 4 to test with."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 10), ("validation", 2)):
        for label, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                shade = tuple(c + 5 * i for c in colour)
                Image.new("RGB", (40, 30), shade).save(root / split / label / f"{i}.png")
    return root


def config(*changes):
    return load(TINY, ["train.global_batch=8", "train.micro_batch=4", "train.steps=6", *changes])


def steps(settings, rank=0, ranks=1, first=0):
    """Images and labels of each step, all micro-batches together."""
    found = sharded_data.load(settings)
    return [
        tuple(map(torch.cat, zip(*micro, strict=True)))
        for micro in sharded_data.batches(settings, found, rank, ranks, first)
    ]


def test_ranks_share_the_batch_of_one_process(folder):
    settings = config("data.source=imagefolder", f"data.path={folder}")
    whole, parts = steps(settings), [steps(settings, rank, 2) for rank in (0, 1)]
    assert len(whole) == len(parts[0]) == 6
    for (images, labels), *own in zip(whole, *parts, strict=True):
        assert images.shape == (8, 3, 56, 56)
        assert images.min() >= -1
        assert images.max() <= 1
        together = torch.cat([o[0] for o in own])

        def in_order(batch):
            return batch.flatten(1)[batch.flatten(1).sum(1).argsort()]

        assert torch.equal(in_order(together), in_order(images))
        # Blue is 0 and red 1, in the names' order.
        assert torch.equal(labels, (images[:, 0].mean((1, 2)) > images[:, 2].mean((1, 2))).long())
    # Two batches an epoch: a resume in the middle of one sees the same.
    for (images, labels), (again, targets) in zip(whole[3:], steps(settings, first=3), strict=True):
        assert torch.equal(images, again)
        assert torch.equal(labels, targets)
    assert not torch.equal(whole[0][0], whole[2][0])


def test_parquet_and_what_ships_with_packages(folder):
    import datasets

    found = datasets.load_dataset("imagefolder", data_dir=str(folder))
    for split in ("train", "validation"):
        found[split].to_parquet(folder / f"{split}.parquet")
    as_parquet = steps(config("data.source=parquet", f"data.path={folder}"))
    as_folder = steps(config("data.source=imagefolder", f"data.path={folder}"))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(as_parquet, as_folder, strict=True))
    images, labels = steps(config())[0]
    assert images.shape == (8, 3, 56, 56)
    assert set(labels.tolist()) <= set(range(10))


def test_mistakes(folder):
    where = ("data.source=imagefolder", f"data.path={folder}")
    with pytest.raises(ConfigError, match=r"train\.global_batch=24 exceeds the 20 images"):
        sharded_data.load(config(*where, "train.global_batch=24"))
    with pytest.raises(ConfigError, match=r"model\.classes=5 but imagefolder has 2"):
        sharded_data.load(config(*where, "model.classes=5"))
    with pytest.raises(ConfigError, match="has no split 'val'"):
        sharded_data.load(config(*where, "data.val_split=val"))
