"""Predicted memory of a training step, counted on fake tensors at the worst shape.

Fake tensors have no values, so steps with shapes that depend on values get fixed shapes: an R-CNN
has its sampled regions per image (512 by default), a quarter of them positive and a quarter on each
level, and 256 anchors per image, half of them positive. The proposals themselves need no gradient and save nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers

from mesa_train.measure.footprint import footprint
from mesa_train.training.classification import optimizers

from .build import model_of
from .config import AugmentConfig, Config

ANCHORS = 256
# Objects of a picture, which set the size of the targets alone.
_OBJECTS = 8


class RetinaNetStep(nn.Module):
    """The losses of a RetinaNet on a batch (B, 3, H, W)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        sizes = [(images.shape[2], images.shape[3])] * len(images)
        return self.model.losses(ImageList(images, sizes), targets)


class RegionStep(nn.Module):
    """The losses of a Faster or Mask R-CNN on a batch (B, 3, H, W), with a fixed number of samples."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.model.backbone(images)
        return {**self.proposal_losses(maps, len(images)), **self.region_losses(maps, len(images))}

    def proposal_losses(self, maps: Any, batch: int) -> dict[str, Tensor]:
        """Losses of the proposal network."""
        rpn = self.model.rpn
        logits, deltas = concat_box_prediction_layers(*rpn.head(list(maps.values())))
        half = torch.arange(batch * ANCHORS // 2)
        losses = rpn.sampled_loss(logits, deltas, half, half, torch.zeros_like(deltas))
        return {"loss_objectness": losses[0], "loss_rpn_box_reg": losses[1]}

    def region_losses(self, maps: Any, batch: int) -> dict[str, Tensor]:
        """Losses of the box and mask heads."""
        heads = self.model.roi_heads
        sampler = heads.fg_bg_sampler
        count = batch * sampler.batch_size_per_image
        masks = int(count * sampler.positive_fraction)
        regions = torch.zeros(count, 5)
        pooled = heads.box_roi_pool.pool(maps, regions, list(torch.arange(count).chunk(4)))
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        positive = torch.arange(masks)
        classes = torch.zeros(count, dtype=torch.int64)
        losses = heads.box_losses(logits, deltas, classes, positive, torch.zeros(count, 4))
        if not heads.has_mask():
            return losses
        of_level = list(positive.chunk(4))
        pooled = heads.mask_roi_pool.pool(maps, regions[:masks], of_level)
        loss = heads.mask_loss(pooled, classes[:masks], torch.zeros(masks, 28, 28))
        return {**losses, "loss_mask": loss}


def worst_shape(config: Config) -> tuple[int, int]:
    """The largest height and width of a batch of training pictures, in pixels.

    With a crop, it is the crop. Else a batch can hold the short and the long side of `data`. Without
    `data.by_aspect`, a wide and a high picture in one batch need a square of the long side.
    Detectors pad to multiples of 32.
    """
    data, augment = config.data, config.augment
    if augment.crop:
        sides = (augment.crop, augment.crop)
    else:
        alike = data.by_aspect or config.train.micro_batch == 1
        sides = scaled_sides(data.short_side, data.long_side, augment, alike=alike)
    return padded(sides) if config.model.detects else sides


def scaled_sides(
    short_side: int, long_side: int, augment: AugmentConfig, *, alike: bool
) -> tuple[int, int]:
    """The largest height and width of a batch of scaled pictures, in pixels.

    Args:
        short_side: of a scaled picture.
        long_side: largest long side.
        augment: its largest scale is of the short side.
        alike: the pictures of a batch are all wide or all high.
    """
    short = min(int(short_side * augment.scale[1]), long_side)
    return (short if alike else long_side, long_side)


def padded(sides: tuple[int, int]) -> tuple[int, int]:
    """Height and width rounded up to multiples of 32."""
    return (sides[0] + 31) // 32 * 32, (sides[1] + 31) // 32 * 32


def step_of(model: Any, batch: int, size: tuple[int, int]) -> tuple[nn.Module, list[Any]]:
    """A module whose outputs are the losses of `model`, and its inputs.

    Args:
        model: a detector or a segmenter, in training mode.
        batch: number of images.
        size: height and width of the batch.
    """
    images = torch.zeros(batch, 3, *size)
    if hasattr(model, "decode_head"):
        return model, [images, torch.zeros(batch, *size, dtype=torch.int64)]
    if hasattr(model, "roi_heads"):
        return RegionStep(model), [images]
    boxes = torch.tensor([[0.0, 0, 64, 64]] * _OBJECTS)
    target = {"boxes": boxes, "labels": torch.zeros(_OBJECTS, dtype=torch.int64)}
    return RetinaNetStep(model), [images, [target] * batch]


def memory(config: Config, classes: int, dtype: torch.dtype | None) -> dict[str, int]:
    """Predicted bytes on one device at the worst shape.

    Args:
        config: of the run; `train.micro_batch` images at once.
        classes: number of classes.
        dtype: of autocast; None for float32.
    Returns:
        Bytes by use: weights, gradients, optimizer, activations, images.
    """
    model = model_of(config, classes).train()
    size = worst_shape(config)
    sizes = step_memory(model, config.train.micro_batch, size, config.train.policy, dtype)
    if config.model.kind == "mask_rcnn":
        sizes["images"] += config.train.micro_batch * _OBJECTS * size[0] * size[1]
    trained = [p for p in model.parameters() if p.requires_grad]
    states = optimizers.state_bytes(config.optim.name, trained)
    return {**sizes, "optimizer": states}


def step_memory(
    model: Any, batch: int, size: tuple[int, int], policy: str, dtype: torch.dtype | None
) -> dict[str, int]:
    """Predicted bytes of a step of a model, without its optimizer's states.

    Args:
        model: a detector or a segmenter, in training mode.
        batch: number of images.
        size: height and width of the batch.
        policy: "plain" or a preset.
        dtype: of autocast; None for float32.
    Returns:
        Bytes by use: weights, gradients, activations, images.
    """
    step, inputs = step_of(model, batch, size)
    kept = footprint(step, inputs, policy=policy, autocast=dtype, fake=True)
    return {
        "weights": kept.parameter_bytes + kept.buffer_bytes,
        "gradients": sum(p.nbytes for p in model.parameters() if p.requires_grad),
        "activations": kept.saved_bytes,
        "images": batch * 3 * size[0] * size[1] * 4,
    }
