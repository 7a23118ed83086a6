"""A small open-world detector, and images with boxes."""

import torch

from mesa_train.models.open_world import OpenWorldRules, open_world_rcnn

CLASSES = 6


def detector(backbone="litv2_tiny", **rules):
    """A detector of 6 classes, 3 of them known, for images of about 96 x 128 pixels."""
    rules = OpenWorldRules(**{"start": 1, "queue_size": 4, "unknowns_per_image": 2} | rules)
    options = {"rules": rules, "min_size": 96, "max_size": 128, "box_dim": 64, "channels": 32}
    model = open_world_rcnn(backbone, CLASSES, **options)
    model.rpn._post_nms_top_n = {"training": 40, "testing": 20}
    model.heads.fg_bg_sampler.batch_size_per_image = 16
    model.start_task(3)
    return model.train()


def batch(counts=(2, 1), sizes=((96, 128), (90, 100)), classes=3):
    """Images, and targets with a number of boxes for each image."""
    images, targets = [], []
    for count, (height, width) in zip(counts, sizes, strict=True):
        images.append(torch.rand(3, height, width))
        corner = torch.rand(count, 2) * torch.tensor([width, height]) * 0.5
        side = torch.rand(count, 2) * torch.tensor([width, height]) * 0.4 + 8
        labels = torch.randint(0, classes, (count,))
        targets.append({"boxes": torch.cat([corner, corner + side], 1), "labels": labels})
    return images, targets
