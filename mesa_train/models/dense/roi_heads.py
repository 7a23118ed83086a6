"""Box and mask heads of Faster and Mask R-CNN with the reference's rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.ops import box_iou, clip_boxes_to_image, remove_small_boxes, roi_align

from .boxes import BoxCoder, Matcher, widened
from .conventions import Conventions
from .retinanet import best_detections

_WIDTH = 1024


class RoIPool(nn.Module):
    """RoIAlign from the level of a pyramid that fits a box's size, in float32 at least.

    Args:
        size: side of the output.
        strides: of the levels, in pixels.
        aligned: shift by half a pixel.
        sampling_ratio: samples per bin and axis; 0 adapts to the box.
    """

    def __init__(
        self, size: int, strides: Sequence[int], *, aligned: bool, sampling_ratio: int
    ) -> None:
        super().__init__()
        self.size, self.strides = size, tuple(strides)
        self.aligned, self.sampling_ratio = aligned, sampling_ratio

    def forward(self, maps: Mapping[str, Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Pool boxes (N_i, 4) of each image i to (sum of N_i, C, size, size)."""
        rois = torch.cat([F.pad(b, (1, 0), value=image) for image, b in enumerate(boxes)])
        levels = self.levels(rois[:, 1:])
        return self.pool(
            maps, rois, [torch.where(levels == level)[0] for level in range(len(self.strides))]
        )

    def levels(self, boxes: Tensor) -> Tensor:
        """The level of each box: that of stride 4 up to 112 pixels, then one more per doubling."""
        sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        levels = torch.floor(torch.log2(sides / 56 + 1e-6))
        return levels.clamp(0, len(self.strides) - 1).long()

    def pool(self, maps: Mapping[str, Tensor], rois: Tensor, of_level: Sequence[Tensor]) -> Tensor:
        """Pool rois (N, 5) of (image, x1, y1, x2, y2), given the indices of each level's."""
        pooled = []
        for level, indices in enumerate(of_level):
            x = widened(maps[str(level)])
            pooled.append(
                roi_align(
                    x,
                    rois[indices].to(x.dtype),
                    self.size,
                    1 / self.strides[level],
                    # torchvision adapts for every value that is not positive.
                    self.sampling_ratio,
                    self.aligned,
                )
            )
        order = torch.cat([*of_level])
        return torch.cat(pooled)[order.argsort()]


class BoxPredictor(nn.Module):
    """Features (N, dim) to class logits (N, scores) and box deltas (N, 4 * boxes)."""

    def __init__(self, dim: int, scores: int, boxes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(dim, scores)
        self.bbox_pred = nn.Linear(dim, 4 * boxes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x), self.bbox_pred(x)


class RegionHeads(RoIHeads):
    """Heads on the regions of a pyramid's levels of strides 4 to 32.

    Args:
        channels: of the maps.
        num_classes: without background.
        rules: of the detector.
        masks: with a mask head.
    """

    def __init__(self, channels: int, num_classes: int, rules: Conventions, masks: bool) -> None:
        first = rules.background == "first"
        outputs = num_classes + first

        def pool(size: int) -> RoIPool:
            ratio = rules.roi_sampling_ratio
            return RoIPool(size, (4, 8, 16, 32), aligned=rules.roi_aligned, sampling_ratio=ratio)

        super().__init__(
            pool(7),
            TwoMLPHead(channels * 7 * 7, _WIDTH),
            BoxPredictor(_WIDTH, num_classes + 1, outputs),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=512,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
            mask_roi_pool=pool(14) if masks else None,
            mask_head=MaskRCNNHeads(channels, (256, 256, 256, 256), 1) if masks else None,
            mask_predictor=MaskRCNNPredictor(256, 256, outputs) if masks else None,
        )
        low_quality = 0.5 if rules.roi_low_quality else None
        self.proposal_matcher = Matcher(0.5, 0.5, low_quality, rules.low_quality_to)
        self.box_coder = BoxCoder((10.0, 10.0, 5.0, 5.0), clamp_small=rules.clamp_small_sizes)
        self.background = 0 if first else num_classes
        self.labels = range(int(first), num_classes + first)
        self.conventions = rules
        if rules.init == "reference":
            self._reset()

    def _reset(self) -> None:
        """The reference's initial weights of the box head."""
        for linear in (self.box_head.fc6, self.box_head.fc7):
            nn.init.xavier_uniform_(linear.weight)
        nn.init.normal_(self.box_predictor.cls_score.weight, std=0.01)
        nn.init.normal_(self.box_predictor.bbox_pred.weight, std=0.001)
        for module in (self.box_head, self.box_predictor):
            for name, parameter in module.named_parameters():
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)

    def assign_targets_to_proposals(
        self, proposals: Any, gt_boxes: Any, gt_labels: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Matched box (0 if none) and label (or the background's) of each proposal."""
        indices, labels = [], []
        for of_image, boxes, classes in zip(proposals, gt_boxes, gt_labels, strict=True):
            matches = self.proposal_matcher(box_iou(boxes, of_image))
            matched = matches.clamp(min=0)
            background = torch.full_like(matched, self.background)
            known = classes[matched] if len(boxes) else background
            labels.append(torch.where(matches >= 0, known, background))
            indices.append(matched)
        return indices, labels

    def subsample(self, labels: Any) -> list[Tensor]:
        """Indices of the sampled proposals of each image."""
        return super().subsample([(x != self.background).long() for x in labels])

    def forward(
        self, features: Any, proposals: Any, image_shapes: Any, targets: Any = None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections (none in training) and losses (none in evaluation)."""
        if self.training:
            proposals, matched, labels, wanted = self.select_training_samples(proposals, targets)
            return [], self.losses(features, proposals, matched, labels, wanted, targets)
        x = self.box_head(self.box_roi_pool(features, proposals))
        logits, deltas = self.box_predictor(x)
        boxes, scores, classes = self.postprocess_detections(
            logits, deltas, proposals, image_shapes
        )
        results = [
            {"boxes": b, "labels": c, "scores": s}
            for b, s, c in zip(boxes, scores, classes, strict=True)
        ]
        if self.has_mask():
            x = self.mask_head(self.mask_roi_pool(features, boxes))
            masks = maskrcnn_inference(widened(self.mask_predictor(x)), classes)
            for result, probabilities in zip(results, masks, strict=True):
                result["masks"] = probabilities
        return results, {}

    def losses(
        self,
        features: Mapping[str, Tensor],
        proposals: Sequence[Tensor],
        matched: Sequence[Tensor],
        labels: Sequence[Tensor],
        wanted: Sequence[Tensor],
        targets: Sequence[Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        """The losses of sampled proposals.

        Args:
            proposals: (N, 4), per image.
            matched: index of the matched box (N,), per image.
            labels: class or background (N,), per image.
            wanted: deltas to the matched box (N, 4), per image.
            targets: with "masks" (boxes, H, W), if the model has a mask head.
        """
        x = self.box_head(self.box_roi_pool(features, proposals))
        logits, deltas = map(widened, self.box_predictor(x))
        classes = torch.cat([*labels])
        positive = torch.where(classes != self.background)[0]
        losses = self.box_losses(logits, deltas, classes, positive, torch.cat([*wanted]))
        if not self.has_mask():
            return losses
        of_image = [torch.where(x != self.background)[0] for x in labels]
        pairs = zip(proposals, of_image, strict=True)
        boxes = [of_proposals[indices] for of_proposals, indices in pairs]
        truth = [
            self.mask_targets(target["masks"], box, indices[chosen])
            for target, box, indices, chosen in zip(targets, boxes, matched, of_image, strict=True)
        ]
        pooled = self.mask_roi_pool(features, boxes)
        losses["loss_mask"] = self.mask_loss(pooled, classes[positive], torch.cat(truth))
        return losses

    def box_losses(
        self, logits: Tensor, deltas: Tensor, classes: Tensor, positive: Tensor, wanted: Tensor
    ) -> dict[str, Tensor]:
        """Losses of the box head on samples, given the indices of the positive ones."""
        if not len(classes):
            return {"loss_classifier": logits.sum() * 0, "loss_box_reg": deltas.sum() * 0}
        own = deltas.unflatten(1, (-1, 4))[positive, classes[positive]]
        beta = self.conventions.smooth_l1_beta
        boxes = F.smooth_l1_loss(own, wanted[positive].to(own.dtype), beta=beta, reduction="sum")
        return {
            "loss_classifier": F.cross_entropy(logits, classes),
            "loss_box_reg": boxes / len(classes),
        }

    def mask_targets(self, masks: Tensor, boxes: Tensor, indices: Tensor) -> Tensor:
        """Masks (M, H, W) inside boxes (N, 4), at indices (N,), as (N, 28, 28)."""
        rules = self.conventions
        rois = torch.cat([indices[:, None].to(boxes), boxes], 1)
        inside = roi_align(masks[:, None].to(boxes), rois, 28, 1.0, 0, rules.roi_aligned)[:, 0]
        threshold = rules.mask_target_threshold
        return inside if threshold is None else (inside >= threshold).to(inside.dtype)

    def mask_loss(self, pooled: Tensor, classes: Tensor, truth: Tensor) -> Tensor:
        """Mean cross-entropy of the mask of each region's own class."""
        logits = widened(self.mask_predictor(self.mask_head(pooled)))
        if not len(classes):
            return logits.sum() * 0
        own = logits[torch.arange(len(classes), device=logits.device), classes]
        return F.binary_cross_entropy_with_logits(own, truth.to(own.dtype))

    def postprocess_detections(
        self, class_logits: Tensor, box_regression: Tensor, proposals: Any, image_shapes: Any
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Boxes, scores and labels of each image."""
        counts = [len(boxes) for boxes in proposals]
        probabilities = widened(class_logits).softmax(-1).split(counts)
        decoded = self.box_coder.decode(box_regression, proposals)
        decoded = decoded.reshape(len(class_logits), -1, 4).split(counts)
        # The columns of scores, and of boxes, that belong to a label.
        columns = slice(self.labels.start, self.labels.stop)
        results = []
        for boxes, scores, shape in zip(decoded, probabilities, image_shapes, strict=True):
            rows, classes = torch.where(scores[:, columns] > self.score_thresh)
            own = clip_boxes_to_image(boxes, shape)[:, columns][rows, classes]
            confidence = scores[:, columns][rows, classes]
            labels = classes + self.labels.start
            if self.conventions.drop_tiny_boxes:
                kept = remove_small_boxes(own, 1e-2)
                own, confidence, labels = own[kept], confidence[kept], labels[kept]
            results.append(
                best_detections(
                    [own], [confidence], [labels], self.nms_thresh, self.detections_per_img
                )
            )
        return (
            [result["boxes"] for result in results],
            [result["scores"] for result in results],
            [result["labels"] for result in results],
        )
