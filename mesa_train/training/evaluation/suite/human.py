"""The comparison with humans on the stimuli of model-vs-human (arXiv 2106.07411).

The stimuli lie in DATA/model-vs-human/SET, in any subfolders, with the names of their release. A
stimulus belongs to a human trial if its name ends with the trial's image and has the trial's
condition and class between underscores.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mesa_train.training import evaluation as metrics
from mesa_train.training.config_schema import ConfigError

from .images import FeatureCache, Images, image_of

FOLDER = "model-vs-human"
NEEDS_1000 = "needs a classifier of ImageNet's 1,000 classes: give --weights that have one"
# data, metric, value, whether it is a share, note
Line = tuple[str, str, float | None, bool, str]


def lines(
    data: Path,
    responses: Path | None,
    features: FeatureCache,
    logits: Callable[[Tensor], Tensor] | None,
) -> list[Line]:
    """The lines of the report, also for sets whose stimuli are missing."""
    if responses is None or not responses.is_file():
        note = f"no human responses {responses}: see recipes/evaluate/data"
        return [(FOLDER, "error consistency", None, True, note)]
    humans = metrics.read_human_data(responses)
    root = data / FOLDER
    present = [name for name in humans if (root / name).is_dir()]
    found: list[Line] = []
    scores: dict[str, metrics.Alignment] = {}
    if not present:
        note = f"no folder {root}: put the stimuli there, one folder a set ({', '.join(humans)})"
        return [(FOLDER, "error consistency", None, True, note)]
    if logits is None:
        return [(FOLDER, "error consistency", None, True, NEEDS_1000)]
    for name in present:
        images = stimuli(root / name, humans[name])
        p = logits(features(images)).double().softmax(1)
        answers = metrics.sixteen_class_decision(p)
        scores[name] = metrics.align(answers, humans[name])
        found += _set_lines(name, scores[name], metrics.align_humans(humans[name]))
        if humans[name].texture is not None:
            cues = humans[name]
            bias = metrics.shape_bias(answers, cues.category, cues.texture)
            biases = [metrics.shape_bias(r, cues.category, cues.texture) for r in cues.response]
            note = f"humans: {100 * sum(biases) / len(biases):.1f} %"
            found.append((name, "shape bias", bias, True, note))
    if len(scores) == len(humans):
        mean = metrics.mean_alignment(scores)
        theirs = metrics.mean_alignment({n: metrics.align_humans(h) for n, h in humans.items()})
        found += _set_lines("mean of 17 sets", mean, theirs)
    else:
        lacking = ", ".join(name for name in humans if name not in present)
        found.append(
            ("mean of 17 sets", "error consistency", None, True, f"no stimuli of {lacking}")
        )
    return found


def stimuli(folder: Path, human: metrics.HumanSet) -> Images:
    """The stimuli of a set in the order of the human trials.

    Raises:
        ConfigError: a trial has no stimulus, or several.
    """
    names = list(metrics.sixteen_classes())
    by_end: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.png")):
        by_end.setdefault(path.name.rpartition("_")[2], []).append(path)
    paths = []
    for i, raw in enumerate(human.image_id):
        image = raw.decode() if isinstance(raw, bytes) else str(raw)
        condition = human.conditions[int(human.condition[i])]
        category = names[int(human.category[i])]
        fits = [p for p in by_end.get(image.rpartition("_")[2], []) if p.name.endswith(image)]
        if len(fits) > 1:
            exact = f"_{condition}_{category}_"
            fits = [p for p in fits if exact in f"_{p.name}"]
        if len(fits) != 1:
            raise ConfigError(
                f"--data: {folder} has {len(fits)} stimuli for the trial {image} "
                f"(condition {condition}, class {category}), and needs one"
            )
        paths.append(str(fits[0]))
    labels = torch.as_tensor(human.category).long()
    return Images(str(folder), lambda i: image_of(paths[i]), labels, tuple(names), squash=True)


def _set_lines(name: str, own: metrics.Alignment, humans: metrics.Alignment) -> list[Line]:
    """Four metrics of a set, each with the humans' own value."""
    found: list[Line] = []
    for metric, value in vars(own).items():
        theirs: Any = getattr(humans, metric)
        words = metric.replace("_", " ").replace("ood", "OOD")
        share = metric in ("observed_consistency", "ood_accuracy")
        text = f"{100 * theirs:.1f} %" if share else f"{theirs:.3f}"
        found.append((name, words, value, share, f"humans: {text}"))
    return found
