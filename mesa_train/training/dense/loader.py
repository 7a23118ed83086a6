"""Samples and micro-batches of detectors and segmenters, from any step on.

A sample depends on (seed, epoch, index) alone, a micro-batch on (seed, epoch). Every number of
processes therefore trains on the same micro-batches, and a resumed run continues exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from mesa_train.training.config_schema import ConfigError
from mesa_train.training.data.decode import decode
from mesa_train.training.data.sources import MISTAKES, CorruptImage, keeping_random_state, seed_cpu

from .annotations import DetectionSet, encoded
from .maps import MapSet, read_map

Sample = dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    Attributes:
        images: (3, H, W) each.
        targets: of each image, for a detector's training, or {"map": (H, W)}.
        indices: of the pictures in the split.
    """

    images: list[Tensor]
    targets: list[dict[str, Tensor]]
    indices: list[int]

    def pin_memory(self) -> Batch:
        """The batch in pinned memory. PyTorch's loader calls this method."""
        return Batch(
            [image.pin_memory() for image in self.images],
            [{k: v.pin_memory() for k, v in target.items()} for target in self.targets],
            self.indices,
        )


def read_picture(path: Any) -> tv_tensors.Image:
    """A picture of any mode as uint8 (3, H, W), of a path or a `Cell`.

    Raises:
        CorruptImage: it cannot be decoded; names the path.
    """
    try:
        return tv_tensors.Image(F.pil_to_tensor(decode(encoded(path))))
    except Exception as error:  # Pillow raises errors of many types
        text = " ".join(str(error).split()) or type(error).__name__
        raise CorruptImage(f"{path} cannot be decoded ({text})") from None


class DetectionSamples(Dataset[Sample]):
    """Pictures and targets of a detector: (epoch, index) to {"image", "target", "index"}.

    Args:
        data: the split.
        transform: of a training sample; None for the picture alone, as it is.
        seed: of the transform.
        masks: targets have masks.
    """

    def __init__(self, data: DetectionSet, transform: Any, seed: int, *, masks: bool) -> None:
        self.data, self.transform, self.seed, self.masks = data, transform, seed, masks

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        picture = self.data.pictures[index]
        image, objects = read_picture(picture.path), picture.objects
        size = (objects.height, objects.width)
        if tuple(image.shape[1:]) != size:
            raise CorruptImage(
                f"{picture.path} has {image.shape[1]} x {image.shape[2]} pixels after its EXIF turn, "
                f"but {picture.name} says {size[0]} x {size[1]}"
            )
        if self.transform is None:
            return {"image": image.as_subclass(Tensor), "target": {}, "index": index}
        boxes = torch.from_numpy(objects.targets())
        sample: Sample = {
            "image": image,
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.from_numpy(objects.labels[objects.trained]),
        }
        if self.masks:
            sample["masks"] = tv_tensors.Mask(torch.from_numpy(objects.masks()))
        with keeping_random_state():
            seed_cpu(self.seed, epoch, index)
            sample = self.transform(sample)
        return {"image": sample.pop("image"), "target": sample, "index": index}

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[Any]:
        """The samples of a batch, or the error of one."""
        return _together(self, keys)


class SegmentationSamples(Dataset[Sample]):
    """Pictures and maps of a segmenter: (epoch, index) to {"image", "target", "index"}.

    Args:
        data: the split.
        classes: number of classes.
        transform: of a sample {"image", "map"}.
        seed: of the transform.
    """

    def __init__(self, data: MapSet, classes: int, transform: Any, seed: int) -> None:
        self.data, self.classes, self.transform, self.seed = data, classes, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        path, map_path = self.data.pairs[index]
        image = read_picture(path)
        labels = read_map(map_path, self.classes, zero_ignored=self.data.zero_ignored)
        if tuple(image.shape[1:]) != labels.shape:
            raise CorruptImage(
                f"{map_path} has {labels.shape[0]} x {labels.shape[1]} pixels, but {path} has "
                f"{image.shape[1]} x {image.shape[2]}"
            )
        # Classes above 255 need more than a byte.
        sample = {"image": image, "map": tv_tensors.Mask(torch.from_numpy(labels))}
        with keeping_random_state():
            seed_cpu(self.seed, epoch, index)
            sample = self.transform(sample)
        return {"image": sample["image"], "target": {"map": sample["map"]}, "index": index}

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[Any]:
        """The samples of a batch, or the error of one."""
        return _together(self, keys)


def _together(samples: Any, keys: Sequence[tuple[int, int]]) -> list[Any]:
    """Samples, or one error: an error that a worker raises would come with its traceback."""
    try:
        return [samples[key] for key in keys]
    except MISTAKES as error:
        return [error]


def collate(samples: list[Any]) -> Batch | Exception:
    """A batch of samples, or the error among them."""
    for sample in samples:
        if isinstance(sample, Exception):
            return sample
    return Batch(
        [sample["image"] for sample in samples],
        [sample["target"] for sample in samples],
        [sample["index"] for sample in samples],
    )


def micro_batches(
    groups: NDArray[Any], *, seed: int, epoch: int, micro: int, each: int, fill: bool
) -> list[list[int]]:
    """All micro-batches of an epoch, of all processes.

    Args:
        groups: a group number for each picture. A micro-batch has pictures of one group.
        seed, epoch: decide the order.
        micro: pictures in a micro-batch.
        each: micro-batches of an optimizer step; their number is a multiple of it.
        fill: complete the last ones with pictures of the epoch's beginning; else drop them.
    """
    random = np.random.default_rng([seed, epoch])
    batches: list[list[int]] = []
    for group in np.unique(groups):
        order = random.permutation(np.flatnonzero(groups == group))
        count = -(-len(order) // micro) if fill else len(order) // micro
        batches += np.resize(order, count * micro).reshape(count, micro).tolist()
    batches = [batches[i] for i in random.permutation(len(batches))]
    steps = -(-len(batches) // each) if fill else len(batches) // each
    return [batches[i % len(batches)] for i in range(steps * each)]


class Loader:
    """Micro-batches of one process.

    Args:
        train, val: samples.
        groups: of the training pictures, see `micro_batches`.
        seed: of the order.
        micro: pictures in a micro-batch.
        accumulation: micro-batches of a process in an optimizer step.
        fill: see `micro_batches`.
        rank, world: this process and the number of processes.
        workers, pin_memory: of PyTorch's loader.
    Raises:
        ConfigError: the pictures do not fill one step.
    """

    def __init__(
        self,
        train: Dataset[Sample],
        val: Dataset[Sample],
        groups: NDArray[Any],
        *,
        seed: int,
        micro: int,
        accumulation: int,
        fill: bool,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.train, self.val, self.groups = train, val, groups
        self.accumulation, self.rank, self.world = accumulation, rank, world
        self.workers, self.pin_memory = workers, pin_memory
        self._order: Callable[[int], list[list[int]]] = lambda epoch: micro_batches(
            groups, seed=seed, epoch=epoch, micro=micro, each=accumulation * world, fill=fill
        )
        self.steps = len(self._order(0)) // (accumulation * world)
        if not self.steps:
            raise ConfigError(
                f"train.global_batch={micro * accumulation * world} exceeds the {len(groups)} "
                "training pictures"
            )

    def training(self, step: int) -> Iterator[Batch]:
        """This process's micro-batches from an optimizer step on, without end."""
        while True:
            epoch, first = divmod(step, self.steps)
            order, keys = self._order(epoch), []
            for current in range(first, self.steps):
                for turn in range(self.accumulation):
                    index = (current * self.accumulation + turn) * self.world + self.rank
                    keys.append([(epoch, i) for i in order[index]])
            yield from self._batches(self.train, keys)
            step = (epoch + 1) * self.steps

    def validation(self, count: int) -> Iterator[Batch]:
        """This process's share of the validation pictures, one a batch."""
        keys = [[(0, index)] for index in range(self.rank, count, self.world)]
        yield from self._batches(self.val, keys)

    def _batches(self, samples: Dataset[Sample], keys: list[list[tuple[int, int]]]) -> Any:
        loader: DataLoader[Any] = DataLoader(
            samples,
            batch_sampler=keys,
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=self.pin_memory,
        )
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            yield batch
