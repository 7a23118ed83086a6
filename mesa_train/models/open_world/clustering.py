"""Contrastive clustering of ORE: prototypes of classes, queues of features, and the hinge loss.

Why: unknown objects are separated from known ones in the feature space of the box head. A feature
is pulled to the prototype of its class and pushed from all other prototypes up to a margin.

How: each class has a queue of its newest features, background included. From step `start` on, a
class has a prototype, the mean of its queue; every `update_every` steps it moves towards the mean
of its queue with a momentum. All state is in buffers, so a checkpoint has it. Every rank enters the
features of all ranks in the order of the ranks, so all ranks have equal state.

Cost: queues of (classes, queue_size, dim) and distances (foreground proposals, classes).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mesa_train.models.dense.boxes import widened

from .rules import DISTANCES, OpenWorldRules


def contrastive_clustering_loss(
    features: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    *,
    distance: str | float = "euclidean",
    margin: float | None = None,
    background: int | None = None,
    active: Tensor | None = None,
    count: Tensor | float | None = None,
) -> Tensor:
    """Compute the clustering loss of ORE, before its factor 0.1.

    The loss is the mean over pairs of a foreground feature and a prototype. A pair of one class
    counts its distance d, and a pair of two classes max(0, margin - d).

    Args:
        features: (N, dim).
        labels: class of each feature, (N,) of int64. Features of the background do not count.
        prototypes: (C, dim), one per class and one for the background. They get no gradient.
        distance: "euclidean" (default; the paper), "minkowski10" (the official code), or the
            exponent of a Minkowski distance.
        margin: default: 10 for "euclidean" and other exponents, 2 for "minkowski10".
        background: the label of the background; default C - 1.
        active: (C,) of bool, false for prototypes that do not take part; default: all take part.
        count: foreground features to divide by; default: those in `labels`.
    Returns:
        The loss, a scalar; 0 without foreground. It is in float32 at least.
    Raises:
        ValueError: the distance is unknown, or shapes do not fit.
    Source: arXiv 2103.02603, equation 1; github.com/JosephKJ/OWOD.
    """
    if features.dim() != 2 or prototypes.dim() != 2 or features.shape[1] != prototypes.shape[1]:
        raise ValueError(
            "features and prototypes must be (N, dim) and (C, dim), got "
            f"{tuple(features.shape)} and {tuple(prototypes.shape)}"
        )
    exponent, default = _exponent(distance)
    margin = default if margin is None else margin
    classes = len(prototypes)
    background = classes - 1 if background is None else background
    chosen = torch.where(labels != background)[0]
    features = widened(features)
    if not len(chosen):
        return features.sum() * 0
    centres = prototypes.detach().to(features)
    distances = torch.cdist(
        features[chosen],
        centres,
        p=exponent,
        compute_mode="donot_use_mm_for_euclid_dist",
    )
    own = F.one_hot(labels[chosen], classes).bool()
    terms = torch.where(own, distances, (margin - distances).clamp(min=0))
    total: Tensor | float = float(classes)
    if active is not None:
        terms = torch.where(active, terms, 0)
        total = active.sum().clamp(min=1)
    return terms.sum() / total / (len(chosen) if count is None else count)


def _exponent(distance: str | float) -> tuple[float, float]:
    """Exponent and default margin of a distance."""
    if isinstance(distance, str):
        if distance not in DISTANCES:
            raise ValueError(
                f"distance must be one of {', '.join(DISTANCES)} or a number, got {distance!r}"
            )
        return DISTANCES[distance]
    if not distance > 0:
        raise ValueError(f"distance must be positive, got {distance}")
    return float(distance), 10.0


class ContrastiveClustering(nn.Module):
    """Queues and prototypes of classes, and the loss of a step. See the head of this file.

    Args:
        classes: prototypes; the last one is the background's.
        dim: of the features.
        rules: distance, margin, queue, start, update, momentum.

    Attributes:
        prototypes: (classes, dim).
        present: (classes,) of bool: the class has a prototype.
        queue: (classes, queue_size, dim), a ring.
        length: filled places of each class's queue, (classes,).
        steps: training steps of the task, a scalar.
        start: the step of the first prototypes, a scalar.
        hinged: share of the pairs of two classes nearer than the margin in the last step.
        deferred: features are entered by `commit` after a step, not by its forward. The loss of a
            micro-batch then depends on that micro-batch alone, and one process with accumulation has
            the losses of several. Default false, as in the official code.
    """

    prototypes: Tensor
    present: Tensor
    queue: Tensor
    length: Tensor
    position: Tensor
    steps: Tensor
    start: Tensor

    def __init__(self, classes: int, dim: int, rules: OpenWorldRules) -> None:
        super().__init__()
        self.rules = rules
        whole = torch.zeros(classes, dtype=torch.int64)
        self.register_buffer("prototypes", torch.zeros(classes, dim))
        self.register_buffer("present", torch.zeros(classes, dtype=torch.bool))
        self.register_buffer("queue", torch.zeros(classes, rules.queue_size, dim))
        self.register_buffer("length", whole)
        self.register_buffer("position", whole.clone())
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("start", torch.tensor(rules.start))
        self.hinged: Tensor | None = None
        self.deferred = False
        self.pending: list[tuple[Tensor, Tensor]] = []

    @property
    def background(self) -> int:
        """The label of the background."""
        return len(self.prototypes) - 1

    def start_task(self, start: int = 0) -> None:
        """Count steps from 0 again and take new prototypes at step `start`; queues stay.

        The official code starts at once in tasks 2 to 4.
        """
        self.steps.zero_()
        self.present.zero_()
        self.start.fill_(start)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Enter a step's features and return the loss, with its factor.

        Args:
            features: (N, dim), of this rank's proposals.
            labels: (N,) of int64.
        Returns:
            A scalar, 0 before the first prototypes. It is scaled so that its mean over ranks is the
            loss of one process.
        """
        rules = self.rules
        features = self.scaled(features)
        count: Tensor | None = None
        if self.deferred:
            self.pending.append((features.detach(), labels))
            started = int(self.steps) > int(self.start)
        else:
            classes = self._entered([(features.detach(), labels)])
            count = (classes != self.background).sum().clamp(min=1) / _world()
            started = int(self.steps) > int(self.start)
        if not started:
            return features.sum() * 0
        active = self.present if rules.late_prototypes else None
        self._watch(features, labels)
        return rules.cluster_weight * contrastive_clustering_loss(
            features,
            labels,
            self.prototypes,
            distance=rules.distance,
            margin=rules.hinge,
            active=active,
            count=count,
        )

    def commit(self) -> None:
        """With `deferred`: enter the features of all micro-batches of a step. All ranks take part."""
        if self.pending:
            pending, self.pending = self.pending, []
            self._entered(pending)

    @torch.no_grad()
    def _entered(self, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Enter micro-batches of all ranks as one step. Returns the labels of the last one."""
        labels = batches[0][1]
        for batch in batches:
            features, labels = gathered(*batch)
            self.enter(features, labels)
        self.update()
        self.steps += 1
        return labels

    def scaled(self, features: Tensor) -> Tensor:
        """Features in float32 at least, scaled as `rules.feature_scale` says."""
        features = widened(features)
        if self.rules.feature_scale == "none":
            return features
        norms = features.norm(dim=1, keepdim=True) + 1e-6
        return features * (features.shape[1] ** 0.5 / norms)

    @torch.no_grad()
    def enter(self, features: Tensor, labels: Tensor) -> None:
        """Append features (N, dim) to the queues of their labels (N,), the oldest first."""
        size = self.queue.shape[1]
        counts = torch.bincount(labels, minlength=len(self.length))
        order = labels.argsort(stable=True)
        firsts = counts.cumsum(0) - counts
        place = torch.arange(len(labels), device=labels.device) - firsts[labels[order]]
        # Of more features than a queue holds, the newest stay.
        kept = place >= counts[labels[order]] - size
        order, place = order[kept], place[kept]
        owners = labels[order]
        self.queue[owners, (self.position[owners] + place) % size] = features[order].to(self.queue)
        self.position.copy_((self.position + counts) % size)
        self.length.copy_((self.length + counts).clamp(max=size))

    @torch.no_grad()
    def update(self) -> None:
        """Set or move the prototypes, if the step is due."""
        rules, step, start = self.rules, int(self.steps), int(self.start)
        if step < start:
            return
        filled = self.length > 0
        means = self.queue.sum(1) / self.length.clamp(min=1)[:, None]
        if step == start:
            self.prototypes.copy_(means)
            self.present.copy_(filled)
            return
        if rules.late_prototypes:
            new = filled & ~self.present
            self.prototypes.copy_(torch.where(new[:, None], means, self.prototypes))
            self.present.logical_or_(filled)
        if step % rules.update_every == 0:
            moved = rules.momentum * self.prototypes + (1 - rules.momentum) * means
            self.prototypes.copy_(torch.where(filled[:, None], moved, self.prototypes))

    @torch.no_grad()
    def _watch(self, features: Tensor, labels: Tensor) -> None:
        """Count the pairs of two classes within the margin."""
        chosen = labels != self.background
        exponent, _ = DISTANCES[self.rules.distance]
        near = torch.cdist(features[chosen].detach(), self.prototypes, p=exponent)
        near = near < self.rules.hinge
        near &= ~F.one_hot(labels[chosen], len(self.prototypes)).bool()
        pairs = near.shape[0] * (near.shape[1] - 1)
        self.hinged = near.sum() / max(1, pairs)


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, dim) and labels (N,) of all ranks, in the order of the ranks.

    Ranks may have different N. Without a process group the arguments are returned.
    """
    world = _world()
    if world == 1:
        return features, labels
    own = torch.tensor([len(labels)], device=labels.device)
    counts = [torch.zeros_like(own) for _ in range(world)]
    dist.all_gather(counts, own)
    sizes = [int(count) for count in counts]
    padding = max(sizes) - len(labels)

    def everyones(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0) * (x.dim() - 1) + (0, padding)).contiguous()
        parts = [torch.empty_like(x) for _ in range(world)]
        dist.all_gather(parts, x)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    return everyones(features), everyones(labels)
