"""Region proposal network with the reference's matcher, coder and loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from .boxes import Anchors, BoxCoder, Matcher, widened
from .conventions import Conventions

STRIDES = (4, 8, 16, 32, 64)


class ProposalNetwork(RegionProposalNetwork):
    """Proposals of the five levels of strides 4 to 64, and their losses.

    Args:
        channels: of the maps.
        rules: of the detector.
    """

    def __init__(self, channels: int, rules: Conventions) -> None:
        strides = STRIDES if rules.anchor_strides == "fixed" else None
        sizes = [[8 * stride] for stride in STRIDES]
        anchors = Anchors(sizes, strides=strides, rounded=rules.round_anchors)
        super().__init__(
            anchors,
            RPNHead(channels, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2000, "testing": 1000},
            post_nms_top_n={"training": rules.rpn_train_proposals, "testing": 1000},
            nms_thresh=0.7,
        )
        self.proposal_matcher = Matcher(0.7, 0.3, rules.rpn_low_quality_iou, rules.low_quality_to)
        self.box_coder = BoxCoder((1.0, 1.0, 1.0, 1.0), clamp_small=rules.clamp_small_sizes)
        self.min_size = 1e-3 if rules.drop_tiny_boxes else 0.0
        self.beta = rules.smooth_l1_beta

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: Any, regression_targets: Any
    ) -> tuple[Tensor, Tensor]:
        """Sample anchors and return the losses of objectness and boxes.

        Args:
            objectness: logits (B * A, 1).
            pred_bbox_deltas: (B * A, 4).
            labels: 1, 0 or -1 (ignored), (A,) per image.
            regression_targets: (A, 4), per image.
        """
        positive, negative = (torch.cat(masks).bool() for masks in self.fg_bg_sampler(labels))
        return self.sampled_loss(
            objectness,
            pred_bbox_deltas,
            torch.where(positive)[0],
            torch.where(negative)[0],
            torch.cat(regression_targets),
        )

    def sampled_loss(
        self,
        objectness: Tensor,
        deltas: Tensor,
        positive: Tensor,
        negative: Tensor,
        wanted: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The losses of objectness and boxes on given samples.

        Args:
            objectness: logits (B * A, 1).
            deltas: (B * A, 4).
            positive, negative: indices of the samples.
            wanted: deltas of the matched boxes (B * A, 4).
        """
        logits = widened(objectness.flatten()[torch.cat([positive, negative])])
        if not len(logits):
            return objectness.sum() * 0, deltas.sum() * 0
        truth = (torch.arange(len(logits), device=logits.device) < len(positive)).to(logits.dtype)
        boxes = F.smooth_l1_loss(
            widened(deltas[positive]), wanted[positive], beta=self.beta, reduction="sum"
        )
        return F.binary_cross_entropy_with_logits(logits, truth), boxes / len(logits)
