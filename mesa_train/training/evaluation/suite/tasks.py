"""The tasks of an evaluation: each gives rows of a report, also for what could not be measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mesa_train.training import evaluation as metrics
from mesa_train.training.config_schema import ConfigError
from mesa_train.training.evaluation.linear_probe import Probe, linear_probe

from . import human
from .frozen import FrozenModel
from .groups import Groups
from .groups import lines as fairness_lines
from .images import FeatureCache, Images, of_package, of_subset, of_validation, short_side_of

KNN = (10, 20, 100, 200)
_NEEDS_1000 = human.NEEDS_1000
# Errors of data and models. Any other error is a bug.
MISTAKES = (ValueError, ImportError, OSError)
FAILED = "the whole task"


@dataclass
class Row:
    """One line of the report.

    Attributes:
        task: name of the task.
        data: name of the images.
        metric: name of the metric.
        value: the number; None if it was not measured.
        share: the value is a share of 1, shown in percent.
        note: what the number rests on; or why there is none, and where to put the data.
    """

    task: str
    data: str
    metric: str
    value: float | None
    share: bool = True
    note: str = ""


@dataclass
class Settings:
    """The options of the command line.

    Attributes:
        data: root folder of further sets.
        out_set: images from outside; None for the classes that are left out.
        groups: images with groups; None if there are none.
        human_data: packed human responses.
        other_package: name of a packaged set with the same labels; None for folders.
        views: of each training image for the linear probe; all but the first are augmented.
    """

    data: Path
    out_set: Images | None = None
    groups: Groups | None = None
    human_data: Path | None = None
    other_package: str | None = None
    views: int = 1


@dataclass
class Evaluation:
    """A frozen model, its images, and what the tasks share.

    Attributes:
        model: the frozen model.
        train: training images.
        test: held-out images.
        features: the cache.
        settings: further data.
        plots: values for the charts, by name.
    """

    model: FrozenModel
    train: Images
    test: Images
    features: FeatureCache
    settings: Settings
    plots: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def train_features(self) -> Tensor:
        return self.features(self.train)

    @cached_property
    def test_features(self) -> Tensor:
        return self.features(self.test)

    @cached_property
    def linear(self) -> Probe:
        """The linear probe on the training images."""
        more = [self.features(self.train, view=view) for view in range(1, self.settings.views)]
        return linear_probe(
            [(x, self.train.labels) for x in (self.train_features, *more)],
            (self.test_features, self.test.labels),
        )

    @property
    def has_head(self) -> bool:
        """True if the model's own classifier has the classes of the images."""
        head = self.model.classifier
        return head is not None and head.out_features == len(self.train.classes)

    def logits(self, features: Tensor) -> Tensor:
        """Logits of the model's own classifier if it has these classes, else of the probe."""
        return self.model.logits(features) if self.has_head else self.linear.logits(features)

    @property
    def source(self) -> str:
        """Whose logits `logits` gives."""
        return "the model's classifier" if self.has_head else "the linear probe"


def probe(e: Evaluation) -> list[Row]:
    """Linear probe: SGD for 10 epochs on frozen features."""
    found, where = e.linear, e.test.name
    note = (
        f"learning rate {found.lr:g} chosen on {found.chosen_on} of {len(e.train)} training images"
    )
    if e.settings.views > 1:
        note += f", {e.settings.views} views of each"
    rows = [Row("probe", where, "top-1 accuracy", found.accuracy, note=note)]
    if len(e.train.classes) > 5:
        best = found.logits(e.test_features).topk(5, 1).indices
        hit = (best == e.test.labels[:, None]).any(1).double().mean().item()
        rows.append(Row("probe", where, "top-5 accuracy", hit))
    if e.has_head:
        own = e.model.logits(e.test_features).argmax(1) == e.test.labels
        rows.append(
            Row("probe", where, "top-1 of the model's classifier", own.double().mean().item())
        )
    return rows


def fewshot(e: Evaluation) -> list[Row]:
    """Few-shot least squares: 1, 5, 10, 25 images of each class, three draws."""
    least = int(torch.bincount(e.train.labels).min())
    shots = [n for n in metrics.fewshot.SHOTS if n <= least]
    accuracy = metrics.fewshot_least_squares(
        e.train_features, e.train.labels, e.test_features, e.test.labels, shots=shots
    )[0]
    e.plots["few-shot"] = (shots, accuracy.mean(0).tolist())
    rows = [
        Row("fewshot", e.test.name, f"{n}-shot accuracy", float(accuracy[:, i].mean()),
            note=f"3 draws, {100 * accuracy[:, i].std():.1f} points apart (standard deviation)")
        for i, n in enumerate(shots)
    ]  # fmt: skip
    return rows + [
        Row("fewshot", e.test.name, f"{n}-shot accuracy", None,
            note=f"a class has {least} training images")
        for n in metrics.fewshot.SHOTS if n > least
    ]  # fmt: skip


def knn(e: Evaluation) -> list[Row]:
    """Nearest neighbours by cosine similarity."""
    ks = [k for k in KNN if k <= len(e.train)]
    rows = []
    if ks:
        guesses = metrics.knn(e.train_features, e.train.labels, e.test_features, ks)
        right = (guesses == e.test.labels.numpy()).mean(1)
        e.plots["k nearest neighbours"] = (ks, right.tolist())
        rows = [
            Row("knn", e.test.name, f"k = {k}", float(a)) for k, a in zip(ks, right, strict=True)
        ]
    return rows + [
        Row("knn", e.test.name, f"k = {k}", None, note=f"there are {len(e.train)} training images")
        for k in KNN if k > len(e.train)
    ]  # fmt: skip


def calibration(e: Evaluation) -> list[Row]:
    """Calibration on the held-out images, and after a temperature fitted on half of them."""
    z, y = e.logits(e.test_features), e.test.labels
    p = z.double().softmax(1)
    e.plots["reliability"] = metrics.reliability(p, y)
    ece = metrics.expected_calibration_error
    found = {
        "ECE, 15 bins": (ece(p, y), True),
        "ECE, 30 bins": (ece(p, y, bins=30), True),
        "ECE, 15 adaptive bins": (ece(p, y, adaptive=True), True),
        "calibration error, l2, 15 bins": (ece(p, y, norm="l2"), True),
        "static calibration error": (metrics.static_calibration_error(p, y), True),
        "negative log-likelihood": (metrics.negative_log_likelihood(p, y), False),
        "Brier score, 0 to 2": (metrics.brier(p, y), False),
    }
    rows = [
        Row("calibration", e.test.name, name, value, share, note=f"softmax of {e.source}")
        for name, (value, share) in found.items()
    ]
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    fit, rest = order[: len(order) // 2], order[len(order) // 2 :]
    t = metrics.temperature(z[fit], y[fit])
    note = f"fitted on {len(fit)} held-out images, scored on the other {len(rest)}"
    scaled = (z[rest].double() / t).softmax(1)
    return [
        *rows,
        Row("calibration", e.test.name, "temperature", t, False, note),
        Row("calibration", e.test.name, "ECE before the temperature", ece(p[rest], y[rest]), note=note),
        Row("calibration", e.test.name, "ECE after the temperature", ece(scaled, y[rest]), note=note),
    ]  # fmt: skip


def selective(e: Evaluation) -> list[Row]:
    """Selective prediction on the held-out images."""
    p, y = e.logits(e.test_features).double().softmax(1), e.test.labels
    coverages = [i / 20 for i in range(1, 21)]
    e.plots["selective"] = (
        coverages,
        metrics.selective_accuracy(p, y, coverages).tolist(),
    )
    rows = [
        Row("selective", e.test.name, f"accuracy at {c:.0%} coverage", float(a))
        for c, a in zip(metrics.selective.COVERAGES, metrics.selective_accuracy(p, y), strict=True)
    ]
    area = metrics.area_under_risk_coverage(p, y)
    auroc = metrics.correctness_auroc(p, y)
    rows += [
        Row("selective", e.test.name, "area under risk and coverage", area),
        Row("selective", e.test.name, "AUROC of correct answers",
            None if math.isnan(auroc) else auroc,
            note="all answers are right, or all are wrong" if math.isnan(auroc) else ""),
    ]  # fmt: skip
    fractions = metrics.selective.ORACLE_FRACTIONS
    shares = metrics.oracle_collaborative_accuracy(p, y, fractions)
    return rows + [
        Row("selective", e.test.name, f"accuracy if an oracle answers {f:.1%}", float(a))
        for f, a in zip(fractions, shares, strict=True)
    ]


def ood_detection(e: Evaluation) -> list[Row]:
    """Detection of images from outside: of a folder, or of the classes that are left out."""
    if e.settings.out_set is not None:
        outside = e.settings.out_set
        train, labels = e.train_features, e.train.labels
        inside, out = e.test_features, e.features(outside)
        z_in, z_out, name = e.logits(inside), e.logits(out), outside.name
        note = f"{len(inside)} images inside, {len(out)} outside; {e.source}"
    else:
        known = len(e.train.classes) // 2
        if known < 2:
            return [Row("ood_detection", e.test.name, "AUROC", None,
                        note="needs 4 classes, or --out-set FOLDER with images from outside")]  # fmt: skip
        mask, test = e.train.labels < known, e.test.labels < known
        train, labels = e.train_features[mask], e.train.labels[mask]
        inside, out = e.test_features[test], e.test_features[~test]
        half = linear_probe([(train, labels)], (inside, e.test.labels[test]))
        z_in, z_out = half.logits(inside), half.logits(out)
        name = f"{e.test.name}, classes {known} to {len(e.train.classes) - 1}"
        note = f"the probe knows classes 0 to {known - 1} alone"
    scores = [metrics.ood_scores(z, x, train, labels) for z, x in ((z_in, inside), (z_out, out))]
    rows = []
    for score in metrics.ood_detection.SCORES:
        found = metrics.detection_metrics(scores[0][score], scores[1][score])
        rows += [
            Row("ood_detection", name, f"{score}: {metric.upper()}", value, note=note)
            for metric, value in found.items()
        ]
    return rows


def ood(e: Evaluation) -> list[Row]:
    """Accuracy on images from other sources with known labels."""
    rows = []
    other = e.settings.other_package
    if other is not None:
        _, images = of_package(other)
        z, y = e.logits(e.features(images)), images.labels
        right = (z.argmax(1) == y).double().mean().item()
        note = f"{e.source} of {e.train.name} on digits of another source"
        rows.append(Row("ood", images.name, "top-1 accuracy", right, note=note))
        error = metrics.expected_calibration_error(z.double().softmax(1), y)
        rows.append(Row("ood", images.name, "ECE, 15 bins", error, note=note))
    for subset in metrics.label_subsets.SUBSETS:
        rows += tried("ood", subset, partial(_subset, e, subset))
    return rows + tried("ood", "ReaL", partial(_real, e))


def _subset(e: Evaluation, subset: str) -> list[Row]:
    """One of ImageNet's other test sets."""
    path = e.settings.data / subset
    example = metrics.subset_folders(subset)[0]
    if not path.is_dir():
        note = f"no folder {path}: put the set there, with class folders such as {example}"
        return [Row("ood", subset, "top-1 accuracy", None, note=note)]
    logits = _imagenet_logits(e)
    if logits is None:
        return [Row("ood", subset, "top-1 accuracy", None, note=_NEEDS_1000)]
    images = of_subset(path, subset)
    features = e.features(images, short_side_of(subset, e.model.size))
    found = metrics.label_subset_accuracy(logits(features), images.labels, subset)
    right = found.prediction == images.labels.numpy()
    error = metrics.binned_error(found.confidence, right)
    note = f"{found.images} images, {len(images.classes)} labels"
    return [
        Row("ood", subset, "top-1 accuracy", found.accuracy, note=note),
        Row("ood", subset, "ECE, 15 bins", error, note=note),
    ]


def _real(e: Evaluation) -> list[Row]:
    """ImageNet's validation images with ReaL labels."""
    path = e.settings.data / "imagenet-val"
    if not path.is_dir():
        note = f"no folder {path}: put the images ILSVRC2012_val_00000001.JPEG and so on there"
        return [Row("ood", "ReaL", "top-1 accuracy", None, note=note)]
    logits = _imagenet_logits(e)
    if logits is None:
        return [Row("ood", "ReaL", "top-1 accuracy", None, note=_NEEDS_1000)]
    images = of_validation(path)
    known = metrics.real_labels()
    labels = [known[i] for i in images.labels.tolist()]
    found = metrics.label_subset_accuracy(logits(e.features(images)), labels, "real")
    return [Row("ood", "ReaL", "top-1 accuracy", found.accuracy, note=f"{found.images} images")]


def _imagenet_logits(e: Evaluation) -> Callable[[Tensor], Tensor] | None:
    """The function from features to 1,000 logits, if there is one."""
    if e.model.classifier is not None and e.model.classifier.out_features == 1000:
        return e.model.logits
    if len(e.train.classes) == 1000:
        return e.linear.logits
    return None


def fairness(e: Evaluation) -> list[Row]:
    """Parity and accuracy of a binary probe by group, before and after post-processing."""
    groups = e.settings.groups
    if groups is None:
        note = "give --groups FILE.csv with the columns file, label (0 or 1), group"
        return [Row("fairness", "groups", "demographic parity", None, note=note)]
    name = groups.images.name
    return [
        Row("fairness", name, metric, value, note=note)
        for metric, value, note in fairness_lines(groups, e.features)
    ]


def humans(e: Evaluation) -> list[Row]:
    """Shape bias and consistency with humans (model-vs-human)."""
    logits = _imagenet_logits(e)
    return [
        Row("human", *line)
        for line in human.lines(e.settings.data, e.settings.human_data, e.features, logits)
    ]


TASKS: dict[str, Callable[[Evaluation], list[Row]]] = {
    "probe": probe,
    "fewshot": fewshot,
    "knn": knn,
    "ood": ood,
    "calibration": calibration,
    "selective": selective,
    "ood_detection": ood_detection,
    "fairness": fairness,
    "human": humans,
}


def tried(task: str, data: str, measure: Callable[[], list[Row]]) -> list[Row]:
    """The rows of a measurement; a single row with the reason if it fails by one of `MISTAKES`.

    Args:
        task: name of the task.
        data: name of the images, for the row of a failure.
        measure: gives the rows.
    """
    try:
        return measure()
    except MISTAKES as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return [Row(task, data, FAILED, None, note=f"failed: {reason}")]


def chosen(text: str) -> list[str]:
    """The tasks of a comma-separated list. ConfigError names an unknown task and the choices."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        raise ConfigError(f"--tasks must be of {', '.join(TASKS)}, got {text!r}")
    return list(dict.fromkeys(names))
