"""Proposal network and box head of an open-world detector.

The proposal network keeps the objectness of its proposals. In training, the box head labels
confident background proposals as unknown, hides the logits of classes that are not learnt yet, and
adds the clustering loss. In evaluation, it decides by energies which detections are unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from mesa_train.models.dense.boxes import widened
from mesa_train.models.dense.conventions import Conventions
from mesa_train.models.dense.roi_heads import BoxPredictor, RegionHeads
from mesa_train.models.dense.rpn import ProposalNetwork

from .clustering import ContrastiveClustering
from .energy import DELETED, EnergyIdentifier
from .rules import OpenWorldRules
from .unknowns import auto_label_unknowns

# Width of the dense detectors' box head.
_WIDTH = 1024
# Logit of a class that is not learnt yet.
HIDDEN = -1e11
# Objectness of an annotated box among the proposals. It is never a candidate for an unknown.
_ANNOTATED = 10.0


class ProposalScores:
    """The objectness of the last proposals, per image, for the box head."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []


class ScoredProposals(ProposalNetwork):
    """A proposal network that keeps the objectness logits of its proposals in `scores`."""

    def __init__(self, channels: int, rules: Conventions, scores: ProposalScores) -> None:
        super().__init__(channels, rules)
        self.scores = scores

    def filter_proposals(self, *args: Any, **kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Proposals and their probabilities, per image."""
        boxes, probabilities = super().filter_proposals(*args, **kwargs)
        self.scores.values = [p.detach().logit() for p in probabilities]
        return boxes, probabilities


class OpenWorldHeads(RegionHeads):
    """Box head of an open-world detector. Class `classes` is unknown, `classes + 1` background.

    Args:
        channels: of the maps.
        classes: of all tasks together, without unknown and background.
        conventions: of the detector; the background is last.
        rules: of open-world detection.
        scores: of the proposal network.
        box_dim: width of the features that are clustered and classified; default 1024.

    Attributes:
        seen: number of classes that are known by now, a buffer.
        previous: number of classes of earlier tasks, a buffer.
        tasks: number of tasks that were started, a buffer.
        clustering: queues and prototypes.
        identifier: the decision by energies; off at first.
        labelling: label unknowns in training; default true.
        clusters: enter features into the queues and add the clustering loss; default true.
        decides: apply `identifier` to detections; default true.
        statistics: of the last training step: "unknowns", "foreground", "hinged".
    """

    seen: Tensor
    previous: Tensor
    tasks: Tensor

    def __init__(
        self,
        channels: int,
        classes: int,
        conventions: Conventions,
        rules: OpenWorldRules,
        scores: ProposalScores,
        box_dim: int = 1024,
    ) -> None:
        super().__init__(channels, classes + 1, conventions, masks=False)
        if box_dim != _WIDTH:
            self.box_head = TwoMLPHead(channels * 7 * 7, box_dim)
            self.box_predictor = BoxPredictor(box_dim, classes + 2, classes + 1)
            if conventions.init == "reference":
                self._reset()
        self.classes, self.rules, self.scores = classes, rules, scores
        self.register_buffer("seen", torch.tensor(classes))
        self.register_buffer("previous", torch.tensor(0))
        self.register_buffer("tasks", torch.tensor(0))
        self.clustering = ContrastiveClustering(classes + 2, box_dim, rules)
        self.identifier = EnergyIdentifier()
        self.labelling = self.clusters = self.decides = True
        self.statistics: dict[str, Tensor] = {}
        self._sampled: list[Tensor] = []
        # Logits and labels of sampled regions, or of detections, are collected here, if a list is
        # set.
        self.collected: list[tuple[Tensor, Tensor]] | None = None

    @property
    def unknown(self) -> int:
        """The label of unknown objects."""
        return self.classes

    def hidden(self, logits: Tensor) -> Tensor:
        """Logits (N, classes + 2) with those of classes that are not learnt yet at -1e11."""
        columns = torch.arange(logits.shape[1], device=logits.device)
        unseen = (columns >= self.seen) & (columns < self.classes)
        return logits.masked_fill(unseen, HIDDEN)

    def subsample(self, labels: Any) -> list[Tensor]:
        """Indices of the sampled proposals of each image, ascending."""
        self._sampled = super().subsample(labels)
        return self._sampled

    def select_training_samples(
        self, proposals: Any, targets: Any
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Sampled proposals, matched boxes, labels and deltas, with unknowns labelled."""
        counts = [len(of_image) for of_image in proposals]
        found = super().select_training_samples(proposals, targets)
        proposals, matched, labels, wanted = found
        if not self.labelling or not self.rules.unknowns_per_image:
            return proposals, matched, labels, wanted
        new = []
        for index, (count, of_image) in enumerate(zip(counts, labels, strict=True)):
            logits = self.scores.values[index]
            if len(logits) != count:
                raise RuntimeError(f"{count} proposals of image {index}, {len(logits)} scores")
            annotated = len(targets[index]["boxes"])
            logits = F.pad(logits, (0, annotated), value=_ANNOTATED)[self._sampled[index]]
            new.append(
                auto_label_unknowns(
                    of_image,
                    logits,
                    self.rules.unknowns_per_image,
                    unknown=self.unknown,
                    background=self.background,
                    relabel_foreground=self.rules.relabel_foreground,
                )
            )
        return proposals, matched, new, wanted

    def losses(
        self,
        features: Mapping[str, Tensor],
        proposals: Sequence[Tensor],
        matched: Sequence[Tensor],  # noqa: ARG002  the signature of RegionHeads
        labels: Sequence[Tensor],
        wanted: Sequence[Tensor],
        targets: Sequence[Mapping[str, Tensor]],  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Losses of sampled proposals: classes, boxes, and the clustering of features."""
        x = self.box_head(self.box_roi_pool(features, proposals))
        logits, deltas = map(widened, self.box_predictor(x))
        logits = self.hidden(logits)
        classes = torch.cat([*labels])
        truth = torch.cat([*wanted])
        chosen = classes != self.background
        pseudo = classes == self.unknown
        if self.rules.unknown_boxes == "proposal":
            truth = truth.masked_fill(pseudo[:, None], 0.0)
        elif self.rules.unknown_boxes == "none":
            chosen = chosen & ~pseudo
        else:
            # Without an annotated box there is none to regress to.
            chosen = chosen & truth.isfinite().all(1)
        losses = self.box_losses(logits, deltas, classes, torch.where(chosen)[0], truth)
        if self.clusters and self.rules.cluster_weight:
            losses["loss_clustering"] = self.clustering(x, classes)
        self._watch(classes)
        if self.collected is not None:
            self.collected.append((logits.detach().float().cpu(), classes.cpu()))
        return losses

    def _watch(self, classes: Tensor) -> None:
        found = {
            "unknowns": (classes == self.unknown).sum(),
            "foreground": (classes < self.unknown).sum(),
        }
        if self.clustering.hinged is not None:
            found["hinged"] = self.clustering.hinged
        self.statistics = found

    def postprocess_detections(
        self, class_logits: Tensor, box_regression: Tensor, proposals: Any, image_shapes: Any
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Boxes, scores and labels of each image, after the decision by energies."""
        counts = [len(boxes) for boxes in proposals]
        logits = widened(class_logits)
        if self.rules.mask_unseen:
            logits = self.hidden(logits)
        decoded = self.box_coder.decode(box_regression, proposals)
        decoded = decoded.reshape(len(logits), -1, 4).split(counts)
        results = [
            self._detections(boxes, of_image, shape)
            for boxes, of_image, shape in zip(
                decoded, logits.split(counts), image_shapes, strict=True
            )
        ]
        return tuple(map(list, zip(*results, strict=True)))  # type: ignore[return-value]

    def _detections(
        self, boxes: Tensor, logits: Tensor, shape: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (N, 4), scores (N,) and labels (N,) of an image."""
        scores = logits.softmax(-1)[:, : self.background]
        rows, labels = torch.where(scores > self.score_thresh)
        boxes, scores = clip_boxes_to_image(boxes, shape)[rows, labels], scores[rows, labels]
        if self.conventions.drop_tiny_boxes:
            kept = remove_small_boxes(boxes, 1e-2)
            boxes, scores, labels, rows = boxes[kept], scores[kept], labels[kept], rows[kept]
        kept = batched_nms(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
        boxes, scores, labels, rows = boxes[kept], scores[kept], labels[kept], rows[kept]
        if self.collected is not None:
            self.collected.append((logits[rows].float().cpu(), labels.cpu()))
        if not self.decides:
            return boxes, scores, labels
        labels = self.identifier(labels, logits[rows], int(self.seen), self.unknown)
        stay = labels != DELETED
        return boxes[stay], scores[stay], labels[stay]
