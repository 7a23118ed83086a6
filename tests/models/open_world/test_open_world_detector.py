"""The open-world detector: labels, masks, state, energies, and images without known boxes."""

import copy

import open_world_cases as cases
import pytest
import timm
import torch
from torchvision.ops import box_iou

from mesa_train.models.dense import plain_vit
from mesa_train.models.open_world import (
    ContrastiveClustering,
    OpenWorldRules,
    Weibull,
    contrastive_clustering_loss,
    fit_energies,
    open_world_rcnn,
    select_exemplars,
)
from mesa_train.models.open_world.heads import HIDDEN


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return cases.detector()


def test_confident_background_is_labelled_unknown_and_true_objects_stay(model):
    heads, seen = model.heads, {}

    def spy(x, classes):
        seen["classes"] = classes
        return x.sum() * 0

    model.eval()
    torch.manual_seed(0)
    images, targets = cases.batch((2, 0))
    model.train()
    heads.clustering.forward = spy
    losses = model(images, targets)
    del heads.clustering.forward
    assert all(loss.isfinite() for loss in losses.values())
    per_image = seen["classes"].split([16, 16])
    known = set(targets[0]["labels"].tolist())
    for classes, expected in zip(per_image, (known, set()), strict=True):
        assert classes.eq(model.unknown).sum() == 2
        assert set(classes.tolist()) - {model.unknown, heads.background} == expected


def test_classes_that_are_not_learnt_get_no_gradient_and_are_not_detected(model):
    model.zero_grad()
    sum(model(*cases.batch()).values()).backward()
    scores = model.heads.box_predictor.cls_score.weight.grad
    assert not scores[3:6].any()
    assert scores[[0, 1, 2, 6, 7]].abs().amax(1).min() > 0
    model.eval()
    with torch.no_grad():
        labels = model(cases.batch((1, 1))[0])[0]["labels"]
    model.train()
    assert set(labels.tolist()) <= {0, 1, 2, 6}
    hidden = model.heads.hidden(torch.zeros(1, 8))[0]
    assert torch.equal(hidden, torch.tensor([0, 0, 0, HIDDEN, HIDDEN, HIDDEN, 0, 0]))


@pytest.mark.parametrize("boxes", ["proposal", "none", "nearest"])
def test_box_targets_of_unknowns(boxes):
    """Without a known box, the nearest one is empty and its target infinite."""
    torch.manual_seed(0)
    rules = OpenWorldRules(unknown_boxes=boxes)
    model = open_world_rcnn("litv2_tiny", 3, rules=rules, min_size=96, max_size=128, channels=256)
    heads = model.heads
    found = {}
    heads.box_losses = lambda logits, deltas, classes, positive, wanted: (
        found.update(classes=classes, positive=positive, wanted=wanted)
        or {"loss": logits.sum() * 0}
    )
    proposals = [torch.tensor([[0.0, 0, 30, 30], [5, 5, 60, 60]])] * 2
    maps = {str(i): torch.rand(2, 256, 24 >> i, 24 >> i) for i in range(4)}
    labels = [torch.tensor([1, 3]), torch.tensor([4, 3])]
    empty = torch.tensor([[float("-inf")] * 4] * 2)
    heads.clusters = False
    heads.losses(maps, proposals, [], labels, [torch.ones(2, 4), empty], [])
    expected = {"proposal": [0, 1, 3], "none": [0], "nearest": [0, 1]}[boxes]
    assert found["positive"].tolist() == expected
    assert found["wanted"][found["positive"]].isfinite().all()
    assert found["wanted"][1].tolist() == [0.0 if boxes == "proposal" else 1.0] * 4


def test_the_state_survives_a_checkpoint_and_the_next_task_keeps_queues(model):
    other = cases.detector()
    model(*cases.batch())
    model.heads.identifier.set("known_tail", known=Weibull(2.0, 3.0, 1.0), tail=0.1)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(other.heads.clustering.queue, model.heads.clustering.queue)
    assert other.heads.clustering.steps == model.heads.clustering.steps > 0
    assert other.heads.clustering.prototypes.any()
    assert other.heads.identifier.mode == "known_tail"
    assert other.heads.identifier.known == Weibull(2.0, 3.0, 1.0)
    torch.manual_seed(0)
    inputs = cases.batch()
    losses = []
    for each in (model, other):
        torch.manual_seed(1)
        losses.append({k: v.item() for k, v in each(*inputs).items()})
    assert losses[0] == losses[1]
    other.start_task(2)
    assert (other.seen, int(other.heads.previous)) == (5, 3)
    assert other.heads.identifier.mode == "off"
    assert other.heads.clustering.queue.any()
    assert not other.heads.clustering.present.any()
    for wrong in (0, 2):
        with pytest.raises(ValueError, match="1 to 1"):
            other.start_task(wrong)


def test_labels_of_a_later_task_are_refused(model):
    images, targets = cases.batch((1, 1))
    targets[1]["labels"] = torch.tensor([4])
    with pytest.raises(ValueError, match=r"targets\[1\].*class 4.*3 classes are known"):
        model(images, targets)


def test_a_fit_changes_no_state_and_low_energies_become_unknown(model):
    batches = [cases.batch((6, 6)) for _ in range(3)]
    before = copy.deepcopy(model.state_dict())
    fits = fit_energies(model, batches, tail=0.5, samples="proposals")
    for name, value in model.state_dict().items():
        if "identifier" not in name:
            assert torch.equal(value, before[name]), name
    assert model.training
    identifier = model.heads.identifier
    logits = torch.zeros(2, 8)
    logits[0, :3] = fits["known"].quantile(0.9)
    labels = identifier(torch.tensor([1, 1]), logits, model.seen, model.unknown)
    assert labels.tolist() == [1, model.unknown]
    identifier.set("off")
    assert identifier(torch.tensor([1, 1]), logits, 3, 6).tolist() == [1, 1]
    with pytest.raises(ValueError, match="unknown energies"):
        identifier.set("two_fits", known=fits["known"])


def test_a_late_class_gets_the_mean_of_its_queue():
    x = torch.randn(4, 8)
    labels = torch.tensor([0, 0, 1, 3])
    late, official = (
        ContrastiveClustering(4, 8, OpenWorldRules(start=0, queue_size=2, late_prototypes=late))
        for late in (True, False)
    )
    for clustering in (late, official):
        clustering(x[:2], labels[:2])
        clustering(x[2:], labels[2:])
    assert torch.equal(late.prototypes[1], x[2])
    assert late.present.tolist() == [True, True, False, True]
    assert not official.prototypes[1].any()


def test_the_newest_features_stay_in_a_full_queue():
    clustering = ContrastiveClustering(2, 1, OpenWorldRules(queue_size=3))
    for start, count in ((0, 2), (2, 5), (7, 1)):
        values = torch.arange(start, start + count, dtype=torch.float32)[:, None]
        clustering.enter(values, torch.zeros(count, dtype=torch.int64))
    assert sorted(clustering.queue[0, :, 0].tolist()) == [5, 6, 7]
    assert clustering.length.tolist() == [3, 0]


def test_scaled_features_have_one_norm():
    clustering = ContrastiveClustering(2, 16, OpenWorldRules(feature_scale="sqrt_dim"))
    norms = clustering.scaled(torch.randn(5, 16) * 100).norm(dim=1)
    assert torch.allclose(norms, torch.full((5,), 4.0))


def test_the_clustering_loss_by_hand():
    features = torch.tensor([[3.0, 4.0], [0.0, 1.0]], requires_grad=True)
    prototypes = torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 9.0]])
    loss = contrastive_clustering_loss(features, torch.tensor([0, 2]), prototypes, margin=6.0)
    # Distances of the first feature: 5, 18 ** 0.5, 61 ** 0.5. The second feature is background.
    assert loss.item() == pytest.approx((5 + 6 - 18**0.5) / 3)
    loss.backward()
    assert not features.grad[1].any()
    with pytest.raises(ValueError, match="euclidean, minkowski10"):
        contrastive_clustering_loss(features, torch.tensor([0, 2]), prototypes, distance="cosine")


def test_exemplars_have_every_class_and_do_not_depend_on_the_order_of_classes():
    labels = {f"{i:03d}": [i % 3, 3] if i % 5 == 0 else [i % 3] for i in range(100)}
    chosen = select_exemplars(labels, range(3), 5)
    counts = [sum(labels[name].count(c) for name in chosen) for c in range(3)]
    assert min(counts) >= 5
    assert len(chosen) <= 15
    assert chosen == select_exemplars(labels, [2, 1, 0], 5)
    assert chosen != select_exemplars(labels, range(3), 5, seed=1)
    rare = select_exemplars({"a": [0], "b": [1], "c": [0]}, [0, 1], 2)
    assert rare == ["a", "b", "c"]


def test_wrong_rules_are_refused():
    for options, word in (
        ({"distance": "cosine"}, "euclidean, minkowski10"),
        ({"queue_size": 0}, "queue_size"),
        ({"momentum": 2.0}, "momentum"),
        ({"unknowns_per_image": -1}, "unknowns_per_image"),
    ):
        with pytest.raises(ValueError, match=word):
            OpenWorldRules(**options)
    with pytest.raises(ValueError, match="default, paper, official_code"):
        open_world_rcnn("litv2_tiny", 3, rules="ore")
    assert OpenWorldRules.official_code().hinge == 2
    assert OpenWorldRules.paper().hinge == 10


def test_two_images_at_once_have_the_detections_of_each_alone(model):
    """The official code mixes logits and box deltas of several images."""
    torch.manual_seed(0)
    images, _ = cases.batch((1, 1), ((96, 128),) * 2)
    model.heads.identifier.set("known_tail", known=Weibull(0.5, 2.0, 0.9), tail=0.5)
    model.eval()
    with torch.no_grad():
        both = model(images)
        alone = [model([image])[0] for image in images]
    model.train()
    model.heads.identifier.set("off")
    for found, expected in zip(both, alone, strict=True):
        assert len(found["labels"]) > 0
        assert found["labels"].tolist() == expected["labels"].tolist()
        assert torch.allclose(found["boxes"], expected["boxes"], atol=1e-2)
        assert torch.allclose(found["scores"], expected["scores"], atol=1e-5)


def test_other_backbones():
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", depth=2, embed_dim=32, num_heads=2, img_size=64, num_classes=0
    )
    for backbone in ("resnet10t", plain_vit(vit, window=3, global_blocks=1)):
        other = cases.detector(backbone)
        for _ in range(2):
            losses = other(*cases.batch((2, 0)))
        assert all(loss.isfinite() for loss in losses.values())
        assert losses["loss_clustering"] > 0


def test_energies_of_detections_that_match_annotated_boxes(model):
    torch.manual_seed(0)
    images = cases.batch((1, 1))[0]
    model.eval()
    with torch.no_grad():
        found = model(images)
    model.train()
    chosen = [int(torch.where(output["labels"] < 3)[0][0]) for output in found]

    def targets(labels):
        boxes = [output["boxes"][i][None] for output, i in zip(found, chosen, strict=True)]
        return [
            {"boxes": b, "labels": torch.tensor([n])} for b, n in zip(boxes, labels, strict=True)
        ]

    def counts(labels):
        return [len(x) for x in model.energies([(images, targets(labels))])]

    def close(output, index):
        return box_iou(output["boxes"], output["boxes"][index][None])[:, 0] > 0.5

    own = [int(output["labels"][i]) for output, i in zip(found, chosen, strict=True)]
    near = [close(output, i) for output, i in zip(found, chosen, strict=True)]
    right = sum(
        int((n & (o["labels"] == c)).sum()) for n, o, c in zip(near, found, own, strict=True)
    )
    pseudo = sum(int((~n & (o["labels"] == 6)).sum()) for n, o in zip(near, found, strict=True))
    assert right >= 2
    assert counts(own) == [right, pseudo]
    # Annotated unknown objects replace pseudo-unknowns.
    assert counts([6, 6]) == [0, sum(int(n.sum()) for n in near)]
    energies, _ = model.energies([(images, targets(own))])
    assert model.training
    assert model.heads.decides
    assert energies.isfinite().all()
    with pytest.raises(ValueError, match="detections, proposals"):
        model.energies([], samples="regions")
    with pytest.raises(ValueError, match="at least one batch"):
        model.energies([])
