"""RetinaNet and Semantic FPN of LITv2-S against the authors' code on mmdet 2.11 and mmseg 0.13."""

import dense_golden as golden
import numpy as np
import pytest
import timm
import torch
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou, clip_boxes_to_image

from mesa_train.models.dense import (
    Conventions,
    from_official,
    mask_rcnn,
    retinanet,
    semantic_fpn,
)
from mesa_train.models.dense.boxes import Anchors, BoxCoder, Matcher
from mesa_train.models.dense.retinanet import STRIDES
from mesa_train.models.dense.semantic_fpn import semantic_loss


@pytest.fixture(scope="module")
def detection():
    return golden.arrays("detection")


@pytest.fixture(scope="module")
def detector():
    model = retinanet("litv2_s")
    model.load_state_dict(from_official(golden.state("retinanet_s")))
    return model.eval()


@pytest.fixture(scope="module")
def maps(detector):
    """The pyramid, and the head's outputs of each level, as the reference has them."""
    with torch.no_grad():
        levels = list(detector.backbone(golden.images(5, 2, 3, 128, 160)).values())
        logits = [level_output(detector.head.classification_head, "cls_logits", x) for x in levels]
        deltas = [level_output(detector.head.regression_head, "bbox_reg", x) for x in levels]
    return levels, logits, deltas


def level_output(head, last, x):
    return getattr(head, last)(head.conv(x))


@pytest.mark.parametrize(
    ("build", "name"), [(retinanet, "retinanet_s"), (semantic_fpn, "semantic_fpn_s")]
)
def test_keys_and_shapes_are_the_authors(build, name):
    with torch.device("meta"):
        model = build("litv2_s")
    expected = golden.keys(name)
    shapes = from_official(dict(expected["keys"]))
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == shapes
    assert sum(p.numel() for p in model.parameters()) == expected["num_params"]


@pytest.mark.parametrize(
    ("backbone", "retina", "mask"),
    [
        ("litv2_s", 38_014_252, 47_350_056),
        ("litv2_m", 59_000_620, 68_336_424),
        ("litv2_b", 97_139_852, 105_894_024),
    ],
)
def test_parameters(backbone, retina, mask):
    with torch.device("meta"):
        detectors = retinanet(backbone), mask_rcnn(backbone)
    assert [sum(p.numel() for p in m.parameters()) for m in detectors] == [retina, mask]


def test_pyramid_and_head_of_retinanet_are_the_authors(detector, maps, detection):
    with torch.no_grad():
        body = detector.backbone.body(golden.images(5, 2, 3, 128, 160))
    for x, expected in zip(body, detection["backbone_stat"][1:], strict=True):
        golden.close(golden.stat(x), expected, atol=1e-5)
    for level, (x, logits, deltas) in enumerate(zip(*maps, strict=True)):
        assert list(x.shape) == detection["level_shapes"][level].tolist()
        golden.close(x[:, ::32], detection[f"fpn{level}_ch32"], atol=3e-5)
        golden.close(logits[:, ::60], detection[f"cls{level}_ch60"], atol=2e-5)
        golden.close(deltas[:, ::6], detection[f"reg{level}_ch6"], atol=2e-5)
        golden.close(golden.stat(x), detection["fpn_stat"][level], atol=2e-5)
        golden.close(golden.stat(logits), detection["cls_stat"][level], atol=2e-5)
        golden.close(golden.stat(deltas), detection["reg_stat"][level], atol=2e-5)


def test_a_relu_before_p7_is_torchvisions(maps, detection):
    model = retinanet("litv2_s", conventions=Conventions(p7_relu=True)).eval()
    model.load_state_dict(from_official(golden.state("retinanet_s")))
    with torch.no_grad():
        p7 = list(model.backbone(golden.images(5, 2, 3, 128, 160)).values())[-1]
    assert (p7[:, ::32] - torch.from_numpy(detection["fpn4_ch32"])).abs().max() > 0.5


def targets_of(detection):
    return [
        {
            "boxes": torch.from_numpy(detection[f"gt_boxes{i}"]).double(),
            "labels": torch.from_numpy(detection[f"gt_labels{i}"]),
        }
        for i in range(2)
    ]


@pytest.fixture(scope="module")
def training(detector, maps, detection):
    """Outputs of each level as float64 with gradients, losses and matches."""
    levels, *outputs = maps
    outputs = [[x.double().requires_grad_() for x in out] for out in outputs]
    flat = [
        torch.cat([flattened(x, k) for x in out], 1)
        for out, k in zip(outputs, (80, 4), strict=True)
    ]
    images = ImageList(torch.zeros(2, 3, 128, 160), [(128, 160)] * 2)
    anchors = [a.double() for a in detector.anchor_generator(images, levels)]
    targets = targets_of(detection)
    losses = detector.compute_loss(
        targets, {"cls_logits": flat[0], "bbox_regression": flat[1]}, anchors
    )
    sum(losses.values()).backward()
    matches = [detector._match(t, a) for t, a in zip(targets, anchors, strict=True)]
    return detector, outputs, losses, matches, flat, anchors


def flattened(x, values):
    batch, _, height, width = x.shape
    return (
        x.view(batch, -1, values, height, width).permute(0, 3, 4, 1, 2).reshape(batch, -1, values)
    )


def test_targets_losses_and_gradients_of_retinanet_are_the_authors(training, detection):
    _, (logits, deltas), losses, matches, *_ = training
    for index, match in enumerate(matches):
        labels = torch.from_numpy(detection[f"gt_labels{index}"])[match.clamp(min=0)]
        assert (torch.where(match >= 0, labels, 80).numpy() == detection["labels"][index]).all()
        assert ((match != -2).numpy() == detection["label_weights"][index]).all()
    assert sum((m >= 0).sum().item() for m in matches) == detection["num_pos"][0]
    # The outputs and the anchors are of float32, the reference's losses of float64.
    golden.close(losses["classification"].item(), detection["loss_cls"].sum(), rtol=1e-5)
    golden.close(losses["bbox_regression"].item(), detection["loss_bbox"].sum(), rtol=1e-5)
    golden.close([x.grad.norm().item() for x in logits], detection["grad_cls_l2"], rtol=1e-5)
    golden.close([x.grad.norm().item() for x in deltas], detection["grad_reg_l2"], rtol=1e-5)


def test_a_loss_per_image_is_torchvisions(training, detection):
    model, *_, flat, anchors = training
    outputs = {"cls_logits": flat[0].detach(), "bbox_regression": flat[1].detach()}
    targets = targets_of(detection)
    per_image = retinanet("litv2_tiny", conventions=Conventions(retinanet_loss="image"))
    total = per_image.compute_loss(targets, outputs, anchors)["classification"].item()
    assert total == pytest.approx(11_885, abs=1)
    matches = [model._match(t, a) for t, a in zip(targets, anchors, strict=True)]
    theirs = per_image.head.compute_loss(targets, outputs, anchors, matches)
    assert theirs["classification"].item() == pytest.approx(total, rel=1e-9)
    ours = per_image.compute_loss(targets, outputs, anchors)["bbox_regression"].item()
    assert theirs["bbox_regression"].item() == pytest.approx(ours, rel=1e-9)


def test_anchors_are_the_authors(detection):
    sizes = [[4 * s * 2 ** (i / 3) for i in range(3)] for s in STRIDES]
    anchors = Anchors(sizes, strides=STRIDES)
    golden.close(torch.stack(anchors.cell_anchors), detection["retina_base_anchors"], atol=1e-4)
    grid = anchors.grid_anchors([(7, 11)] * 5, [(s, s) for s in STRIDES])[4]
    golden.close(grid[:200], detection["retina_anchors_level4"], atol=1e-4)
    rpn = Anchors([[8 * s] for s in (4, 8, 16, 32, 64)])
    golden.close(torch.stack(rpn.cell_anchors), detection["rpn_base_anchors"], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "weights"), [("unit", (1.0, 1.0, 1.0, 1.0)), ("rcnn", (10.0, 10.0, 5.0, 5.0))]
)
def test_the_box_coder_is_the_authors(detection, name, weights):
    boxes, gts, deltas = (
        torch.from_numpy(detection[f"coder_{k}"]) for k in ("boxes", "gts", "deltas")
    )
    coder = BoxCoder(weights)
    encoded = coder.encode_single(gts, boxes)
    golden.close(encoded, detection[f"coder_{name}_encode"], atol=1e-4, rtol=1e-5)
    decoded = clip_boxes_to_image(coder.decode_single(deltas, boxes), (150, 170))
    golden.close(decoded, detection[f"coder_{name}_decode"], atol=1e-4)
    # torchvision clamps large sizes alone.
    theirs = BoxCoder(weights, clamp_small=False).decode_single(deltas, boxes)
    differs = (theirs - coder.decode_single(deltas, boxes)).abs().amax(1) > 1e-9
    small = (deltas[:, 2:] / torch.tensor(weights[2:])).amin(1) < -coder.bbox_xform_clip
    assert small.any()
    assert differs.equal(small)


@pytest.mark.parametrize(
    ("name", "matcher", "count"),
    [
        ("retina", Matcher(0.5, 0.4, 0.0), 6),
        ("retina_far_gt", Matcher(0.5, 0.4, 0.0), 8),
        ("rpn", Matcher(0.7, 0.3, 0.3), 8),
        ("rcnn", Matcher(0.5, 0.5, 0.5), 8),
    ],
)
def test_the_matcher_is_the_authors(detection, name, matcher, count):
    boxes, gts = (torch.from_numpy(detection[f"assign_{k}"]) for k in ("boxes", "gts"))
    matches = matcher(box_iou(gts[:count], boxes))
    # The reference has -1 for ignored, 0 for negative and i for its i-th box.
    theirs = torch.where(matches == -2, -1, matches + 1)
    assert (theirs.numpy() == detection[f"assign_{name}"]).all()


def test_the_pyramid_of_mask_rcnn_is_the_authors(detection):
    model = mask_rcnn("litv2_s").eval()
    state = {k: v for k, v in golden.state("retinanet_s").items() if k.startswith("backbone.")}
    for level, channels in enumerate((96, 192, 384, 768)):
        for name, shape in (
            ("lateral_convs", (256, channels, 1, 1)),
            ("fpn_convs", (256, 256, 3, 3)),
        ):
            for leaf in ("weight", "bias"):
                key = f"neck.{name}.{level}.conv.{leaf}"
                state[key] = golden.value_of(key, shape if leaf == "weight" else (256,))
    missing, unexpected = model.load_state_dict(from_official(state), strict=False)
    assert not unexpected
    assert not [key for key in missing if key.startswith("backbone.")]
    with torch.no_grad():
        levels = list(model.backbone(golden.images(5, 2, 3, 128, 160)).values())
    assert [list(x.shape) for x in levels] == detection["mask_fpn_shapes"].tolist()
    golden.close([golden.stat(x) for x in levels], detection["mask_fpn_stat"], atol=3e-5)


@pytest.fixture(scope="module")
def segmentation():
    return golden.arrays("semantic_fpn")


# A 3x3 convolution in float64 has no fast kernel on a CPU. The quick cases run in float32.
PRECISIONS = [
    pytest.param((torch.float32, 1e-4), id="float32"),
    pytest.param((torch.float64, 1e-9), id="float64", marks=pytest.mark.slow),
]


def segmenter(dtype, **options):
    model = semantic_fpn("litv2_s", **options)
    model.load_state_dict(from_official(golden.state("semantic_fpn_s")))
    return model.to(dtype)


def scene(dtype):
    images = golden.images(0, 2, 3, 96, 128).to(dtype)
    labels = np.random.RandomState(3).randint(0, 150, (2, 1, 96, 128))
    labels[np.random.RandomState(4).rand(2, 1, 96, 128) < 0.1] = 255
    return images, torch.from_numpy(labels)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_maps_logits_predictions_loss_and_gradients_of_semantic_fpn(segmentation, precision):
    dtype, tolerance = precision
    model = segmenter(dtype).eval()
    images, labels = scene(dtype)
    body, levels, scales = {}, {}, {}
    model.backbone.body.register_forward_hook(lambda m, i, out: body.update(enumerate(out)))
    model.backbone.register_forward_hook(lambda m, i, out: levels.update(enumerate(out.values())))
    for index, head in enumerate(model.decode_head.scale_heads):
        head.register_forward_hook(lambda m, i, out, index=index: scales.update({index: out}))
    logits = model(images)
    shapes = [list(x.shape) for x in (*body.values(), *levels.values(), logits)]
    assert shapes == segmentation["shapes"].tolist()
    for index in range(4):
        for name, outputs in (("backbone", body), ("fpn", levels), ("scale", scales)):
            expected = segmentation[f"{name}{index}_stat"]
            golden.close(golden.stat(outputs[index]), expected, atol=tolerance)
        golden.close(levels[index][:, ::32], segmentation[f"fpn{index}_ch32"], atol=1e-4)
    golden.close(logits[:, ::15], segmentation["logits_ch15"], atol=1.5e-4)
    golden.close(golden.stat(logits), segmentation["logits_stat"], atol=tolerance)
    golden.close(
        logits.double().sum((0, 2, 3)), segmentation["logits_chan_sum_f64"], atol=1e3 * tolerance
    )
    golden.close(logits.double().sum(1), segmentation["logits_pix_sum_f64"], atol=2e-3)
    size = tuple(segmentation["ori_shape"].tolist())
    different = (predicted(model, logits, images, size) != segmentation["pred_ori"]).sum()
    assert different <= (3 if dtype == torch.float32 else 0)
    loss = semantic_loss(logits, labels)
    loss.backward()
    assert loss.item() == pytest.approx(segmentation["loss_f64"], rel=tolerance)
    check_gradients(model, segmentation, "grad_l2", 10 * tolerance)


def predicted(model, logits, images, size):
    """The classes that `predict` finds, with logits that are known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "forward", lambda images: logits)
        return model.predict(images, size).numpy()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_training_step_of_semantic_fpn_is_the_authors(segmentation, precision):
    dtype, tolerance = precision
    model = segmenter(dtype, dropout=0.0).train()
    loss = model(*scene(dtype))["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(segmentation["train_loss_f64"], rel=tolerance)
    check_gradients(model, segmentation, "train_grad_l2", 10 * tolerance)
    bn = model.decode_head.scale_heads[3][0].bn
    golden.close(bn.running_mean, segmentation["train_bn_mean"], atol=tolerance)
    golden.close(bn.running_var, segmentation["train_bn_var"], atol=tolerance)


def check_gradients(model, reference, field, tolerance):
    renamed = from_official({key: key for key in reference["grad_keys"].tolist()})
    official = {key: ours for ours, key in renamed.items()}
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert sorted(official.values()) == sorted(grads)
    norms = [grads[official[key]].norm().item() for key in reference["grad_keys"].tolist()]
    # A gradient that is 0 in exact arithmetic, as a bias before a batch norm, is rounding.
    golden.close(norms, reference[field], rtol=tolerance, atol=tolerance)


def test_pairs_and_wrapped_weights_are_renamed():
    names = ["backbone.norm1.weight", "neck.fpn_convs.0.conv.bias", "bbox_head.retina_cls.bias"]
    plain = from_official({name: [3] for name in names})
    assert list(plain) == [
        "backbone.body.norm1.weight",
        "backbone.fpn.extra_blocks.p6.bias",
        "head.classification_head.cls_logits.bias",
    ]
    pairs = [[name, [3]] for name in names]
    assert from_official(pairs) == from_official({"keys": pairs, "parameters": 3}) == plain
    wrapped = {"meta": {}, "state_dict": {f"module.{name}": [3] for name in names}}
    assert from_official(wrapped) == plain


def test_unknown_keys_are_named():
    with pytest.raises(TypeError, match=r"state dict or a list of .* pairs, got int"):
        from_official(3)
    with pytest.raises(TypeError, match="pairs, got list"):
        from_official(["backbone.norm1.weight"])
    with pytest.raises(TypeError, match="state must have texts as keys, got 3"):
        from_official({3: 4})
    with pytest.raises(ValueError, match=r"state has 'backbone.norm1.bias' twice"):
        from_official([("backbone.norm1.bias", 0), ("module.backbone.norm1.bias", 0)])
    with pytest.raises(ValueError, match="background='first' needs tensors, got list for backbone"):
        from_official({"backbone.norm1.bias": [3]}, background="first")
    with pytest.raises(ValueError, match=r"'bbox_head.other.weight' is no key"):
        from_official({"bbox_head.other.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="background must be"):
        from_official({}, background="middle")


def test_a_timm_module_of_four_maps_is_accepted():
    model = retinanet(timm.create_model("litv2_tiny", features_only=True))
    names = [name for name in model.state_dict() if name.startswith("backbone.body.norm")]
    assert names == [
        f"backbone.body.norm{i}.{leaf}" for i in (1, 2, 3) for leaf in ("weight", "bias")
    ]
