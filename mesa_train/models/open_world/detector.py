"""Faster R-CNN for open-world detection (ORE) on any backbone with maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops import box_iou

from mesa_train.models.dense.conventions import Conventions, conventions_of
from mesa_train.models.dense.inputs import ImageTransform
from mesa_train.models.dense.necks import PyramidBackbone, pyramid_backbone
from mesa_train.models.dense.rcnn import RCNN
from mesa_train.models.dense.rpn import STRIDES

from .energy import SAMPLES, Weibull, energy, fit_weibull
from .heads import OpenWorldHeads, ProposalScores, ScoredProposals
from .rules import OpenWorldRules, rules_of

Batches = Iterable[tuple[Sequence[Tensor], Sequence[Mapping[str, Tensor]]]]


def open_world_rcnn(
    backbone: str | nn.Module,
    num_classes: int = 80,
    *,
    rules: OpenWorldRules | str = "default",
    conventions: Conventions | str = "reference",
    min_size: int = 800,
    max_size: int = 1333,
    box_dim: int = 1024,
    channels: int = 256,
) -> OpenWorldRCNN:
    """Build an open-world Faster R-CNN.

    Args:
        backbone: timm name or module (see `mesa_train.models.dense.faster_rcnn`) with maps at
            strides 4, 8, 16 and 32.
        num_classes: N, the classes of all tasks together. Labels are 0 to N - 1 in the order in
            which they are learnt; N is unknown. Default 80.
        rules: "default", "paper", "official_code" or `OpenWorldRules`.
        conventions: "reference" (default) or `Conventions` with the background last.
        min_size: short side of the scaled image, in pixels; default 800.
        max_size: largest long side, in pixels; default 1333.
        box_dim: width of the box head, whose features are clustered; default 1024.
        channels: of the pyramid's maps; default 256.
    Returns:
        A model. In training, `model(images, targets)` returns losses, "loss_clustering" among them;
        in evaluation, `model(images)` returns "boxes", "scores" and "labels" of each image. Call
        `start_task` before each task.
    Raises:
        ValueError: an argument is none of its choices, or the backbone has no map of a stride.
    """
    chosen = conventions_of(conventions)
    if chosen.background != "last":
        raise ValueError(f"conventions.background must be 'last', got {chosen.background!r}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    neck = pyramid_backbone(backbone, STRIDES[:4], "pool", chosen, channels=channels)
    transform = ImageTransform(min_size, max_size, chosen)
    return OpenWorldRCNN(neck, num_classes, chosen, transform, rules_of(rules), box_dim)


class OpenWorldRCNN(RCNN):
    """See `open_world_rcnn`. All state of the method is in buffers of `roi_heads`."""

    def __init__(
        self,
        backbone: PyramidBackbone,
        num_classes: int,
        conventions: Conventions,
        transform: ImageTransform,
        rules: OpenWorldRules,
        box_dim: int = 1024,
    ) -> None:
        channels, scores = backbone.out_channels, ProposalScores()
        heads = OpenWorldHeads(channels, num_classes, conventions, rules, scores, box_dim)
        proposals = ScoredProposals(channels, conventions, scores)
        GeneralizedRCNN.__init__(self, backbone, proposals, heads, transform)
        self.num_classes, self.conventions, self.rules = num_classes, conventions, rules

    @property
    def heads(self) -> OpenWorldHeads:
        """The box head."""
        heads: Any = self.roi_heads
        return heads

    @property
    def seen(self) -> int:
        """Number of known classes."""
        return int(self.heads.seen)

    @property
    def unknown(self) -> int:
        """The label of unknown detections: `num_classes`."""
        return self.num_classes

    def start_task(self, new_classes: int, *, cluster_start: int | None = None) -> None:
        """Begin to learn the next classes.

        Args:
            new_classes: classes of the task. They follow those that are known; the first task
                follows none.
            cluster_start: step of the task at which prototypes are taken; default: `rules.start` in
                the first task, 0 later, as the official code.
        Raises:
            ValueError: fewer than 1 or more than the remaining classes.
        """
        heads = self.heads
        known = self.seen if int(heads.tasks) else 0
        if not 1 <= new_classes <= self.num_classes - known:
            raise ValueError(
                f"new_classes must lie in 1 to {self.num_classes - known}, got {new_classes}"
            )
        heads.previous.fill_(known)
        heads.seen.fill_(known + new_classes)
        heads.tasks += 1
        if cluster_start is None:
            cluster_start = 0 if known else self.rules.start
        heads.clustering.start_task(cluster_start)
        heads.identifier.set("off")

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> Any:
        """Losses in training, detections in evaluation."""
        if self.training and targets is not None:
            known = range(self.seen)
            for index, target in enumerate(targets):
                labels = target.get("labels")
                if isinstance(labels, Tensor) and labels.numel():
                    highest = int(labels.max())
                    if highest not in known and highest < self.num_classes:
                        raise ValueError(
                            f"targets[{index}]['labels'] has class {highest}, but only "
                            f"{len(known)} classes are known; call start_task first"
                        )
        return super().forward(images, targets)

    @torch.no_grad()
    def energies(
        self, batches: Batches, temperature: float = 1.0, *, samples: str = "detections"
    ) -> tuple[Tensor, Tensor]:
        """Energies of regions that match annotated boxes, without training on them.

        Args:
            batches: (images, targets). Targets have the classes known so far, and perhaps the label
                `unknown`.
            temperature: default 1, as in `classify_by_energy`. The official code has 1.5 here.
            samples: "detections" (default): detections that survive score threshold and NMS, as in
                a test. Known ones overlap a box of their own class with IoU above 0.5. Unknown ones
                overlap an annotated unknown object; without any in the targets, they are those of
                label `unknown` that overlap no known object. "proposals": regions sampled as in
                training, as in the official code. Unknown ones are labelled by the model or
                annotated.
        Returns:
            (energies of known regions, energies of unknown ones), on the CPU.
        Raises:
            ValueError: there are no batches, or samples is neither.
        """
        if samples not in SAMPLES:
            raise ValueError(f"samples must be one of {', '.join(SAMPLES)}, got {samples!r}")
        collect = self._detected if samples == "detections" else self._proposed
        logits, labels = collect(batches)
        values = energy(logits, self.seen, temperature)
        known = (labels >= 0) & (labels < self.unknown)
        return values[known], values[labels == self.unknown]

    def _proposed(self, batches: Batches) -> tuple[Tensor, Tensor]:
        """Logits (N, C) and labels (N,) of regions sampled as in training."""
        heads, training = self.heads, self.training
        clusters, statistics = heads.clusters, heads.statistics
        heads.collected, heads.clusters = [], False
        try:
            # Training mode gives sampled proposals. The backbone has no dropout and no batch
            # statistics in evaluation mode.
            self.train()
            self.backbone.eval()
            for images, targets in batches:
                self(images, targets)
            collected = heads.collected
        finally:
            heads.collected, heads.clusters, heads.statistics = None, clusters, statistics
            self.train(training)
        if not collected:
            raise ValueError("energies need at least one batch")
        logits, labels = (torch.cat([pair[i] for pair in collected]) for i in range(2))
        return logits, labels

    def _detected(self, batches: Batches) -> tuple[Tensor, Tensor]:
        """Logits (N, C) of detections, and labels (N,): known, unknown, or -1 for neither."""
        heads, training, found, annotated = self.heads, self.training, [], False
        decides = heads.decides
        heads.decides = False
        try:
            self.eval()
            for images, targets in batches:
                heads.collected = []
                outputs = self(images)
                for (logits, labels), output, target in zip(
                    heads.collected, outputs, targets, strict=True
                ):
                    truth = target["labels"].cpu()
                    annotated |= bool((truth == self.unknown).any())
                    overlap = box_iou(output["boxes"].cpu().float(), target["boxes"].cpu().float())
                    found.append((logits, labels, *_matches(overlap, labels, truth, self.unknown)))
        finally:
            heads.collected, heads.decides = None, decides
            self.train(training)
        if not found:
            raise ValueError("energies need at least one batch")
        logits, labels, right, on_known, on_unknown = (
            torch.cat([image[i] for image in found]) for i in range(5)
        )
        unknown = on_unknown if annotated else (labels == self.unknown) & ~on_known
        matched = torch.where(unknown, self.unknown, -1)
        return logits, torch.where(right, labels, matched)


def _matches(overlap: Tensor, labels: Tensor, truth: Tensor, unknown: int) -> list[Tensor]:
    """Of detections (N,): on an object of their class, on a known object, on an unknown one."""
    close = overlap > 0.5
    known = close & (truth < unknown)
    right = (known & (labels[:, None] == truth)).any(1)
    # An object of its own class decides: the detection is known.
    on_unknown = (close & (truth == unknown)).any(1) & ~right
    return [right, known.any(1), on_unknown]


def fit_energies(
    model: OpenWorldRCNN,
    batches: Batches,
    *,
    mode: str = "known_tail",
    samples: str = "detections",
    temperature: float = 1.0,
    tail: float = 0.05,
    outside: str = "keep",
) -> dict[str, Weibull]:
    """Fit the energies of a model and set its decision.

    Args:
        model: changed in place: `model.heads.identifier`.
        batches: (images, targets). "known_tail" uses known objects alone. "two_fits" takes unknown
            energies from pseudo-unknowns, or from annotated unknowns if the targets have them.
            ORE's authors have them, which is transductive: it uses labels of unknown classes. The
            pictures should lie outside the training and test pictures.
        mode: "known_tail" (default) or "two_fits".
        samples: "detections" (default) or "proposals" (the official code); see
            `OpenWorldRCNN.energies`. Detections have passed the score threshold and proposals have
            not, so few detections have an energy in the lowest tail of proposals.
        temperature: of the energies in the fit; default 1. The official code has 1.5.
        tail, outside: see `EnergyIdentifier.set`.
    Returns:
        The fits: "known", and with "two_fits" "unknown".
    Raises:
        ValueError: too few regions match, or an argument is none of its choices.
    """
    known, unknown = model.energies(batches, temperature, samples=samples)
    fits = {"known": fit_weibull(known)}
    if mode == "two_fits":
        fits["unknown"] = fit_weibull(unknown)
    model.heads.identifier.set(
        mode, known=fits["known"], unknown=fits.get("unknown"), tail=tail, outside=outside
    )
    return fits
