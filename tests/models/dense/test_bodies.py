"""Bodies from timm, Hugging Face and plain ViTs, and the errors of bad backbones and targets."""

import pytest
import scenes
import timm
import torch

import mesa_train
from mesa_train.models.dense import faster_rcnn, mask_rcnn, plain_vit, retinanet, semantic_fpn
from mesa_train.models.dense.bodies import body_of
from mesa_train.models.dense.plain_vit import PlainViT, SimplePyramid

STRIDES = (4, 8, 16, 32)


def small_vit(**options):
    sizes = {"depth": 4, "embed_dim": 64, "num_heads": 2, "img_size": 64, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **sizes | options)


def hugging_face():
    from transformers import SwinBackbone, SwinConfig

    config = SwinConfig(
        image_size=64,
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return SwinBackbone(config)


def timm_swin():
    sizes = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2), "img_size": 64}
    name = "swin_tiny_patch4_window7_224"
    return timm.create_model(name, features_only=True, strict_img_size=False, **sizes)


BODIES = {
    "resnet": lambda: timm.create_model("resnet18", features_only=True),
    "convnext": lambda: timm.create_model("convnext_atto", features_only=True),
    "timm swin": timm_swin,
    "hugging face swin": hugging_face,
    "plain vit": lambda: plain_vit(small_vit(), window=3, global_blocks=2),
}


SLOW = pytest.param("hugging face swin", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [*[name for name in BODIES if "hugging" not in name], SLOW])
def test_every_body_gives_a_pyramid(name):
    torch.manual_seed(0)
    model = semantic_fpn(BODIES[name](), 5).eval()
    with torch.no_grad():
        maps = model.backbone(torch.randn(1, 3, 64, 96))
        logits = model(torch.randn(1, 3, 64, 96))
    assert [tuple(x.shape) for x in maps.values()] == [(1, 256, 64 // s, 96 // s) for s in STRIDES]
    assert logits.shape == (1, 5, 16, 24)


@pytest.mark.parametrize("build", [retinanet, faster_rcnn, mask_rcnn, semantic_fpn])
def test_the_pyramid_has_the_chosen_width(build):
    with torch.device("meta"):
        model = build("litv2_tiny", 3, channels=24)
        maps = model.backbone(torch.zeros(1, 3, 64, 96))
        heads = getattr(model, "decode_head", None)
        if heads is not None:
            assert heads(list(maps.values())).shape == (1, 3, 16, 24)
    assert {x.shape[1] for x in maps.values()} == {24}


def test_a_map_of_channels_last_keeps_its_pixels():
    swin = timm_swin().eval()
    body = body_of(swin, STRIDES)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for theirs, ours in zip(swin(x), body.module.eval()(x), strict=True):
            assert torch.equal(theirs.permute(0, 3, 1, 2), ours)
    assert body.channels == [16, 32, 64, 128]


@pytest.mark.parametrize(("build", "levels"), [(retinanet, 5), (mask_rcnn, 5)])
def test_detectors_on_a_plain_vit(build, levels):
    with torch.device("meta"):
        model = build(plain_vit(small_vit()))
        maps = model.backbone(torch.zeros(1, 3, 128, 160))
    assert len(maps) == levels
    strides = [8, 16, 32, 64, 128] if build is retinanet else [4, 8, 16, 32, 64]
    assert [x.shape[-1] for x in maps.values()] == [-(-160 // s) for s in strides]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("swin_tiny_patch4_window7_224", "SelectedMaps"),
        ("lit_ti", "FeatureGetterNet"),
        ("lit_s", "PyramidFeatures"),
        ("vit_tiny_patch16_224", "PlainViT"),
        ("deit_tiny_distilled_patch16_224", "PlainViT"),
        pytest.param("vit_small_patch14_dinov2", "PlainViT", marks=pytest.mark.slow),
        pytest.param("vit_small_patch16_dinov3", "SelectedMaps", marks=pytest.mark.slow),
        pytest.param("pvt_v2_b0", "FeatureListNet", marks=pytest.mark.slow),
    ],
)
def test_any_name_takes_images_of_any_size(name, kind):
    """Sides that are no multiples of a patch or a window, and other sides than the model's own."""
    with torch.device("meta"):
        model = semantic_fpn(name, 5, channels=8).eval()
    assert type(model.backbone.body).__name__ == kind
    images = torch.zeros(1, 3, 166, 203, device="meta")
    with torch.no_grad():
        logits, maps = model(images), model.backbone.body(images)
    if kind == "SelectedMaps" and "swin" in name:
        assert [x.shape[2:] for x in maps] == [(42, 51), (21, 26), (11, 13), (6, 7)]
    assert abs(logits.shape[2] - 166 / 4) < 4
    assert abs(logits.shape[3] - 203 / 4) < 4


def test_padding_to_whole_patches_changes_no_pixel_of_a_map():
    torch.manual_seed(0)
    body = body_of(timm_swin().eval(), STRIDES).module
    assert body.multiple == 32
    images = torch.randn(1, 3, 70, 90)
    padded = torch.nn.functional.pad(images, (0, 6, 0, 26))
    with torch.no_grad():
        for cut, whole in zip(body(images), body(padded), strict=True):
            height, width = cut.shape[2:]
            assert torch.equal(cut, whole[..., :height, :width])
        assert [x.shape[2:] for x in body(images)] == [(18, 23), (9, 12), (5, 6), (3, 3)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hiera_tiny_224", "hiera_tiny_224 does not take images of 320x416.*work$"),
        ("hvt_ti_1", "hvt_ti_1 cannot be built with maps: 'HVT' object has no attribute 'feature_info'"),
        ("resnet", "no model 'resnet' in timm"),
        ("vit_tiny_patch16_384x", "close names: vit_tiny_patch16_384"),
        ("vit_tiny_r_s16_p8_224", "patch embedding is one convolution without a norm, got HybridEmbed"),
    ],
)  # fmt: skip
def test_a_name_that_cannot_serve_is_refused_in_one_line(name, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message) as error:
        retinanet(name)
    assert "\n" not in str(error.value)


def test_a_module_of_one_image_size_is_refused_when_the_detector_is_built():
    sizes = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2), "img_size": 64}
    swin = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, **sizes)
    swin.train()
    with pytest.raises(ValueError, match=r"does not take images of 320x416.*doesn't match model"):
        retinanet(swin)
    assert all(module.training for module in swin.modules())


def test_a_plain_vit_recomputes_its_blocks():
    torch.manual_seed(0)
    body = plain_vit(small_vit(), window=3, global_blocks=1)
    images = torch.randn(1, 3, 80, 64)

    def run():
        body.zero_grad()
        body(images)[0].square().sum().backward()
        return torch.cat([p.grad.flatten() for p in body.parameters()])

    expected = run()
    before = mesa_train.footprint(body, [images], policy="plain").saved_bytes
    body.set_grad_checkpointing()
    assert torch.equal(run(), expected)
    assert mesa_train.footprint(body, [images], policy="plain").saved_bytes < before / 3


def test_a_plain_vit_with_global_blocks_alone_is_timms():
    torch.manual_seed(0)
    vit = small_vit(class_token=False, global_pool="avg", final_norm=False)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = vit.forward_features(images)
        body = plain_vit(vit, global_blocks=4)
        body.norm = torch.nn.Identity()
        maps = body(images)
    torch.testing.assert_close(maps[0].flatten(2).transpose(1, 2), expected)


def test_windows_do_not_see_each_other():
    torch.manual_seed(0)
    body = plain_vit(small_vit(), window=2, global_blocks=0)
    images = torch.randn(1, 3, 80, 80)
    changed = images.clone()
    changed[..., :32, :32] += 1
    with torch.no_grad():
        difference = (body(images)[0] - body(changed)[0]).abs().amax(1)[0]
    # The first window is the first 2 x 2 tokens of 5 x 5.
    assert (difference[:2, :2] > 0).all()
    assert difference[2:].max() == difference[:, 2:].max() == 0
    globally = plain_vit(small_vit(), window=2, global_blocks=1)
    assert globally.global_blocks == {3}
    with torch.no_grad():
        difference = (globally(images)[0] - globally(changed)[0]).abs().amax(1)[0]
    assert (difference > 0).all()


def test_bad_backbones_are_named():
    with pytest.raises(TypeError, match="backbone must be a timm name or a module, got 3"):
        retinanet(3)
    with pytest.raises(ValueError, match="Linear gives no maps"):
        retinanet(torch.nn.Linear(3, 3))
    deep = timm.create_model("resnet18", features_only=True, out_indices=(3, 4))
    with pytest.raises(ValueError, match=r"maps at strides \[16, 32\], not at \[8\]"):
        retinanet(deep)
    with pytest.raises(TypeError, match="timm VisionTransformer, got ResNet"):
        plain_vit("resnet18")
    with pytest.raises(ValueError, match="global_blocks must be from 0 to 4, got 5"):
        PlainViT(small_vit(), global_blocks=5)
    with pytest.raises(ValueError, match=r"not 0\.125"):
        SimplePyramid(8, 8, (2,), None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, r"targets\[1\] needs a tensor 'labels'"),
        ({"boxes": torch.zeros(2, 5)}, r"targets\[1\]\['boxes'\] must be floats \(N, 4\)"),
        ({"boxes": torch.zeros(2, 4, dtype=torch.int64)}, "must be floats"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"must be int64 \(2,\), got"),
        ({"labels": torch.zeros(2)}, r"must be int64 \(2,\), got torch.float32"),
        ({"labels": torch.tensor([0, 5])}, "must be from 0 to 4, got 5"),
        ({"boxes": torch.tensor([[1.0, 2, 3, 4], [5, 5, 5, 9]])}, r"x1 < x2 .* got \[5.0, 5.0"),
        ({"boxes": torch.tensor([[1.0, 2, 3, 4], [0, 0, float("nan"), 9]])}, "x1 < x2"),
        ({"boxes": torch.tensor([[1.0, 2, 3, 4], [0, 0, float("inf"), 9]])}, "x1 < x2"),
        ({"masks": torch.zeros(2, 5, 5)}, r"must be \(2, 90, 100\), got \(2, 5, 5\)"),
    ],
)
def test_bad_targets_are_named(change, message):
    model = scenes.detector("mask_rcnn")
    targets = scenes.targets((1, 2))
    targets[1] |= change
    with pytest.raises(ValueError, match=message):
        model(scenes.images(), targets)


def test_targets_are_needed_in_training():
    model = faster_rcnn("litv2_tiny", 5).train()
    with pytest.raises(ValueError, match="needs targets"):
        model(scenes.images())
    with pytest.raises(ValueError, match="got 2 images and 1 targets"):
        model(scenes.images(), scenes.targets((1,), scenes.SIZES[:1]))


@pytest.mark.parametrize("name", list(scenes.BUILDERS))
def test_detections_are_inside_the_images(name):
    torch.manual_seed(0)
    model = scenes.detector(name).eval()
    if name != "retinanet":
        model.roi_heads.detections_per_img = 5
    images = scenes.images()
    with torch.no_grad():
        detections = model(images)
    for image, found in zip(images, detections, strict=True):
        height, width = image.shape[-2:]
        boxes = found["boxes"]
        assert boxes.shape == (len(found["scores"]), 4)
        assert boxes.min() >= 0 if len(boxes) else True
        assert (boxes[:, [0, 2]] <= width + 1e-3).all()
        assert (boxes[:, [1, 3]] <= height + 1e-3).all()
        assert found["scores"].diff().le(0).all()
        assert set(found["labels"].tolist()) <= set(range(5))
        if name == "mask_rcnn":
            assert found["masks"].shape == (len(boxes), 1, height, width)
            assert found["masks"].dtype == torch.bool


def test_labels_of_another_shape_are_named():
    model = semantic_fpn("litv2_tiny", 5)
    with pytest.raises(ValueError, match=r"labels must be \(1, H, W\)"):
        model(torch.randn(1, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.int64))
