"""The functions of ORE against the published code (see tests/golden/README.md)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mesa_train.models.open_world import (
    ContrastiveClustering,
    OpenWorldRules,
    Weibull,
    auto_label_unknowns,
    classify_by_energy,
    contrastive_clustering_loss,
    energy,
    fit_weibull,
    open_world_evaluation,
    wilderness_impact,
)
from mesa_train.models.open_world.evaluation import wilderness_terms
from mesa_train.models.open_world.matching import match

FOLDER = Path(__file__).resolve().parents[2] / "golden"


def golden(name):
    with np.load(FOLDER / f"ore_{name}_golden.npz") as file:
        return dict(file)


@pytest.mark.parametrize("case", ["code", "paper"])
def test_prototypes_queues_and_the_loss_over_iterations(case):
    found = golden("cluster")
    background, size, start, every, momentum, exponent, margin = found[f"{case}_params"]
    rules = OpenWorldRules(
        distance={10: "minkowski10", 2: "euclidean"}[exponent],
        cluster_weight=1.0,
        queue_size=int(size),
        start=int(start),
        update_every=int(every),
        momentum=momentum,
        late_prototypes=False,
    )
    assert rules.hinge == margin
    clustering = ContrastiveClustering(int(background) + 1, 8, rules)
    for step, wanted in enumerate(found[f"{case}_loss"]):
        x = torch.from_numpy(found[f"{case}_feats"][step]).requires_grad_()
        labels = torch.from_numpy(found[f"{case}_classes"][step])
        loss = clustering(x, labels)
        loss.backward()
        assert loss.item() == pytest.approx(wanted, abs=2e-6)
        np.testing.assert_allclose(x.grad, found[f"{case}_grad"][step], atol=1e-6)
        assert clustering.length.tolist() == found[f"{case}_queue_len"][step].tolist()
        means = found[f"{case}_means"][step]
        if np.isfinite(means).all():
            np.testing.assert_allclose(clustering.prototypes, means, atol=1e-6)
            distance = rules.distance if step % 2 else exponent
            alone = contrastive_clustering_loss(
                x, labels, clustering.prototypes, distance=distance, margin=margin
            )
            assert alone.item() == pytest.approx(wanted, abs=2e-6)


@pytest.mark.parametrize("case", ["normal_k1", "normal_k5", "low_logits_k3"])
def test_auto_labels_and_the_official_mistake(case):
    found = {k.removeprefix(f"{case}_"): v for k, v in golden("autolabel").items()}
    sampled = found["sampled"]
    classes = found["gt_classes"][found["matched_idx"][sampled]]
    before = torch.from_numpy(np.where(found["matched_label"][sampled] == 1, classes, 81))
    logits = torch.from_numpy(found["objectness_logit"][sampled])
    k = int(found["k"])
    official = auto_label_unknowns(before, logits, k, relabel_foreground=True)
    assert official.tolist() == found["out_class"].tolist()
    ours = auto_label_unknowns(before, logits, k)
    assert (ours.eq(80) & before.eq(81)).sum() == k
    assert torch.equal(ours[before != 81], before[before != 81])
    assert torch.equal(ours, official) == (case != "low_logits_k3")


def test_energies_and_the_decision():
    found = golden("energy")
    logits, seen = torch.from_numpy(found["logits"]), int(found["seen"])
    energies = energy(logits, seen)
    np.testing.assert_allclose(energies, found["energy_T1"], atol=1e-6)
    np.testing.assert_allclose(energy(logits, seen, 1.5), found["energy_T15"], atol=1e-6)
    known, unknown = (Weibull(*found[f"{name}_scale_shape_shift"]) for name in ("known", "unk"))
    np.testing.assert_allclose(unknown.around(energies), found["p_unk"], atol=1e-7, equal_nan=True)
    np.testing.assert_allclose(known.around(energies), found["p_known"], atol=1e-7, equal_nan=True)
    before = torch.from_numpy(found["class_before"])
    after = classify_by_energy(before, energies, known=known, unknown=unknown)
    assert after.tolist() == found["class_after"].tolist()
    # Outside of the support, the energy is lower than that of any known detection.
    outside = torch.from_numpy(np.isnan(found["p_unk"] + found["p_known"]))
    low = classify_by_energy(before, energies, known=known, unknown=unknown, outside="unknown")
    assert low[outside].eq(80).all()
    assert torch.equal(low[~outside], after[~outside])


@pytest.mark.parametrize("case", ["unk", "known"])
def test_weibull_fits_are_as_likely_as_the_reference(case):
    found = golden("weibull")
    seed, count = found[f"{case}_seed_n"]
    scale, shape, shift = found[f"{case}_true"]
    samples = shift + scale * np.random.RandomState(seed).weibull(shape, count)
    fit = fit_weibull(samples)
    likelihood = fit.log_likelihood(torch.from_numpy(samples))
    assert likelihood == pytest.approx(found[f"{case}_loglik"].max(), abs=1e-4)
    np.testing.assert_allclose(fit, found[f"{case}_fit_scipy"], rtol=1e-3)
    assert fit.quantile(0.05) == pytest.approx(np.quantile(samples, 0.05), rel=0.05)


def test_a_fit_of_few_constant_or_infinite_samples_is_refused():
    for samples, word in (
        ([1.0] * 5, "10"),
        ([1.0] * 20, "different"),
        ([0.0, 1, np.inf] * 9, "inf"),
    ):
        with pytest.raises(ValueError, match=word):
            fit_weibull(samples)


def test_a_fit_of_falling_density_is_finite():
    samples = 2 + np.random.RandomState(0).exponential(size=200) ** 1.5
    fit = fit_weibull(samples)
    assert np.isfinite(fit).all()
    assert fit.shift < samples.min()


def images(found, order):
    """Detections and targets per image, in pixels from 0."""
    names = found["class_names"].tolist()
    detections, targets = [], []
    for image in order:
        rows = found["gt_image"] == image
        labels = [names.index(n) if n in names else 5 for n in found["gt_name"][rows]]
        targets.append(
            {
                "boxes": found["gt_box"][rows] - [1, 1, 0, 0],
                "labels": labels,
                "difficult": found["gt_difficult"][rows],
            }
        )
        rows = found["det_image"] == image
        detections.append(
            {
                "boxes": torch.from_numpy(found["det_box_1based"][rows] - [1, 1, 0, 0]),
                "labels": torch.from_numpy(found["det_class"][rows]),
                "scores": torch.from_numpy(found["det_score"][rows]),
            }
        )
    return detections, targets


@pytest.mark.parametrize("case", ["plain", "dup"])
def test_the_evaluation_of_the_benchmark(case):
    found = golden("eval")
    again = found["duplicated_images"].tolist() if case == "dup" else []
    order = [*range(80), *again]
    inputs = images(found, order)
    options = {"known": 5, "unknown": 6, "image_ids": order, "repeated": "count"}
    result = open_world_evaluation(*inputs, **options)

    def same(values, name, factor=100):
        values = list(values.values())
        np.testing.assert_allclose(np.array(values) * factor, found[f"{case}_{name}"], atol=1e-11)

    same(result.ap, "ap")
    same(result.recall, "recall_last")
    same(result.precision, "precision_last")
    same(result.wilderness, "wi", 1)
    same(result.unknown_precision, "unk_precision_at", 1)
    same(result.aose_by_class, "aose_per_class", 1)
    assert result.aose == found[f"{case}_aose"]
    assert result.unknown_objects == found[f"{case}_num_unk"]
    terms = wilderness_terms(match(*inputs, **options), 0.8)
    for values, name in zip(terms, ("fp_open", "tp_plus_fp"), strict=True):
        assert values == found[f"{case}_wi_terms_{name}"].tolist()
    # Both definitions, as computed by hand from the terms.
    above, below = map(np.mean, terms)
    assert result.wi == above / below
    paper = wilderness_impact(*inputs, definition="paper", **options)
    assert paper == result.wilderness_paper[0.8] == pytest.approx(above / (below - above))


def test_repeated_images_are_left_out_by_default():
    found = golden("eval")
    once = open_world_evaluation(*images(found, range(80)), known=5, unknown=6)
    order = [*range(80), *found["duplicated_images"].tolist()]
    twice = open_world_evaluation(*images(found, order), known=5, unknown=6, image_ids=order)
    assert twice.repeated == 19
    np.testing.assert_equal(twice.ap, once.ap)
    eleven = open_world_evaluation(*images(found, range(80)), known=5, unknown=6, points="11")
    assert eleven.map_known != once.map_known


def test_a_match_needs_an_overlap_of_more_than_a_half():
    target = {"boxes": [[0, 0, 10, 10], [20, 0, 30, 10]], "labels": [0, 3]}
    for height, right in ((5, False), (5.1, True)):
        boxes = [[0, 0, 10, height], [20, 0, 30, height]]
        found = {"boxes": boxes, "labels": [0, 0], "scores": [0.9, 0.8]}
        result = open_world_evaluation([found], [target], known=1, unknown=4)
        assert result.ap[0] == right
        assert result.aose == right
        # Without a detection of the label unknown, its recall is 0, and its AP too.
        assert (result.unknown_recall, result.unknown_ap) == (0, 0)


def test_without_unknown_objects_nothing_is_nan_in_a_row():
    target = {"boxes": [[0, 0, 10, 10]], "labels": [0]}
    found = {"boxes": [[0, 0, 10, 10]], "labels": [0], "scores": [0.9]}
    row = open_world_evaluation([found], [target], known=1, unknown=1).row()
    assert (row["aose"], row["wi"], row["map_known"]) == (0, 0.0, 1.0)
    assert row["unknown_recall"] is row["unknown_ap"] is row["map_previous"] is None
    with pytest.raises(ValueError, match=r"targets\[0\] has no 'labels'"):
        open_world_evaluation([found], [{"boxes": []}], known=1, unknown=1)
    with pytest.raises(ValueError, match="1 boxes and 2 scores"):
        open_world_evaluation([found | {"scores": [1, 2]}], [target], known=1, unknown=1)
