"""The metrics give the numbers of the published code (see tests/golden/README.md)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mesa_train.training import evaluation as ev

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests/golden"
HUMANS = ROOT / "recipes/evaluate/data/human_responses.npz"


def arrays(name):
    with np.load(GOLDEN / f"downstream_{name}.npz") as file:
        return dict(file)


def expected(found):
    return json.loads(str(found["expected"]))


def texts(name):
    return json.loads((GOLDEN / f"downstream_{name}.json").read_text())


def close(value, wanted, tolerance=1e-6):
    assert np.asarray(value) == pytest.approx(np.asarray(wanted), abs=tolerance, rel=tolerance)


# --- few-shot and nearest neighbours ---

FEWSHOT = arrays("fewshot_knn")
SPLITS = [FEWSHOT[f"{k}_{s}"] for s in ("train", "test") for k in ("features", "labels")]


def test_fewshot_draws_the_images_of_the_protocol():
    for seed in FEWSHOT["seeds"]:
        for shots in FEWSHOT["shots"]:
            drawn = ev.fewshot_indices(FEWSHOT["labels_train"], shots, seed)
            assert drawn.tolist() == FEWSHOT[f"index_seed{seed}_shots{shots}"].tolist()


@pytest.mark.parametrize("shots", [1, 25])  # fewer and more images than columns
def test_ridge_weights(shots):
    from sklearn.linear_model import Ridge

    rows = FEWSHOT[f"index_seed0_shots{shots}"]
    x, y = FEWSHOT["features_train"][rows].astype(float), FEWSHOT["labels_train"][rows]
    (fitted,) = ev.fit_ridge(x, y, 1024.0)
    for part in ("weight", "mean", "std"):
        close(getattr(fitted, part), FEWSHOT[f"{part}_seed0_shots{shots}"], 1e-9)
    z = np.concatenate([(x - x.mean(0)) / (x.std(0) + 1e-5), np.full((len(x), 1), 100.0)], 1)
    other = Ridge(alpha=1024.0, fit_intercept=False, solver="cholesky")
    close(fitted.weight.T, other.fit(z, 2 * np.eye(10)[y] - 1).coef_, 1e-11)


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy])
def test_fewshot_accuracy(convert):
    given = {key: FEWSHOT[key].tolist() for key in ("shots", "l2", "seeds")}
    found = ev.fewshot_least_squares(*map(convert, SPLITS), **given)
    close(found, FEWSHOT["accuracy"])  # which is in float32


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy])
def test_nearest_neighbours(convert):
    x, y, test, _ = map(convert, SPLITS)
    found = ev.knn(x, y, test, FEWSHOT["knn_k"].tolist())
    assert found.tolist() == FEWSHOT["knn_prediction"].tolist()
    close((found == SPLITS[3]).mean(1), FEWSHOT["knn_accuracy"])
    assert ev.knn(x, y, test, 10).tolist() == found[1].tolist()


# --- calibration and selective prediction ---

CALIBRATION = arrays("calibration")
WANTED = expected(CALIBRATION)
LOGITS, LABELS = CALIBRATION["logits"].astype(float), CALIBRATION["labels"]
PROBABILITIES = torch.from_numpy(LOGITS).softmax(-1).numpy()


@pytest.mark.parametrize("bins", [15, 30, 100])
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("scheme", ["even", "adaptive"])
def test_calibration_errors(bins, norm, scheme):
    found = ev.expected_calibration_error(
        PROBABILITIES, LABELS, bins=bins, adaptive=scheme == "adaptive", norm=norm
    )
    close(found, WANTED[f"gce_{scheme}_{bins}_{norm}"])
    if (scheme, norm) == ("even", "l1"):
        close(found, WANTED[f"ece_{bins}_l1"])


def test_other_calibration_metrics():
    from sklearn.metrics import brier_score_loss

    close(
        ev.static_calibration_error(PROBABILITIES, LABELS, bins=30),
        WANTED["static_calibration_error_30"],
    )
    close(ev.negative_log_likelihood(PROBABILITIES, LABELS), WANTED["nll"])
    score = ev.brier(torch.from_numpy(PROBABILITIES), torch.from_numpy(LABELS))
    close(score, WANTED["brier_sum_over_classes"])
    close(score, brier_score_loss(LABELS, PROBABILITIES, scale_by_half=False))
    t = ev.temperature(torch.from_numpy(LOGITS), LABELS)
    close(t, WANTED["temperature"], 1e-4)
    p = torch.from_numpy(LOGITS / t).softmax(-1)
    close(ev.negative_log_likelihood(p, LABELS), WANTED["nll_after_temperature"])
    close(ev.expected_calibration_error(p, LABELS), WANTED["ece_15_l1_after_temperature"])


def test_selective_prediction():
    for coverage in (0.5, 0.8, 0.9, 0.95):
        (found,) = ev.selective_accuracy(PROBABILITIES, LABELS, coverage)
        close(found, WANTED[f"selective_accuracy_at_coverage_{coverage}"])
    close(ev.area_under_risk_coverage(PROBABILITIES, LABELS), WANTED["aurc_mean_of_risks"])
    close(ev.correctness_auroc(PROBABILITIES, LABELS), WANTED["auroc_correct_by_msp"])
    fractions = (0.005, 0.01, 0.02, 0.05)
    close(
        ev.oracle_collaborative_accuracy(PROBABILITIES, LABELS, fractions),
        [WANTED[f"oracle_collaborative_accuracy_{f}"] for f in fractions],
    )


# --- images from outside ---


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy])
def test_detection_scores(convert):
    found = arrays("ood_detection")
    train = convert(found["embed_train"]), convert(found["labels_train"])
    parts = {
        side: ev.ood_scores(
            convert(found[f"logits_{side}"]), convert(found[f"embed_{side}"]), *train
        )
        for side in ("in", "out")
    }
    for name, wanted in expected(found).items():
        both = np.concatenate([parts["in"][name], parts["out"][name]])
        close(both, found[f"score_{name}"])
        metrics = ev.detection_metrics(parts["in"][name], parts["out"][name])
        close(
            [metrics[k] for k in ("auroc", "auprc", "fpr95")],
            [wanted[k] for k in ("auroc", "auprc", "fprn")],
        )


# --- other labels ---

SUBSETS = texts("label_subsets")
SUBSET_LOGITS = (2 * np.random.RandomState(0).randn(40, 1000)).astype(np.float32)


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r"])
def test_two_hundred_classes(name):
    wanted = SUBSETS[name.replace("-", "_")]
    prediction = wanted["prediction_among_200"]
    found = ev.label_subset_accuracy(SUBSET_LOGITS, np.array(prediction), name)
    assert found.prediction.tolist() == prediction
    close(found.confidence, wanted["renormalised_confidence"])
    assert (found.accuracy, found.images) == (1.0, 40)
    columns = {c for (c,) in ev.subset_columns(name)}
    inside = sum(int(i) in columns for i in SUBSET_LOGITS.argmax(1))
    assert inside == wanted["argmax_of_1000_inside"]


def test_objectnet():
    wanted = SUBSETS["objectnet"]
    logits = ev.subset_logits(torch.from_numpy(SUBSET_LOGITS), "objectnet")
    close(logits.max(1), wanted["max_logit"])
    assert logits.argmax(1).tolist() == wanted["prediction_among_113"]
    assert logits.shape == (40, 113)
    assert sum(len(c) > 1 for c in ev.subset_columns("objectnet")) == 9


def test_sixteen_classes():
    wanted = SUBSETS["sixteen"]
    p = torch.from_numpy(SUBSET_LOGITS).double().softmax(-1)
    assert ev.sixteen_class_decision(p).tolist() == wanted["decision"]
    assert wanted["decision"] != wanted["decision_if_summed_instead"]
    sums = np.stack([p.numpy()[:, list(c)].sum(1) for c in ev.sixteen_classes().values()], 1)
    assert sums.argmax(1).tolist() == wanted["decision_if_summed_instead"]


def test_real():
    guesses = (37 * np.arange(50_000)[:, None] + np.arange(5)) % 1000
    wanted = SUBSETS["real"]
    assert sum(map(bool, ev.real_labels())) == wanted["images_counted"]
    for k, percent in wanted["accuracy_percent"].items():
        close(100 * ev.real_accuracy(guesses[:, : int(k)]), percent)


# --- contrastive and distillation losses, uncertain labels, prompts ---

CONTRAST = texts("contrastive_distill_labels")


def draw(offset):
    return np.random.RandomState(CONTRAST["seed"] + offset)


@pytest.mark.parametrize("t", [1, 10])
def test_contrastive_loss(t):
    z = draw(0).randn(6, 8)
    other = draw(1).randn(6, 8) + z
    z, other = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (z, other))
    wanted = CONTRAST[f"contrastive_t{t}"]
    each = ev.contrastive_loss(z, other, float(t), reduction="none")
    close(each, wanted["per_pair"], 1e-9)
    close(ev.contrastive_loss(z, other, float(t)), np.mean(wanted["per_pair"]), 1e-9)
    assert ev.image_to_text_hits(z, other).tolist() == list(map(bool, wanted["image_to_text_hits"]))


def test_distillation():
    student, teacher = (torch.from_numpy(3 * draw(i).randn(4, 10)) for i in (2, 3))
    for t in (1, 2, 10):
        close(
            ev.distillation_loss(student, teacher, t, reduction="none"), CONTRAST[f"kl_t{t}"], 1e-9
        )
    for k in (1, 5):
        found = ev.teacher_agreement(student, teacher, k).int().tolist()
        assert found == CONTRAST[f"agree_top{k}"]


def test_uncertain_labels():
    q, p = (draw(i).dirichlet(np.ones(6), 5) for i in (4, 5))
    wanted = CONTRAST["label_uncertainty"]
    close(ev.soft_nll(q, p), wanted["soft_nll"], 1e-9)
    close(ev.label_kl(q, p), wanted["kl"], 1e-9)
    close(ev.generalized_energy_distance(q, p), wanted["generalized_energy_distance"], 1e-9)


def test_prompts():
    e = draw(6).randn(9, 4)
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    close(ev.prompt_average(e, [0, 0, 0, 1, 1, 1, 2, 2, 2]), CONTRAST["prompt_average"], 1e-9)
    wanted = CONTRAST["canonicalize"]
    for key, keep in (("plain", ""), ("keep_braces", "{}"), ("keep_comma", ",")):
        assert [ev.canonicalize(text, keep) for text in wanted["texts"]] == wanted[key]


# --- fairness ---


def test_demographic_parity():
    found = arrays("fairness")
    p, label, group = (torch.from_numpy(found[k]) for k in ("probability", "label", "group"))
    wanted = expected(found)
    before, hard = wanted["before"], (p > 0.5)
    close(ev.demographic_parity(hard, group), before["demographic_parity_difference"])
    close(ev.demographic_parity(p, group), before["dp_of_mean_probability"])
    close(ev.demographic_parity(label, group), before["dp_of_labels"])
    close(ev.expected_accuracy(hard, label), before["accuracy"])
    close(list(ev.group_accuracy(hard, label, group).values()), before["accuracy_by_group"])
    for eps in (0.0, 0.05, 0.1):
        after = wanted[f"eps_{eps}"]
        shift = ev.parity_shift(p, group, tolerance=eps, gamma=float(found["gamma"]))
        close(shift.rate, after["rho"])
        close(list(shift.shift.values()), after["shift_by_group"])
        new = shift(p, group)
        close(ev.demographic_parity(new, group), after["dp_after"])
        close(ev.expected_accuracy(new, label), after["expected_accuracy_after"])


# --- segmentation and depth ---

DENSE = arrays("dense")
DENSE_WANTED = expected(DENSE)


def test_segmentation():
    wanted = DENSE_WANTED["segmentation"]
    matrix = sum(
        ev.confusion_matrix(p, y, 7)
        for p, y in zip(DENSE["prediction"], torch.from_numpy(DENSE["label"]), strict=True)
    )
    found = ev.segmentation_scores(matrix)
    close(found.iou[:6], wanted["iou"][:6])
    assert np.isnan(found.iou[6])
    for name in ("mean_iou", "pixel_accuracy", "mean_accuracy"):
        close(getattr(found, name), wanted[name])


@pytest.mark.parametrize(("case", "size", "stride"), [("a", (37, 53), 11), ("b", (16, 40), 16)])
def test_sliding_windows(case, size, stride):
    image = torch.from_numpy(np.random.RandomState(4).randn(1, 3, *size).astype(np.float32))[0]
    at = torch.arange(16) / 16
    factor = 1 + at[:, None] + 2 * at
    anchors = [
        [top, left]
        for top in ev.window_anchors(size[0], 16, stride)
        for left in ev.window_anchors(size[1], 16, stride)
    ]
    assert anchors == DENSE_WANTED[f"window_{case}"]["anchors"]
    found = ev.window_probabilities(lambda crop: crop * factor, image, 16, stride, size)
    close(found, DENSE[f"window_{case}_probability"])


def test_depth():
    wanted = DENSE_WANTED["depth"]
    p, g = (torch.from_numpy(DENSE[f"depth_{k}"]) for k in ("prediction", "label"))
    found = ev.depth_metrics(p, g)
    for name, value in found.items():
        close(value, wanted[name])
    assert set(wanted) - set(found) == {
        "valid", "scale_invariant_log_lambda_0.5", "scale_invariant_log_lambda_1",
        "sigloss_sqrt_var_0.15_eps_0.001",
    }  # fmt: skip
    close(ev.log1p_mse(p, g), wanted["mse_log1p"])
    close(ev.scale_invariant_log(p, g), wanted["scale_invariant_log_lambda_0.5"])
    close(ev.scale_invariant_log(p, g, 1.0), wanted["scale_invariant_log_lambda_1"])
    close(ev.dinov2_depth_loss(p, g), wanted["sigloss_sqrt_var_0.15_eps_0.001"])


# --- humans ---

HUMAN_WANTED = texts("human_alignment")


@pytest.fixture(scope="module")
def humans():
    return ev.read_human_data(HUMANS)


def responses(human):
    i = np.arange(len(human.category))
    found = np.where(i % 5 < 3, human.category, (human.category + 1 + i % 7) % 16)
    return found if human.texture is None else np.where(i % 4 == 1, human.texture, found)


def check(found, wanted):
    assert vars(found) == pytest.approx(wanted, abs=1e-9)


def test_a_model_against_humans(humans):
    scores = {name: ev.align(responses(human), human) for name, human in humans.items()}
    assert len(scores) == 17
    for name, wanted in HUMAN_WANTED["per_dataset"].items():
        check(scores[name], wanted)
    check(ev.mean_alignment(scores), HUMAN_WANTED["mean_over_17"])


def test_humans_among_themselves(humans):
    scores = {name: ev.align_humans(human) for name, human in humans.items()}
    for name, wanted in HUMAN_WANTED["humans"]["per_dataset"].items():
        check(scores[name], wanted)
    found = ev.mean_alignment(scores)
    check(found, HUMAN_WANTED["humans"]["mean_over_17"])
    # The published rows of humans.
    assert found.error_consistency == pytest.approx(0.43, abs=0.005)
    assert found.ood_accuracy == pytest.approx(0.72, abs=0.005)


def test_shape_bias(humans):
    cues = humans["cue-conflict"]
    wanted = HUMAN_WANTED["shape_bias"]
    bias = ev.shape_bias(responses(cues), cues.category, cues.texture)
    assert bias == pytest.approx(wanted["shape-bias"], abs=1e-9)
    biases = [ev.shape_bias(r, cues.category, cues.texture) for r in cues.response]
    assert biases == pytest.approx(HUMAN_WANTED["human_shape_bias"], abs=1e-9)
    assert np.mean(biases) == pytest.approx(0.96, abs=0.005)  # published
