"""Frozen features: cached once, probed, and sets with other labels."""

import pytest
import timm
import torch

import mesa_train.models  # noqa: F401
from mesa_train.training.evaluation import linear_probe as features
from mesa_train.training.evaluation.robustness import LabelMap, calibration_error, evaluate


def clusters(count, shift=0.0, classes=4, width=12):
    stream = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, width, generator=stream) * 2
    labels = torch.arange(count) % classes
    noise = torch.randn(count, width, generator=torch.Generator().manual_seed(int(shift * 100) + 1))
    return centres[labels] * 50 + noise * 40 + shift, labels


def test_features_are_made_once_and_kept(tmp_path):
    model = timm.create_model("vit_22b_tiny", num_classes=0, img_size=56)
    calls = []

    def make():
        calls.append(1)
        stream = torch.Generator().manual_seed(0)
        batches = [(torch.randn(3, 3, 56, 56, generator=stream), torch.arange(3)) for _ in range(2)]
        yield from features.extract(model, batches, "cpu")

    x, y = features.cached(tmp_path, "a", make)
    again, _ = features.cached(tmp_path, "a", make)
    assert len(calls) == 1
    assert torch.equal(again, x)
    assert x.shape == (6, 64)
    assert y.tolist() == [0, 1, 2, 0, 1, 2]
    assert model.training  # as it was found
    exact, _ = features.cached(tmp_path, "b", make, half=False)
    # float16's rounding.
    torch.testing.assert_close(x, exact, rtol=1e-3, atol=1e-4)
    assert not torch.equal(x, exact)


def test_features_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"not finite in float16; store float32 \(half=False\)"):
        features.cached(
            tmp_path, "c", lambda: iter([(torch.full((2, 3), 1e6), torch.zeros(2).long())])
        )
    assert not list(tmp_path.glob("[!.]*"))


def test_the_probe_finds_what_is_linear():
    train, test = clusters(400), clusters(200, 0.5)
    probe = features.linear_probe([train, clusters(400, 0.25)], test, epochs=10)
    assert probe.accuracy > 0.95
    assert probe.lr in (0.03, 0.1, 0.3, 1.0)
    assert (probe.logits(test[0]).argmax(-1) == test[1]).float().mean() == probe.accuracy
    same = features.linear_probe([train, clusters(400, 0.25)], test, epochs=10)
    assert torch.equal(same.weight, probe.weight)
    assert features.nearest_neighbours(train, test) > 0.95
    shuffled = (train[0], train[1].roll(1))
    assert features.nearest_neighbours(shuffled, test) < 0.1
    with pytest.raises(ValueError, match="the same images in the same order"):
        features.linear_probe([train, shuffled], test)
    with pytest.raises(ValueError, match="k=500 must lie between 1 and the 400"):
        features.nearest_neighbours(train, test, k=500)
    # 20 by default, as in DINO's evaluation.
    with pytest.raises(ValueError, match="k=20 must lie between 1 and the 19"):
        features.nearest_neighbours((train[0][:19], train[1][:19]), test)
    assert features.nearest_neighbours((train[0][:20], train[1][:20]), test) > 0.5


@pytest.mark.parametrize(("images", "batch"), [(400, 16), (1000, 20)])
def test_a_small_set_is_probed_in_500_steps_and_batches_of_16_at_the_least(images, batch):
    train, test = clusters(images), clusters(40, 0.5)
    given = features.linear_probe([train], test, rates=[0.1], batch_size=batch)
    assert torch.equal(features.linear_probe([train], test, rates=[0.1]).weight, given.weight)


@pytest.mark.parametrize(
    ("images", "few"),
    [(3, 1), (9, 1), (400, 40), (10_000, 1000), (60_000, 1000), (1_281_167, 12_811)],
)
def test_the_rate_is_chosen_on_1_percent_or_more_of_a_small_set(images, few):
    assert features.held_back(images) == few


def test_few_images_are_probed_or_refused_in_one_line():
    few = clusters(6, classes=2)
    assert features.linear_probe([few], clusters(20, 0.1, classes=2)).chosen_on == 1
    with pytest.raises(ValueError, match="needs at least 3 training images, got 2"):
        features.linear_probe([(few[0][:2], few[1][:2])], few)


NAMES, THEIRS = ["tench", "tabby", "tiger cat", "ox"], ["fish", "cat", "boat"]


def test_a_mapping_scores_other_labels(tmp_path):
    path = tmp_path / "map.yaml"
    path.write_text("tench: fish\ntabby: cat\n2: cat\nox: null\n")
    mapping = LabelMap.read(path, NAMES, THEIRS)
    assert mapping.columns == ((0,), (1, 2), ())
    logits = torch.tensor([[4.0, 0, 0, 9], [0, 1, 3, 9], [5, 0, 0, 0], [1, 0, 0, 0]])
    found = evaluate(logits, torch.tensor([0, 1, 1, 2]), mapping)
    # ox is no answer, a boat no question; one cat is taken for a fish.
    assert (found.images, found.left_out) == (3, 1)
    assert found.accuracy == pytest.approx(2 / 3)
    path.write_text("tench: fsh\n")
    with pytest.raises(ValueError, match=r"label of the set 'fsh' is unknown; fish\?"):
        LabelMap.read(path, NAMES, THEIRS)
    path.write_text("7: fish\n")
    with pytest.raises(ValueError, match="training label 7 is unknown"):
        LabelMap.read(path, NAMES, THEIRS)
    with pytest.raises(ValueError, match="no mapping file"):
        LabelMap.read(tmp_path / "none.yaml", NAMES, THEIRS)
    with pytest.raises(ValueError, match="no image has a label that the mapping covers"):
        evaluate(logits[:1], torch.tensor([2]), mapping)


def test_calibration_error_by_hand():
    confidence = torch.tensor([0.95, 0.95, 0.55, 0.55])
    right = torch.tensor([True, True, True, False])
    assert calibration_error(confidence, right) == pytest.approx(0.5 * 0.05 + 0.5 * 0.05, abs=1e-6)
    assert calibration_error(torch.ones(4), torch.zeros(4, dtype=torch.bool)) == 1.0
    # The lowest bins of 15 end at 0.067 and 0.133; one is too modest and one too sure.
    low = calibration_error(torch.tensor([0.05, 0.1]), torch.tensor([True, False]))
    assert low == pytest.approx(0.5 * 0.95 + 0.5 * 0.1, abs=1e-6)
