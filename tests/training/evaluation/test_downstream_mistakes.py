"""Usual mistakes of the metrics, each with a case by hand that it would fail; and bad input."""

import numpy as np
import pytest
import torch
from PIL import Image

from mesa_train.training import evaluation as ev

RNG = np.random.default_rng(0)


# --- few-shot and nearest neighbours ---


def test_one_generator_draws_all_classes():
    labels = np.repeat([0, 1], 50)
    drawn = ev.fewshot_indices(labels, 5, seed=3)
    fresh = np.random.default_rng(3).permutation(np.arange(50, 100))[:5]
    assert drawn[5:].tolist() != fresh.tolist()  # a generator for each class would draw these
    assert ev.fewshot_indices(labels, 10, seed=3)[:5].tolist() == drawn[:5].tolist()
    assert ev.fewshot_indices(labels, 80, seed=3).shape == (100,)  # all that there are


def test_test_features_are_standardised_by_the_training_features():
    x, y = RNG.normal(size=(40, 3)), np.repeat([0, 1], 20)
    x[:, 0] += 3 * y
    (fitted,) = ev.fit_ridge(x, y, 1.0)
    shifted = fitted.scores(x + 100.0)
    assert np.abs(shifted - fitted.scores(x)).max() > 1


def test_no_number_of_neighbours_is_one_line():
    with pytest.raises(ValueError, match="k must hold at least one number of neighbours, got none"):
        ev.knn(np.eye(3), [0, 1, 2], np.eye(3), [])


def test_votes_are_weighted_by_similarity():
    train = np.array([[1.0, 0], [0.6, 0.8], [0.6, 0.8]])
    # One close neighbour of class 0 outvotes two far ones of class 1, but not at a high temperature.
    assert ev.knn(train, [0, 1, 1], [[1.0, 0]], 3).tolist() == [0]
    assert ev.knn(train, [0, 1, 1], [[1.0, 0]], 3, temperature=100.0).tolist() == [1]
    # Cosine, not the dot product: a long vector is no closer.
    assert ev.knn([[1.0, 0.1], [50, 50]], [0, 1], [[1.0, 0]], 1).tolist() == [0]


# --- calibration ---


def test_a_confidence_of_one_is_in_the_last_bin():
    p = np.array([[1.0, 0], [0.99, 0.01]])
    # Together: accuracy 0.5, confidence 0.995. In bins of their own: sqrt(0 + 0.5 * 0.99^2).
    assert ev.expected_calibration_error(p, [0, 1], norm="l2") == pytest.approx(0.495)


def test_a_confidence_on_an_edge_belongs_to_the_upper_bin():
    p = np.array([[0.5, 0.5], [0.6, 0.4]])
    together = ev.expected_calibration_error(p, [0, 1], bins=2)
    assert together == pytest.approx(abs(0.5 - 0.55))


def test_the_brier_score_is_summed_over_classes():
    assert ev.brier([[0.0, 1.0]], [0]) == 2.0


def test_the_temperature_sharpens_a_modest_model_and_softens_a_sure_one():
    right = np.array([[1.0, 0]] * 9 + [[0, 1.0]])
    modest, sure = (ev.temperature(scale * right, [0] * 10) for scale in (0.1, 10.0))
    assert modest < 1 < sure
    assert modest * 100 == pytest.approx(sure, rel=1e-4)
    assert sure == pytest.approx(10 / np.log(9), rel=1e-4)


def test_sigmoids_are_scored_as_they_are():
    p = ev.sigmoid_confidences(torch.tensor([[2.0, 2.0], [2.0, -2.0]]))
    assert ev.expected_calibration_error(p, [0, 0]) == pytest.approx(1 - 1 / (1 + np.exp(-2)))


# --- selective prediction ---

SURE = np.array([0.9, 0.8, 0.7, 0.6])
PAIRS = np.stack([SURE, 1 - SURE], 1)


def test_risk_is_the_mean_over_all_coverages():
    # Wrong at the second and the fourth: risks 0, 1/2, 1/3, 1/2.
    found = ev.area_under_risk_coverage(PAIRS, [0, 1, 0, 1])
    assert found == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)


def test_coverage_rounds_up_and_the_oracle_down():
    assert ev.selective_accuracy(PAIRS, [0, 1, 0, 1], 0.3) == [0.5]  # 2 of 4, not 1
    assert ev.oracle_collaborative_accuracy(PAIRS, [0, 1, 0, 1], 0.49) == [0.75]  # 1 of 4
    wide = np.tile(PAIRS[:1], (100, 1))
    labels = np.r_[np.zeros(7, int), 1, np.zeros(92, int)]
    # 0.07 * 100 is a little above 7 in floating point, and 0.29 * 100 a little below 29.
    assert ev.selective_accuracy(wide, labels, 0.07) == [1.0]
    assert ev.oracle_collaborative_accuracy(wide, np.ones(100, int), 0.29) == [0.29]


# --- images from outside ---


def test_the_covariance_is_shared_and_divides_by_n():
    train = np.array([[0.0], [2.0], [10.0], [12.0]])
    scores = ev.ood_scores([[1.0, 0]], [[4.0]], train, [0, 0, 1, 1])
    assert scores["maha"] == pytest.approx([9.0])  # (4 - 1)^2 / 1: squared, and of the nearer class
    assert scores["rmaha"] == pytest.approx([9.0 - (4 - 6) ** 2 / 26])
    assert scores["mlogit"] == pytest.approx([0.0])


def test_outside_is_positive_and_the_threshold_the_first():
    found = ev.detection_metrics([0.0, 1, 2, 3], [2.5, 4, 5, 6])
    assert found["auroc"] == pytest.approx(15 / 16)
    assert found["fpr95"] == 0.25
    assert ev.detection_metrics([2.5, 4, 5, 6], [0.0, 1, 2, 3])["auroc"] == pytest.approx(1 / 16)


# --- other labels ---


def test_folders_of_v2_are_numbers():
    folders = ev.subset_folders("imagenet-v2")
    assert folders[2] == "2"
    assert sorted(folders)[2] == "10"  # what a sorted folder would give
    logits = np.eye(1000, dtype=np.float32)[[2, 10]]
    assert ev.label_subset_accuracy(logits, [2, 10], "imagenet-v2").accuracy == 1.0


def test_classes_outside_a_subset_are_no_answers():
    (first,), (second,) = ev.subset_columns("imagenet-a")[:2]
    assert (0,) not in ev.subset_columns("imagenet-a")  # the tench
    logits = np.zeros((1, 1000))
    logits[0, 0], logits[0, second], logits[0, first] = 9.0, 5.0, 4.0
    found = ev.label_subset_accuracy(logits, [1], "imagenet-a")
    assert found.accuracy == 1.0
    # Renormalised over 200 classes, of which 198 have the logit 0.
    kept = np.exp([5.0, 4.0])
    assert found.confidence == pytest.approx([kept[0] / (kept.sum() + 198)])


def test_a_folder_of_objectnet_has_the_logit_of_its_best_class():
    at = ev.subset_folders("objectnet").index("chair")
    columns = ev.subset_columns("objectnet")[at]
    assert columns == (423, 559, 765)
    logits = np.zeros((1, 1000))
    # The mean of the three would be 1, and the sum would beat the stool of 4.
    logits[0, 765], logits[0, 409] = 3.0, 2.0
    assert ev.subset_logits(logits, "objectnet")[0, at] == 3.0
    assert ev.label_subset_accuracy(logits, [at], "objectnet").accuracy == 1.0


def test_the_border_of_objectnet_goes_before_the_resize():
    pixels = np.zeros((14, 10, 3), np.uint8)
    pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:] = 255, 255, 255, 255
    cut = ev.objectnet_crop(Image.fromarray(pixels))
    assert cut.size == (6, 10)
    assert not np.asarray(cut).any()
    assert not ev.objectnet_crop(torch.from_numpy(pixels).permute(2, 0, 1)).any()
    with pytest.raises(ValueError, match="4x9 pixels has no inside"):
        ev.objectnet_crop(torch.zeros(3, 9, 4))


def test_a_and_objectnet_keep_the_aspect():
    assert ev.resize_rule("imagenet-a", 224) == ("short side", 299)
    assert ev.resize_rule("objectnet", 224) == ("short side", 299)
    assert ev.resize_rule("imagenet-r", 224) == ("square", 256)


def test_images_without_a_real_label_are_left_out():
    labels = [[1, 2], [], [0]]
    logits = np.array([[0, 0, 5.0], [0, 5, 0], [0, 5, 0]])
    found = ev.label_subset_accuracy(logits, labels, "real")
    assert (found.accuracy, found.images) == (0.5, 2)
    assert ev.real_accuracy([[1], [1], [1]], labels) == 0.5
    assert ev.real_accuracy([[1, 0], [1, 0], [1, 0]], labels) == 1.0


# --- losses ---


def test_both_directions_of_the_contrastive_loss_count():
    z = torch.eye(2, dtype=torch.float64)
    t = torch.tensor([[1.0, 0], [1.0, 0]], dtype=torch.float64)
    one = torch.nn.functional.cross_entropy(z @ t.T, torch.arange(2))
    other = torch.nn.functional.cross_entropy(t @ z.T, torch.arange(2))
    assert one != other
    assert ev.contrastive_loss(z, t, 1.0) == (one + other) / 2


def test_the_sigmoid_loss_sums_over_texts():
    z = torch.eye(2, dtype=torch.float64)
    s = torch.nn.functional.logsigmoid
    wanted = -(s(torch.tensor(8.0)) + s(torch.tensor(2.0)))
    assert ev.sigmoid_contrastive_loss(z, z, 10.0, -2.0) == pytest.approx(wanted.item())


def test_the_divergence_is_of_the_student_from_the_teacher():
    student = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[2.0, 0]], dtype=torch.float64, requires_grad=True)
    p = torch.softmax(teacher.detach(), 1)
    wanted = (p * (p.log() - np.log(0.5))).sum()
    loss = ev.distillation_loss(student, teacher)
    assert loss.item() == pytest.approx(wanted.item())
    loss.backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_gradients_of_the_distillation_loss_do_not_shrink_with_the_temperature():
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.manual_seed(0))
    norms = []
    for t in (1e3, 1e4):
        s = student.clone().requires_grad_()
        ev.distillation_loss(s, teacher, t).backward()
        norms.append(s.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)


def test_the_loss_of_sigmoids_is_least_at_the_teacher():
    teacher = torch.randn(3, 4, dtype=torch.float64, generator=torch.manual_seed(0))
    assert ev.sigmoid_distillation_loss(teacher, teacher).abs() < 1e-12
    one = ev.sigmoid_distillation_loss([[0.0]], [[2.0]], reduction="none")
    p = 1 / (1 + np.exp(-2))
    wanted = p * np.log(p / 0.5) + (1 - p) * np.log((1 - p) / 0.5)
    assert one.tolist() == pytest.approx([wanted])


# --- fairness ---


def test_parity_is_of_means_by_group():
    # 3 of 4 against 1 of 2: groups of other sizes.
    assert ev.demographic_parity([1, 1, 1, 0, 1, 0], list("aaaabb")) == pytest.approx(0.25)


def test_groups_within_the_tolerance_are_not_shifted():
    # All scores saturate, so that the unshifted ramp gives 0 or 1.
    p, group = np.array([0.9, 0.1, 0.9, 0.1]), np.array([0, 0, 1, 1])
    shift = ev.parity_shift(p, group)
    assert shift.shift == {0: 0.0, 1: 0.0}
    with pytest.raises(ValueError, match="group 2 is unknown; the shifts are for 0, 1"):
        shift(p, [0, 0, 2, 2])


# --- segmentation and depth ---


def test_iou_is_that_of_the_whole_set_without_absent_classes():
    labels = [np.array([0, 0, 0, 1]), np.array([1, 255, 255, 255])]
    guesses = [np.array([0, 0, 1, 1]), np.array([0, 0, 0, 0])]
    matrix = sum(ev.confusion_matrix(p, y, 3) for p, y in zip(guesses, labels, strict=True))
    found = ev.segmentation_scores(matrix)
    assert found.iou[:2].tolist() == [2 / 4, 1 / 3]
    assert np.isnan(found.iou[2])  # 0 would lower the mean
    assert found.mean_iou == pytest.approx((2 / 4 + 1 / 3) / 2)
    assert found.pixel_accuracy == 3 / 5


def test_softmax_comes_after_the_mean_of_logits():
    seen = []

    def model(crop):
        seen.append(crop)
        return torch.cat([crop * 0, crop * 0 + len(seen) ** 2], 1)

    found = ev.sliding_window_logits(model, torch.zeros(1, 2, 3), 2, 1)
    assert found[1].tolist() == [[1, 2.5, 4]] * 2
    resized = ev.window_probabilities(model, torch.zeros(1, 2, 2), 2, 2, (4, 4))
    assert resized.sum(0).allclose(torch.ones(4, 4))


def test_depth_metrics_are_of_all_pixels():
    depth, guess = np.array([[1.0, 0], [1, 1]]), np.array([[2.0, 7], [1, 1]])
    found = ev.depth_metrics(guess, depth)
    assert found["abs_rel"] == pytest.approx(1 / 3)  # the mean of the rows would be 1/2
    assert found["delta_1.25"] == pytest.approx(2 / 3)
    assert ev.depth_metrics([0.5], [1.0])["delta_1.25"] == 0  # either direction


# --- humans ---


def human_set(**changes):
    given = {
        "response": np.array([[0, 1, 16, 1]]),
        "category": np.array([0, 1, 0, 0]),
        "condition": np.array([0, 0, 1, 1]),
        "conditions": ("easy", "hard"),
        "left_out": (),
        "image_id": np.array([b""] * 4),
    }
    return ev.HumanSet(**given | changes)


def test_no_answer_is_wrong_and_conditions_weigh_alike():
    found = ev.align([0, 1, 0, 0], human_set())
    assert found.observed_consistency == pytest.approx((1.0 + 0.0) / 2)
    assert found.accuracy_difference == pytest.approx((0 + 1) / 2)
    # Pooled over conditions, the difference of accuracies would be (1 - 1/2)^2.
    assert found.error_consistency == pytest.approx((1.0 + 0.0) / 2)
    assert found.ood_accuracy == 1.0


def test_conditions_that_are_left_out_do_not_count():
    found = ev.align([0, 1, 3, 3], human_set(left_out=("hard",)))
    assert (found.ood_accuracy, found.observed_consistency) == (1.0, 1.0)


def test_error_consistency_is_beyond_chance():
    a, b = np.array([1, 1, 0, 0]), np.array([1, 0, 1, 0])
    assert ev.observed_consistency(a, b) == 0.5
    assert ev.error_consistency(a, b) == 0.0
    assert ev.error_consistency(a, a) == 1.0
    assert ev.error_consistency([1, 1], [1, 1]) == 1.0  # 0 / 0 by the formula
    assert ev.error_consistency(a, 1 - a) == -1.0
    assert ev.accuracy_difference([1, 1], [0, 1, 0, 0]) == 0.75**2


def test_images_without_a_conflict_do_not_count():
    assert ev.shape_bias([0, 0, 1], [0, 0, 2], [0, 1, 1]) == 0.5
    assert np.isnan(ev.shape_bias([5], [0], [1]))


# --- bad input ---

BAD = [
    (lambda: ev.expected_calibration_error([[2.0, -1]], [0]), "logits need a softmax first"),
    (lambda: ev.expected_calibration_error([[0.5, 0.5]], [2]), r"labels must lie between 0 and 1"),
    (lambda: ev.expected_calibration_error([[1.0]], [0], norm="l3"), "norm must be one of l1, l2"),
    (lambda: ev.expected_calibration_error([[1.0]], [0], bins=0), "bins must be at least 1"),
    (lambda: ev.brier([[0.5, np.nan]], [0]), "probabilities holds values that are not finite"),
    (lambda: ev.brier(np.zeros((0, 2)), []), "probabilities is empty"),
    (lambda: ev.brier([[0.5, 0.5]], [0.5]), "labels must hold whole numbers"),
    (lambda: ev.knn([[1.0]], [0], [[1.0]], 2), "k=2 must lie between 1 and the 1"),
    (lambda: ev.knn([[1.0]], [0], [[1.0, 2]], 1), "width 1, test_features 2"),
    (lambda: ev.fewshot_indices([0, 2], 1, 0), "no image of class 1"),
    (lambda: ev.fewshot_indices([0], 0, 0), "shots must be at least 1"),
    (lambda: ev.fit_ridge([[1.0]], [0], -1.0), "l2 must be positive"),
    (lambda: ev.selective_accuracy(PAIRS, [0] * 4, 0.0), r"coverage must lie in \(0, 1\]"),
    (lambda: ev.ood_scores([[1.0]], [[1.0]]), "must be given together"),
    (lambda: ev.subset_logits(np.zeros((1, 10)), "imagenet-a"), r"\(N, 1000\), got \(1, 10\)"),
    (lambda: ev.subset_columns("imagenet-c"), "one of imagenet-a, imagenet-r"),
    (lambda: ev.demographic_parity([1, 0], [0, 0]), "at least 2 groups"),
    (lambda: ev.demographic_parity([2, 0], [0, 1]), r"lie in \[0, 1\]"),
    (lambda: ev.parity_shift([0.5, 0.5], [0, 1], gamma=0), "gamma must be positive"),
    (lambda: ev.confusion_matrix([7], [0], 3), "prediction must lie between 0 and 2"),
    (lambda: ev.window_anchors(10, 16, 4), "does not fit a side of 10"),
    (lambda: ev.depth_metrics([1.0], [0.0]), "no valid pixel"),
    (lambda: ev.distillation_loss([[1.0]], [[1.0]], 0.0), "temperature must be positive"),
    (lambda: ev.soft_nll([[0.5, 0.1]], [[0.5, 0.5]]), "rows of labels must be probabilities"),
    (lambda: ev.contrastive_loss([[1.0]], [[1.0]], 1, reduction="sum"), "one of mean, none"),
    (lambda: ev.prompt_average([[1.0]], [1]), "give each class a prompt"),
    (lambda: ev.sixteen_class_decision([[0.1]]), "1000 columns, got 1"),
    (lambda: ev.error_consistency([0, 2], [0, 1]), "correct_a must hold only 0 and 1"),
    (lambda: ev.read_human_data("no/such.npz"), "no file no/such.npz with human responses"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_other_files_are_no_human_responses(tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(b"PK not")
    with pytest.raises(ValueError, match="holds no human responses"):
        ev.read_human_data(path)
    np.savez(path, x=1)
    with pytest.raises(ValueError, match="holds no human responses"):
        ev.read_human_data(path)
