"""Transforms move boxes, masks and maps with the picture; micro-batches do not depend on the processes."""

import folders
import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from mesa_train.training.config_schema import ConfigError
from mesa_train.training.dense import coco, transforms
from mesa_train.training.dense.config import AugmentConfig, DataConfig
from mesa_train.training.dense.loader import DetectionSamples, Loader, micro_batches


def picture(height, width):
    """A picture whose red is the column's number and whose green the row's."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[0], image[1] = torch.arange(width)[None], torch.arange(height)[:, None]
    return image


def sample(height=60, width=100):
    image = picture(height, width)
    boxes = torch.tensor([[10.0, 20, 30, 50], [60, 5, 98, 58]])
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    return {
        "image": tv_tensors.Image(image),
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "labels": torch.tensor([4, 2]),
        "masks": tv_tensors.Mask(masks),
    }


def boxes_of(masks):
    found = []
    for mask in masks:
        rows, columns = (mask.bool().any(dim).nonzero().flatten() for dim in (1, 0))
        found.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return torch.tensor(found, dtype=torch.float32)


@pytest.mark.parametrize(
    ("data", "augment"),
    [
        ({"short_side": 120, "long_side": 400}, {}),
        ({"short_side": 90, "long_side": 120}, {"scale": (0.5, 1.5)}),
        ({"short_side": 60, "long_side": 100}, {"scale": (0.7, 1.3), "crop": 64, "flip": 1.0}),
        ({"short_side": 60, "long_side": 100}, {"flip": 1.0, "photometric": 1.0}),
    ],
)
def test_boxes_and_masks_follow_the_picture(data, augment):
    transform = transforms.detection(DataConfig(**data), AugmentConfig(**augment))
    seen = 0
    for seed in range(8):
        torch.manual_seed(seed)
        found = transform(sample())
        assert found["image"].dtype == torch.uint8
        assert found["image"].shape[1:] == found["masks"].shape[1:]
        assert len(found["boxes"]) == len(found["labels"]) == len(found["masks"])
        kept = found["masks"].flatten(1).bool().any(1)
        # Scaled masks round to whole pixels.
        torch.testing.assert_close(
            found["boxes"][kept], boxes_of(found["masks"][kept]), rtol=0, atol=2
        )
        if not augment.get("photometric") and augment.get("flip") == 1.0:
            # Columns run backwards.
            row = found["image"][0, len(found["image"][0]) // 2].int()
            assert (row[row > 0].diff() <= 0).all()
        seen += len(found["boxes"])
    assert seen >= 8


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((480, 640), (800, 1067)), ((500, 333), (1201, 800)), ((300, 900), (444, 1333))],
)
def test_sides_are_scaled_as_the_references(size, wanted):
    assert transforms.scaled_size(*size, 800, 1333) == wanted


def test_a_crop_off_a_picture_without_objects_has_an_empty_target():
    transform = transforms.detection(
        DataConfig(short_side=60, long_side=100), AugmentConfig(crop=8, flip=0.0)
    )
    counts = set()
    for seed in range(20):
        torch.manual_seed(seed)
        found = transform(sample())
        counts.add(len(found["boxes"]))
        assert found["boxes"].shape[1:] == (4,)
        assert found["masks"].shape[1:] == (8, 8)
    assert 0 in counts


def test_maps_are_padded_with_255_and_pictures_with_zeros():
    augment = AugmentConfig(crop=64, scale=(0.5, 0.5))
    transform = transforms.segmentation(DataConfig(short_side=60, long_side=100), augment)
    labels = torch.arange(60 * 100).reshape(60, 100) % 300
    found = transform({"image": tv_tensors.Image(picture(60, 100)), "map": tv_tensors.Mask(labels)})
    assert found["image"].shape == (3, 64, 64)
    assert found["map"].shape == (64, 64)
    assert (found["map"][30:] == 255).all()
    assert (found["image"][:, 30:] == 0).all()
    assert (found["map"][:30, :50] == 255).float().mean() < 0.1
    # Labels above 255 survive.
    assert found["map"].max() > 255


def test_a_crop_of_one_class_is_drawn_again():
    labels = torch.zeros(64, 256, dtype=torch.int64)
    labels[:, 224:] = 1
    image = tv_tensors.Image(torch.zeros(3, 64, 256, dtype=torch.uint8))
    both = {}
    for share in (0.99, 1.0):
        crop = transforms.MapCrop(32, share)
        draws = []
        for seed in range(40):
            torch.manual_seed(seed)
            part = crop({"image": image, "map": tv_tensors.Mask(labels)})["map"]
            draws.append(len(part.unique()) == 2)
        both[share] = sum(draws)
    assert both[0.99] > 2 * both[1.0]


def test_micro_batches_have_one_group_and_every_picture():
    groups = np.array([0] * 7 + [1] * 5)
    options = {"seed": 3, "micro": 2, "each": 2}
    batches = micro_batches(groups, epoch=0, fill=True, **options)
    assert len(batches) == 8
    assert all(len(set(groups[batch])) == 1 for batch in batches)
    assert sorted({i for batch in batches for i in batch}) == list(range(12))
    dropped = micro_batches(groups, epoch=0, fill=False, **options)
    assert len(dropped) == 4
    assert dropped != micro_batches(groups, epoch=1, fill=False, **options)


def test_two_processes_have_the_micro_batches_of_one_and_any_step_is_a_start():
    groups = np.arange(24) % 2
    dataset = [{"image": torch.zeros(1), "target": {}, "index": i} for i in range(24)]

    class Numbers(torch.utils.data.Dataset):
        def __getitem__(self, key):
            return {**dataset[key[1]], "index": (key[0], key[1])}

    def loader(accumulation, rank=0, world=1):
        return Loader(
            Numbers(), Numbers(), groups, seed=1, micro=3, accumulation=accumulation, fill=True,
            rank=rank, world=world,
        )  # fmt: skip

    one = loader(2)
    assert one.steps == 4
    alone = [batch.indices for batch, _ in zip(one.training(0), range(20), strict=False)]
    pair = [loader(1, rank, 2).training(0) for rank in range(2)]
    together = [next(side).indices for _ in range(10) for side in pair]
    assert together == alone
    later = [batch.indices for batch, _ in zip(one.training(3), range(4), strict=False)]
    assert later == alone[6:10]
    with pytest.raises(ConfigError, match=r"train.global_batch=60 exceeds the 24 training"):
        Loader(Numbers(), Numbers(), groups, seed=1, micro=30, accumulation=2, fill=False)


def test_a_sample_depends_on_seed_epoch_and_index_alone(tmp_path):
    folder = folders.coco_folder(tmp_path)
    data = coco.load(folders.annotations(folder), folder / "train", masks=True)
    transform = transforms.detection(
        DataConfig(short_side=64, long_side=96), AugmentConfig(scale=(0.5, 1.0), photometric=0.5)
    )
    samples = DetectionSamples(data, transform, 5, masks=True)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = samples[2, 1]
    assert torch.equal(torch.get_rng_state(), before)
    samples[0, 0]
    two = samples[2, 1]
    assert torch.equal(one["image"], two["image"])
    assert torch.equal(one["target"]["boxes"], two["target"]["boxes"])
    other = samples[3, 1]
    assert one["image"].shape != other["image"].shape or not torch.equal(
        one["image"], other["image"]
    )
