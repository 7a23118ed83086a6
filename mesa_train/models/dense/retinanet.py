"""RetinaNet (arXiv 1708.02002) on any backbone, with the reference's rules by default.

The five levels have strides 8 to 128. The head's two towers are shared by all levels. The losses
run over all anchors with masks instead of selections, so no shape depends on the targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, sigmoid_focal_loss

from .boxes import Anchors, BoxCoder, Matcher, widened
from .conventions import Conventions, conventions_of
from .inputs import ImageTransform, check_targets
from .necks import CHANNELS, PyramidBackbone, pyramid_backbone

STRIDES = (8, 16, 32, 64, 128)
_OCTAVES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))


def retinanet(
    backbone: str | nn.Module,
    num_classes: int = 80,
    *,
    conventions: Conventions | str = "reference",
    min_size: int = 800,
    max_size: int = 1333,
    channels: int = CHANNELS,
    recompute_loss: bool = False,
) -> RetinaNet:
    """Build a RetinaNet.

    Args:
        backbone: timm name or module (see `bodies.body_of`) with maps at strides 8, 16 and 32.
        num_classes: without background; labels are 0 to num_classes - 1. Default 80.
        conventions: "reference" (default), "torchvision" or `Conventions`.
        min_size: short side of the scaled image, in pixels; default 800.
        max_size: largest long side, in pixels; default 1333.
        channels: of the pyramid's maps and of the head's towers; default 256.
        recompute_loss: save the logits alone for the backward of the focal loss, and compute the
            loss again there; default false.
    Returns:
        A model. In training, `model(images, targets)` returns the losses "classification" and
        "bbox_regression"; in evaluation, `model(images)` returns "boxes", "scores" and "labels" of
        each image. Images are (3, H, W) each, from 0 to 1.
    Raises:
        ValueError: the backbone has no map of a stride, or the conventions are unknown.
    """
    rules = conventions_of(conventions)
    neck = pyramid_backbone(backbone, STRIDES[:3], "p6p7", rules, channels=channels)
    return RetinaNet(neck, num_classes, rules, min_size, max_size, recompute_loss)


class RetinaNet(TorchvisionRetinaNet):
    """See `retinanet`. torchvision's model with other anchors, matcher, coder, losses and ranking."""

    def __init__(
        self,
        backbone: PyramidBackbone,
        num_classes: int,
        rules: Conventions,
        min_size: int,
        max_size: int,
        recompute_loss: bool = False,
    ) -> None:
        sizes = [[4 * stride * octave for octave in _OCTAVES] for stride in STRIDES]
        if rules.round_anchors:
            sizes = [[int(size) for size in level] for level in sizes]
        strides = STRIDES if rules.anchor_strides == "fixed" else None
        anchors = Anchors(sizes, strides=strides, rounded=rules.round_anchors)
        super().__init__(
            backbone,
            num_classes,
            anchor_generator=anchors,
            proposal_matcher=Matcher(0.5, 0.4, 0.0, rules.low_quality_to),
            head=RetinaNetHead(
                backbone.out_channels, anchors.num_anchors_per_location()[0], num_classes
            ),
            detections_per_img=rules.retinanet_detections,
        )
        self.box_coder = BoxCoder((1.0, 1.0, 1.0, 1.0), clamp_small=rules.clamp_small_sizes)
        self.transform = ImageTransform(min_size, max_size, rules)
        self.num_classes, self.conventions = num_classes, rules
        self.recompute_loss = recompute_loss

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> Any:
        """Losses in training, detections in evaluation; see `retinanet`."""
        if self.training:
            check_targets(images, targets, range(self.num_classes))
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        batch, scaled = self.transform(images, targets)
        if self.training:
            return self.losses(batch, scaled)
        features = list(self.backbone(batch.tensors).values())
        outputs = self.head(features)
        per_location = self.anchor_generator.num_anchors_per_location()[0]
        counts = [per_location * x.shape[2] * x.shape[3] for x in features]
        split = {name: list(out.split(counts, 1)) for name, out in outputs.items()}
        anchors = [list(a.split(counts)) for a in self.anchor_generator(batch, features)]
        detections = self.postprocess_detections(split, anchors, batch.image_sizes)
        return self.transform.postprocess(detections, batch.image_sizes, sizes)

    def losses(self, batch: ImageList, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The losses of a batch that is scaled, normalised and padded. Runs on fake tensors too."""
        features = list(self.backbone(batch.tensors).values())
        return self.compute_loss(
            targets, self.head(features), self.anchor_generator(batch, features)
        )

    def compute_loss(
        self, targets: Any, head_outputs: Mapping[str, Tensor], anchors: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """The two losses.

        Args:
            targets: "boxes" (N, 4) and "labels" (N,), per image.
            head_outputs: "cls_logits" (B, A, classes) and "bbox_regression" (B, A, 4).
            anchors: (A, 4), per image.
        """
        logits = widened(head_outputs["cls_logits"])
        deltas = widened(head_outputs["bbox_regression"])
        pairs = zip(targets, anchors, strict=True)
        matches = torch.stack([self._match(target, boxes) for target, boxes in pairs])
        positive = matches >= 0
        labels, wanted = [], []
        for target, boxes, indices in zip(targets, anchors, matches.clamp(min=0), strict=True):
            if len(target["boxes"]):
                labels.append(target["labels"][indices])
                wanted.append(self.box_coder.encode_single(target["boxes"][indices], boxes))
            else:
                labels.append(torch.zeros_like(indices))
                wanted.append(torch.zeros_like(boxes))
        truth = torch.stack(labels).masked_fill(~positive, -1)
        valid = matches != Matcher.BETWEEN_THRESHOLDS
        focal = run(self.recompute_loss, focal_sums, logits, truth, valid)
        boxes = (deltas - torch.stack(wanted)).abs() * positive[..., None]
        counts = positive.sum(1).clamp(min=1)
        sums = focal, boxes.sum((1, 2))
        if self.conventions.retinanet_loss == "image":
            totals = [(value / counts).mean() for value in sums]
        else:
            totals = [value.sum() / counts.sum() for value in sums]
        return {"classification": totals[0], "bbox_regression": totals[1]}

    def _match(self, target: Mapping[str, Tensor], anchors: Tensor) -> Tensor:
        return self.proposal_matcher(box_iou(target["boxes"].to(anchors.dtype), anchors))

    def postprocess_detections(
        self, head_outputs: Any, anchors: Any, image_shapes: Any
    ) -> list[dict[str, Tensor]]:
        """Detections of each image, from outputs (B, A, ...) and anchors of each level."""
        if self.conventions.retinanet_candidates == "pairs":
            return super().postprocess_detections(head_outputs, anchors, image_shapes)
        levels = list(zip(head_outputs["cls_logits"], head_outputs["bbox_regression"], strict=True))
        detections = []
        for index, shape in enumerate(image_shapes):
            boxes, scores, labels = [], [], []
            for (logits, deltas), level_anchors in zip(levels, anchors[index], strict=True):
                probabilities = widened(logits[index]).sigmoid()
                count = min(self.topk_candidates, len(probabilities))
                best = probabilities.amax(1).topk(count).indices
                decoded = self.box_coder.decode_single(deltas[index][best], level_anchors[best])
                rows, classes = torch.where(probabilities[best] > self.score_thresh)
                boxes.append(clip_boxes_to_image(decoded, shape)[rows])
                scores.append(probabilities[best][rows, classes])
                labels.append(classes)
            kept = best_detections(boxes, scores, labels, self.nms_thresh, self.detections_per_img)
            detections.append(kept)
        return detections


def focal_sums(logits: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Sums of the sigmoid focal loss (B,), with alpha 0.25 and gamma 2.

    Args:
        logits: (B, A, classes).
        truth: class of each anchor (B, A), -1 for none.
        valid: anchors that count (B, A).
    """
    one_hot = truth[..., None] == torch.arange(logits.shape[2], device=logits.device)
    losses = sigmoid_focal_loss(logits, one_hot.to(logits.dtype), alpha=0.25, gamma=2.0)
    return (losses * valid[..., None]).sum((1, 2))


def run(recompute: bool, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """`function(*inputs)`; with `recompute`, its backward runs it again instead of saving tensors."""
    return checkpoint(function, *inputs, use_reentrant=False) if recompute else function(*inputs)


def best_detections(
    boxes: Sequence[Tensor],
    scores: Sequence[Tensor],
    labels: Sequence[Tensor],
    iou: float,
    count: int,
) -> dict[str, Tensor]:
    """The best `count` detections after NMS within each class."""
    all_boxes, all_scores, all_labels = (
        torch.cat([*boxes]),
        torch.cat([*scores]),
        torch.cat([*labels]),
    )
    kept = batched_nms(all_boxes, all_scores, all_labels, iou)[:count]
    return {"boxes": all_boxes[kept], "scores": all_scores[kept], "labels": all_labels[kept]}
