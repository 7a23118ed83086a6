"""ImageNet's other sets and the trials with humans, by a classifier that reads the brightness."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mesa_train.training import evaluation as metrics
from mesa_train.training.evaluation.suite import human, images, tasks

REPOSITORY = Path(__file__).resolve().parents[2]
HUMANS = REPOSITORY / "recipes/evaluate/data/human_responses.npz"


class Bright:
    """Features are the mean of the pixels; logits are highest at class 10 * brightness."""

    classifier = torch.nn.Linear(1, 1000)
    size = 28

    def logits(self, features):
        return -((features - torch.arange(1000)) ** 2)


class Computed:
    """In place of the cache: the brightness of the images as they are read."""

    def __call__(self, found, short_side=None):
        self.short_side = short_side
        return torch.tensor([[np.asarray(found.read(i))[5, 5, 0] * 1.0] for i in range(len(found))])


def evaluation(data, **settings):
    made = tasks.Evaluation(Bright(), None, None, Computed(), tasks.Settings(data, **settings))
    made.train = images.Images("x", None, torch.zeros(0), ("a",))
    return made


def solid(path, tone):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 30), (tone, tone, tone)).save(path)


def test_other_sets_of_imagenet(tmp_path):
    columns = metrics.subset_columns("imagenet-a")
    low = [i for i, (c,) in enumerate(columns) if c < 256][:2]
    for i in low:
        solid(tmp_path / "imagenet-a" / metrics.subset_folders("imagenet-a")[i] / "a.png",
              columns[i][0])  # fmt: skip
    # Sorted as text, 10 comes before 2: with places as labels, both would be wrong.
    for label in (2, 10):
        solid(tmp_path / "imagenet-v2" / str(label) / "a.png", label)
    numbers = [i + 1 for i, known in enumerate(metrics.real_labels()) if known and known[0] < 256]
    for number in numbers[:2]:
        path = tmp_path / "imagenet-val" / f"ILSVRC2012_val_{number:08d}.JPEG"
        solid(path, metrics.real_labels()[number - 1][0])
    made = evaluation(tmp_path)
    found = {r.data: r for r in tasks.ood(made) if r.metric == "top-1 accuracy"}
    assert found["imagenet-a"].value == 1.0
    assert found["imagenet-a"].note == "2 images, 200 labels"
    assert found["imagenet-v2"].value == 1.0
    assert found["imagenet-r"].value is None
    assert f"no folder {tmp_path / 'imagenet-r'}: put the set there" in found["imagenet-r"].note
    assert found["ReaL"].value is not None
    made.model.classifier = None
    found = {r.data: r for r in tasks.ood(made)}
    assert "needs a classifier of ImageNet's 1,000 classes" in found["imagenet-a"].note


def test_a_set_that_fails_is_a_row_and_the_others_are_scored(tmp_path):
    solid(tmp_path / "imagenet-a/no_class_of_it/a.png", 3)
    solid(tmp_path / "imagenet-v2/2/a.png", 2)
    found = {r.data: r for r in tasks.ood(evaluation(tmp_path)) if r.metric != "ECE, 15 bins"}
    assert found["imagenet-a"].value is None
    assert found["imagenet-a"].note.startswith("failed: --data: ")
    assert "has no class folder of imagenet-a" in found["imagenet-a"].note
    assert found["imagenet-v2"].value == 1.0


def test_the_border_of_objectnet_is_cropped_as_it_is_read(tmp_path):
    path = tmp_path / "objectnet/chair/a.png"
    solid(path, 9)
    solid(tmp_path / "objectnet/unknown_thing/a.png", 9)
    found = images.of_subset(tmp_path / "objectnet", "objectnet")
    assert len(found) == 1
    assert found.read(0).size == (26, 26)
    with pytest.raises(ValueError, match="has no class folder of imagenet-a"):
        images.of_subset(tmp_path / "objectnet", "imagenet-a")


def test_stimuli_of_human_trials(tmp_path):
    humans = metrics.read_human_data(HUMANS)
    cues = humans["cue-conflict"]
    names = list(metrics.sixteen_classes())
    tones = [metrics.sixteen_classes()[n][0] for n in names]
    for i, raw in enumerate(cues.image_id):
        path = tmp_path / "model-vs-human/cue-conflict/session-1" / f"{i:04d}_{raw.decode()}"
        # An answer by shape alone, as far as the class's index fits a pixel.
        solid(path, min(tones[cues.category[i]], 255))
    found = human.stimuli(tmp_path / "model-vs-human/cue-conflict", cues)
    assert len(found) == 1280
    assert found.labels.tolist() == cues.category.tolist()
    path.unlink()
    with pytest.raises(ValueError, match="has 0 stimuli for the trial"):
        human.stimuli(tmp_path / "model-vs-human/cue-conflict", cues)


def test_the_shape_bias_of_humans_is_that_of_the_human_data(tmp_path):
    """An observer who sees textures alone is added to the data: the mean falls."""
    humans = metrics.read_human_data(HUMANS)
    cues = humans["cue-conflict"]
    for i, raw in enumerate(cues.image_id):
        solid(tmp_path / "model-vs-human/cue-conflict" / f"{i:04d}_{raw.decode()}", 20)
    packed = dict(np.load(HUMANS, allow_pickle=False))
    packed["cue-conflict/response"] = np.concatenate(
        [packed["cue-conflict/response"], packed["cue-conflict/texture"][None]]
    )
    np.savez(tmp_path / "humans.npz", **packed)
    notes = []
    for path in (HUMANS, tmp_path / "humans.npz"):
        lines = human.lines(tmp_path, path, Computed(), Bright().logits)
        notes += [line[-1] for line in lines if line[1] == "shape bias"]
    observers = len(cues.response)
    biases = [metrics.shape_bias(r, cues.category, cues.texture) for r in cues.response]
    assert notes == [
        f"humans: {100 * sum(biases) / observers:.1f} %",
        f"humans: {100 * sum(biases) / (observers + 1):.1f} %",
    ]
    assert notes[0] == "humans: 95.8 %"  # as published


def test_missing_stimuli_are_a_line(tmp_path):
    (line,) = human.lines(tmp_path, HUMANS, None, None)
    assert line[2] is None
    assert f"no folder {tmp_path / 'model-vs-human'}: put the stimuli there" in line[-1]
    (tmp_path / "model-vs-human/edge").mkdir(parents=True)
    (line,) = human.lines(tmp_path, HUMANS, None, None)
    assert "needs a classifier" in line[-1]
    (line,) = human.lines(tmp_path, tmp_path / "no.npz", None, None)
    assert "no human responses" in line[-1]


# --- from end to end ---
