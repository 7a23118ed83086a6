"""Exemplar replay: the balanced set of images on which a detector is fine-tuned after a task (ORE)."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping

import torch


def select_exemplars(
    labels: Mapping[str, Iterable[int]],
    classes: Collection[int],
    per_class: int = 50,
    *,
    seed: int = 0,
) -> list[str]:
    """Choose images with about `per_class` objects of every class.

    Images come in a random order. Each object enters the image into the queue of its class, which
    keeps the newest `per_class` entries. The walk ends when all queues are full or no image is left.

    Args:
        labels: the labels of each image's objects, by image id, in a fixed order.
        classes: the known classes.
        per_class: N_ex; default 50. More objects of a class are seen, because all objects of the
            chosen images are trained on.
        seed: of the order; default 0.
    Returns:
        Image ids, sorted. Classes with fewer objects than `per_class` have all of them.
    Raises:
        ValueError: per_class is not positive.
    Source: arXiv 2103.02603, section 4.4; github.com/JosephKJ/OWOD.
    """
    if per_class < 1:
        raise ValueError(f"per_class must be at least 1, got {per_class}")
    queues: dict[int, deque[str]] = {c: deque(maxlen=per_class) for c in classes}
    images = list(labels)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    for index in order:
        for label in labels[images[index]]:
            if label in queues:
                queues[label].append(images[index])
        if all(len(queue) == per_class for queue in queues.values()):
            break
    return sorted({image for queue in queues.values() for image in queue})
