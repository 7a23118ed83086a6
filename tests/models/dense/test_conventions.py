"""Where the reference and torchvision differ: the option of torchvision computes as torchvision does."""

import dataclasses

import pytest
import scenes
import torch
from torchvision.models.detection import _utils as detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss, project_masks_on_boxes
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, box_iou, roi_align

from mesa_train.models.dense import Conventions, from_official, mask_rcnn, retinanet
from mesa_train.models.dense.boxes import Anchors, Matcher
from mesa_train.models.dense.inputs import MEAN, STD, ImageTransform
from mesa_train.models.dense.necks import P6P7
from mesa_train.models.dense.retinanet import STRIDES
from mesa_train.models.dense.roi_heads import RoIPool

TORCHVISION = Conventions.torchvision()


def boxes(count, size=100.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * size * 0.6
    side = torch.rand(count, 2, generator=generator) * size * 0.35 + 2
    return torch.cat([corner, corner + side], 1)


def test_unknown_values_are_named():
    with pytest.raises(ValueError, match="anchor_strides must be one of fixed, image, got 'half'"):
        Conventions(anchor_strides="half")
    with pytest.raises(ValueError, match="conventions must be 'reference', 'torchvision'"):
        retinanet("litv2_tiny", conventions="detectron")


def test_every_option_differs_from_torchvisions():
    reference = dataclasses.asdict(Conventions())
    assert not [k for k, v in dataclasses.asdict(TORCHVISION).items() if reference[k] == v]


def test_relu_before_p7():
    torch.manual_seed(0)
    maps = [torch.randn(1, 8, 5, 5)]
    plain, relu = P6P7(8, 8), P6P7(8, 8, relu=True)
    relu.load_state_dict(plain.state_dict())
    p6, p7 = plain(maps, maps, ["0"])[0][1:]
    assert torch.equal(p7, plain.p7(p6))
    assert torch.equal(relu(maps, maps, ["0"])[0][2], plain.p7(p6.relu()))


def test_anchors():
    sizes = [[4 * s, 5 * s] for s in STRIDES]
    # 800 pixels give maps of 100, 50, 25, 13 and 7: the last two are not 800 / stride.
    maps = [torch.zeros(1, 1, -(-800 // s), -(-800 // s)) for s in STRIDES]
    images = ImageList(torch.zeros(1, 3, 800, 800), [(800, 800)])
    theirs = AnchorGenerator(tuple(map(tuple, sizes)), ((0.5, 1.0, 2.0),) * 5)(images, maps)[0]
    ours = Anchors(sizes, rounded=True)(images, maps)[0]
    assert torch.equal(ours, theirs)
    fixed = Anchors(sizes, strides=STRIDES)(images, maps)[0]
    assert (ours[0] - fixed[0]).abs().max() <= 0.5
    # Centres of the last anchor of the last level: 7 x 7 anchors at 114 or at 128 pixels.
    centres = [(a[-1, :2] + a[-1, 2:]).tolist() for a in (ours, fixed)]
    assert centres == [[12 * 114.0] * 2, [12 * 128.0] * 2]
    half = [x.half() for x in maps]
    assert Anchors(sizes, strides=STRIDES)(images, half)[0].dtype == torch.float32


def test_low_quality_matches():
    ious = box_iou(
        torch.cat([boxes(6), torch.tensor([[900.0, 900, 950, 950]])]), boxes(200, seed=1)
    )
    for rows in (ious[:6], ious):
        theirs = detection.Matcher(0.7, 0.3, allow_low_quality_matches=True)(rows.clone())
        assert torch.equal(Matcher(0.7, 0.3, 0.0, "best")(rows), theirs)
    theirs = detection.Matcher(0.5, 0.5)(ious.clone())
    assert torch.equal(Matcher(0.5, 0.5, None)(ious), theirs)
    # The last box overlaps nothing: without a smallest IoU every anchor is positive.
    assert (Matcher(0.7, 0.3, 0.0, "best")(ious) >= 0).all()
    assert (Matcher(0.7, 0.3, 0.3)(ious) >= 0).sum() < 20
    assert Matcher(0.7, 0.3)(ious[:0]).eq(-1).all()
    assert Matcher(0.7, 0.3)(ious[:, :0]).shape == (0,)


def test_region_pooling():
    torch.manual_seed(0)
    maps = {str(i): torch.randn(2, 3, 256 // s, 256 // s) for i, s in enumerate((4, 8, 16, 32))}
    regions = [boxes(20, 1200.0), boxes(30, 800.0, seed=2)]
    theirs = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)(maps, regions, [(256, 256)] * 2)
    pool = RoIPool(7, (4, 8, 16, 32), aligned=False, sampling_ratio=2)
    levels = pool.levels(torch.cat(regions))
    assert set(levels.tolist()) >= {0, 1, 2}
    assert torch.equal(pool(maps, regions), theirs)
    rois = torch.tensor([[1.0, 10.3, 20.2, 60.8, 55.1]])
    expected = roi_align(maps["0"], rois, 7, 1 / 4, -1, True)
    ours = RoIPool(7, (4, 8, 16, 32), aligned=True, sampling_ratio=0)
    assert torch.equal(ours(maps, [rois[:0, 1:], rois[:, 1:]]), expected)
    empty = [rois[:0, 1:]] * 2
    assert ours(maps, empty).shape == (0, 3, 7, 7)
    sides = torch.tensor([1.0, 111.9, 112.1, 223.0, 225.0, 449.0, 2000.0])
    squares = torch.stack([0 * sides, 0 * sides, sides, sides], 1)
    assert ours.levels(squares).tolist() == [0, 0, 1, 1, 2, 3, 3]


def test_mask_targets():
    rules = dataclasses.replace(Conventions(), roi_aligned=False, mask_target_threshold=None)
    heads = [scenes.detector("mask_rcnn", conventions=r).roi_heads for r in (rules, Conventions())]
    masks = (torch.rand(3, 100, 100) > 0.5).byte()
    regions, indices = boxes(5), torch.tensor([0, 2, 1, 1, 0])
    theirs = project_masks_on_boxes(masks, regions, indices, 28)
    assert torch.equal(heads[0].mask_targets(masks, regions, indices), theirs)
    ours = heads[1].mask_targets(masks, regions, indices)
    rois = torch.cat([indices[:, None].float(), regions], 1)
    aligned = roi_align(masks[:, None].float(), rois, 28, aligned=True)[:, 0]
    assert torch.equal(ours, (aligned >= 0.5).float())
    assert ours.unique().tolist() == [0, 1]


def test_box_losses():
    torch.manual_seed(0)
    heads = scenes.detector("faster_rcnn", conventions=TORCHVISION).roi_heads
    logits, deltas = torch.randn(30, 6), torch.randn(30, 24)
    classes, wanted = torch.randint(0, 6, (30,)), torch.randn(30, 4)
    positive = torch.where(classes > 0)[0]
    ours = heads.box_losses(logits, deltas, classes, positive, wanted)
    assert list(ours.values()) == list(fastrcnn_loss(logits, deltas, [classes], [wanted]))
    reference = scenes.detector("faster_rcnn").roi_heads
    # The same samples with the background last: the loss is L1.
    last = (classes - 1) % 6
    l1 = reference.box_losses(logits.roll(-1, 1), deltas[:, 4:], last, positive, wanted)
    expected = (deltas.view(30, 6, 4)[positive, classes[positive]] - wanted[positive]).abs().sum()
    assert l1["loss_box_reg"].item() == pytest.approx(expected.item() / 30, rel=1e-6)
    assert l1["loss_classifier"].item() == pytest.approx(ours["loss_classifier"].item(), rel=1e-6)


def test_the_rpns_box_loss_and_proposals():
    torch.manual_seed(0)
    ours, theirs = (
        scenes.detector("faster_rcnn", conventions=c).rpn for c in ("reference", TORCHVISION)
    )
    logits, deltas, wanted = torch.randn(50, 1), torch.randn(50, 4), torch.randn(50, 4)
    positive, negative = torch.arange(5), torch.arange(5, 30)
    arguments = logits, deltas, positive, negative, wanted
    gap = (deltas - wanted)[:5].abs()
    smooth = torch.where(gap < 1 / 9, 4.5 * gap**2, gap - 1 / 18)
    assert ours.sampled_loss(*arguments)[1].item() == pytest.approx(gap.sum().item() / 30)
    assert theirs.sampled_loss(*arguments)[1].item() == pytest.approx(smooth.sum().item() / 30)
    with torch.device("meta"):
        counts = [
            mask_rcnn("litv2_tiny", conventions=c).rpn._post_nms_top_n["training"]
            for c in ("reference", "torchvision")
        ]
    assert counts == [1000, 2000]


def test_background_first_computes_the_same_detections():
    torch.manual_seed(0)
    last = scenes.detector("mask_rcnn").eval()
    first = scenes.detector(
        "mask_rcnn", conventions=Conventions(background="first", mask_threshold=None)
    ).eval()
    # Official names of the weights of `last`.
    state = official(last.state_dict())
    assert from_official(state).keys() == last.state_dict().keys()
    first.load_state_dict(from_official(state, background="first"))
    first.roi_heads.detections_per_img = last.roi_heads.detections_per_img = 5
    images = scenes.images()
    with torch.no_grad():
        ours, theirs = last(images), first(images)
    for one, other in zip(ours, theirs, strict=True):
        assert len(one["boxes"]) > 0
        torch.testing.assert_close(one["scores"], other["scores"])
        torch.testing.assert_close(one["boxes"], other["boxes"])
        assert torch.equal(one["labels"] + 1, other["labels"])
        assert torch.equal(one["masks"], other["masks"] >= 0.5)
        assert other["masks"].dtype == torch.float32


def official(state):
    """The official names of a Mask R-CNN's weights."""
    names = (
        ("backbone.body.", "backbone."),
        ("roi_heads.box_head.fc6.", "roi_head.bbox_head.shared_fcs.0."),
        ("roi_heads.box_head.fc7.", "roi_head.bbox_head.shared_fcs.1."),
        ("roi_heads.box_predictor.cls_score.", "roi_head.bbox_head.fc_cls."),
        ("roi_heads.box_predictor.bbox_pred.", "roi_head.bbox_head.fc_reg."),
        ("roi_heads.mask_predictor.conv5_mask.", "roi_head.mask_head.upsample."),
        ("roi_heads.mask_predictor.mask_fcn_logits.", "roi_head.mask_head.conv_logits."),
        ("rpn.head.conv.0.0.", "rpn_head.rpn_conv."),
        ("rpn.head.cls_logits.", "rpn_head.rpn_cls."),
        ("rpn.head.bbox_pred.", "rpn_head.rpn_reg."),
    )
    levels = (
        ("backbone.fpn.inner_blocks.", "neck.lateral_convs."),
        ("backbone.fpn.layer_blocks.", "neck.fpn_convs."),
        ("roi_heads.mask_head.", "roi_head.mask_head.convs."),
    )
    renamed = {}
    for key, value in state.items():
        for ours, theirs in (*names, *levels):
            if key.startswith(ours):
                rest = key.removeprefix(ours)
                rest = rest.replace(".0.", ".conv.", 1) if (ours, theirs) in levels else rest
                renamed[theirs + rest] = value
                break
    assert len(renamed) == len(state)
    return renamed


@pytest.mark.parametrize("size", [(480, 640), (427, 640), (600, 200)])
def test_sides_of_scaled_images(size):
    image, box = torch.rand(3, *size), torch.tensor([[10.0, 20, 100, 150]])
    target = {"boxes": box, "labels": torch.zeros(1, dtype=torch.int64)}
    theirs = GeneralizedRCNNTransform(800, 1333, list(MEAN), list(STD)).train()
    floor = ImageTransform(800, 1333, TORCHVISION).train()
    rounded = ImageTransform(800, 1333, Conventions()).train()
    outputs = [transform([image], [dict(target)]) for transform in (theirs, floor, rounded)]
    for key in ("boxes", "labels"):
        assert torch.equal(outputs[0][1][0][key], outputs[1][1][0][key])
    assert torch.equal(outputs[0][0].tensors, outputs[1][0].tensors)
    scale = min(800 / min(size), 1333 / max(size))
    expected = tuple(int(side * scale + 0.5) for side in size)
    assert outputs[2][0].image_sizes[0] == expected
    factors = torch.tensor([expected[1] / size[1], expected[0] / size[0]]).repeat(2)
    torch.testing.assert_close(outputs[2][1][0]["boxes"], box * factors)
    if size == (480, 640):
        assert (outputs[0][0].image_sizes[0], expected) == ((800, 1066), (800, 1067))


def test_candidates_of_retinanet():
    """One anchor with two classes: both are kept, though only one anchor may be."""
    counts = {}
    for kind in ("anchors", "pairs"):
        model = scenes.detector("retinanet", conventions=Conventions(retinanet_candidates=kind))
        model.topk_candidates = 1
        logits = torch.full((1, 3, 5), -9.0)
        logits[0, 1, [0, 3]] = torch.tensor([2.0, 1.0])
        anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40], [50, 50, 60, 60]])
        outputs = {"cls_logits": [logits], "bbox_regression": [torch.zeros(1, 3, 4)]}
        result = model.postprocess_detections(outputs, [[anchors]], [(100, 100)])[0]
        assert torch.equal(result["boxes"], anchors[1:2].expand(len(result["boxes"]), 4))
        counts[kind] = result["labels"].tolist()
    assert counts == {"anchors": [0, 3], "pairs": [0]}
    assert retinanet("litv2_tiny").detections_per_img == 100
    assert retinanet("litv2_tiny", conventions="torchvision").detections_per_img == 300


def test_tiny_boxes():
    for rules, count in ((Conventions(), 1), (Conventions(drop_tiny_boxes=True), 0)):
        heads = scenes.detector("faster_rcnn", conventions=rules).roi_heads
        point = torch.tensor([[10.0, 10, 10.001, 10.001]])
        logits = torch.tensor([[9.0, 0, 0, 0, 0, 0]])
        found = heads.postprocess_detections(logits, torch.zeros(1, 20), [point], [(50, 50)])
        assert len(found[0][0]) == count
        assert (scenes.detector("faster_rcnn", conventions=rules).rpn.min_size > 0) == (count == 0)


def test_initial_weights():
    torch.manual_seed(0)
    ours = mask_rcnn("litv2_tiny")
    heads = ours.roi_heads
    assert heads.box_predictor.cls_score.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert heads.box_predictor.bbox_pred.weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert not heads.box_head.fc6.bias.any()
    lateral = ours.backbone.fpn.inner_blocks[0][0].weight
    # Xavier's bound has both fans; torchvision's has the inputs alone.
    bound = (6 / (32 + 256)) ** 0.5
    assert bound * 0.98 < lateral.abs().max().item() <= bound
    theirs = mask_rcnn("litv2_tiny", conventions="torchvision").backbone.fpn.inner_blocks[0][0]
    assert theirs.weight.abs().max().item() > 2 * bound
