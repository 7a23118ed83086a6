"""Average precision and mean IoU: known answers, and the official golden case."""

import math
from pathlib import Path

import folders
import numpy as np
import pytest
import torch

from mesa_train.training.dense import coco
from mesa_train.training.dense.evaluation import average_precision, detections_of
from mesa_train.training.evaluation.segmentation import confusion_matrix, segmentation_scores

GOLDEN = Path(__file__).parents[2] / "golden/semantic_fpn_golden.npz"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = folders.strange_folder(tmp_path_factory.mktemp("coco"))
    return coco.load(folders.annotations(folder, "val"), folder / "val", masks=True)


def perfect(data, index, score=1.0):
    """The targets of a picture as a model's output."""
    objects = data.pictures[index].objects
    return {
        "boxes": torch.from_numpy(objects.boxes[objects.trained]),
        "labels": torch.from_numpy(objects.labels[objects.trained]),
        "scores": torch.full((int(objects.trained.sum()),), score),
        "masks": torch.from_numpy(objects.masks()).bool()[:, None],
    }


def test_perfect_detections_have_precision_one_even_on_flat_boxes_and_empty_pictures(data):
    found = [
        entry
        for index in range(len(data.pictures))
        for entry in detections_of(data, index, perfect(data, index))
    ]
    assert {entry["category_id"] for entry in found} <= {7, 18, 90}
    scores = average_precision(data, found, masks=True, classes=True)
    # Flat boxes, and the box outside, are objects of class "one" that nothing can match.
    for name in data.names:
        assert scores[f"ap.{name}"] == pytest.approx(1.0) or name == "one"
    assert 0 < scores["ap.one"] < 1
    assert scores["mask_ap50"] > 0.6
    assert math.isnan(scores["ap_large"])


def test_detections_on_a_crowd_do_not_count(data):
    found = [
        entry
        for index in range(len(data.pictures))
        for entry in detections_of(data, index, perfect(data, index, 0.5))
    ]
    before = average_precision(data, found)
    inside = {"boxes": torch.tensor([[6.0, 6, 30, 30]]), "scores": torch.tensor([0.9])}
    crowd = detections_of(data, 0, {**inside, "labels": torch.tensor([1])})
    assert average_precision(data, found + crowd) == before
    elsewhere = detections_of(data, 1, {**inside, "labels": torch.tensor([1])})
    assert average_precision(data, found + elsewhere)["ap"] < before["ap"]


def test_no_detections_have_precision_zero(data):
    scores = average_precision(data, [], masks=True)
    assert scores["ap"] == scores["mask_ap"] == 0


def test_a_box_that_is_half_right_counts_at_low_ious_alone(data):
    objects = data.pictures[1].objects
    x1, y1, x2, y2 = objects.boxes[0].tolist()
    # An IoU of 0.7.
    box = torch.tensor([[x1, y1, x1 + 0.7 * (x2 - x1), y2]])
    output = {
        "boxes": box,
        "labels": torch.tensor([int(objects.labels[0])]),
        "scores": torch.ones(1),
    }
    one = coco.DetectionSet("", [data.pictures[1]], data.names, data.category_ids)
    object.__setattr__(one.pictures[0], "objects", objects)
    scores = average_precision(one, detections_of(one, 0, output), classes=True)
    assert scores["ap75"] == 0
    assert scores["ap50"] > 0
    assert scores["ap"] < scores["ap50"] / 2 + 1e-9


def test_mean_iou_of_the_official_case():
    golden = np.load(GOLDEN)
    labels = golden["miou_labels"].astype(np.int64)
    # reduce_zero_label of mmseg.
    labels = np.where((labels == 0) | (labels == 255), 255, labels - 1)
    pairs = zip(golden["miou_preds"], labels, strict=True)
    scores = segmentation_scores(sum(confusion_matrix(p, y, 25) for p, y in pairs))
    assert scores.mean_iou == pytest.approx(float(golden["miou"]), abs=1e-6)
    np.testing.assert_allclose(scores.iou, golden["miou_iou"], atol=1e-6)
    assert scores.pixel_accuracy == pytest.approx(float(golden["miou_aacc"]), abs=1e-6)
