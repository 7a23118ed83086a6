"""Dense models under mesa_train: the same losses, gradients within the codec's error, nothing for frozen parts."""

import pytest
import scenes
import timm
import torch
from timm.utils.model import freeze_batch_norm_2d

import mesa_train
from mesa_train.methods.checkpointing import checkpointed
from mesa_train.models.dense import plain_vit, retinanet
from mesa_train.policy import PRESETS, Policy

# Lossless differs by the order of sums.
BOUNDS = {"lossless": 1e-6, "mesa8": 3e-2, "mesa8-recompute": 3e-2, "mesa4": 0.3}


def small_plain_vit():
    vit = timm.create_model(
        "vit_tiny_patch16_224", depth=3, embed_dim=64, num_heads=2, img_size=64, num_classes=0
    )
    return plain_vit(vit, window=3, global_blocks=1)


def case(name):
    torch.manual_seed(0)
    if name == "semantic_fpn":
        labels = torch.randint(0, 7, (2, 70, 94))
        labels[:, :9] = 255
        return scenes.segmenter(), (torch.randn(2, 3, 70, 94), labels)
    if name == "plain_vit":
        model = scenes.detector("mask_rcnn", small_plain_vit())
        return model, (scenes.images(), scenes.targets((3, 1)))
    name, _, empty = name.partition(" ")
    counts = {"": (3, 2), "one empty": (3, 0), "all empty": (0, 0)}[empty]
    return scenes.detector(name), (scenes.images(), scenes.targets(counts))


def compared(run, expected, bound):
    losses, gradient, buffers = run
    wanted_losses, wanted_gradient, wanted_buffers = expected
    assert losses.keys() == wanted_losses.keys()
    for name, loss in losses.items():
        assert torch.equal(loss, wanted_losses[name]), name
    for name, buffer in buffers.items():
        assert torch.equal(buffer, wanted_buffers[name]), name
    assert gradient.shape == wanted_gradient.shape
    error = ((gradient - wanted_gradient).norm() / wanted_gradient.norm()).item()
    assert error <= bound
    return error


CASES = ["retinanet", "retinanet one empty", "mask_rcnn", "mask_rcnn all empty", "semantic_fpn"]
SLOW = ["retinanet all empty", "faster_rcnn", "mask_rcnn one empty", "plain_vit"]
CASES += [pytest.param(name, marks=pytest.mark.slow) for name in SLOW]


@pytest.mark.parametrize("name", CASES)
def test_losses_are_plains_and_gradients_within_the_codecs_error(name):
    model, inputs = case(name)
    step = scenes.Step(model, *inputs)
    expected = step()
    assert all(loss.isfinite() for loss in expected[0].values())
    errors = {}
    for policy, bound in BOUNDS.items():
        mesa_train.wrap(model, policy)
        errors[policy] = compared(step(), expected, bound)
        mesa_train.unwrap(model)
    # The codes are in use: fewer bits, larger errors.
    assert errors["lossless"] < errors["mesa8"] < errors["mesa4"]


@pytest.mark.parametrize("name", ["mask_rcnn", "semantic_fpn"])
@pytest.mark.parametrize("policy", ["lossless", "mesa8"])
def test_checkpointing_changes_neither_losses_nor_statistics(name, policy):
    model, inputs = case(name)
    step = scenes.Step(model, *inputs)
    expected = step()
    body = model.backbone.body
    body.set_grad_checkpointing()
    mesa_train.wrap(model, policy)
    compared(step(), expected, BOUNDS[policy])
    mesa_train.unwrap(model)
    body.set_grad_checkpointing(False)
    regions = Policy(
        bits=32 if policy == "lossless" else 8, checkpoint=["backbone.body.layers.*.blocks.*"]
    )
    mesa_train.wrap(model, regions)
    compared(step(), expected, BOUNDS[policy])
    mesa_train.unwrap(model)
    with checkpointed(model):
        compared(step(), expected, 1e-6)


def test_shapes_may_change_every_step():
    torch.manual_seed(0)
    model = scenes.detector("mask_rcnn")
    for sizes in (((96, 128), (96, 128)), ((128, 80), (100, 90)), ((64, 64), (40, 128))):
        inputs = scenes.images(sizes), scenes.targets((2, 1), sizes)
        step = scenes.Step(model, *inputs)
        expected = step()
        mesa_train.wrap(model, "mesa8")
        compared(step(), expected, 3e-2)
        mesa_train.unwrap(model)


@pytest.mark.parametrize("policy", ["plain", "mesa8"])
def test_frozen_stages_and_frozen_batch_norms_keep_nothing(policy):
    torch.manual_seed(0)
    body = timm.create_model("resnet18", features_only=True)
    body = freeze_batch_norm_2d(body)
    model = retinanet(body, 5, min_size=96, max_size=128).train()
    frozen = [f"backbone.body.model.{name}" for name in ("conv1", "layer1")]
    for name, parameter in model.named_parameters():
        if name.startswith(tuple(frozen)):
            parameter.requires_grad_(False)
    inputs = [scenes.images(), scenes.targets((2, 1))]
    saved = mesa_train.footprint(model, inputs, policy=policy).by_module
    stages = {name: size for name, size in saved.items() if name.startswith(tuple(frozen))}
    assert not stages
    norms = {name: size for name, size in saved.items() if ".bn" in name}
    # The folded scale of each frozen norm: at most 512 floats.
    assert max(norms.values(), default=0) <= 512 * 4
    assert saved["backbone.body.model.layer2.0.conv1"] > 0


@pytest.mark.parametrize("name", ["retinanet", "mask_rcnn", "semantic_fpn"])
def test_fewer_bytes_are_saved(name):
    model, inputs = case(name)
    saved = {
        policy: mesa_train.footprint(model, list(inputs), policy=policy).saved_bytes
        for policy in ("plain", "mesa8", "mesa4")
    }
    assert saved["mesa4"] < saved["mesa8"] < saved["plain"] / 2


@pytest.mark.parametrize("name", ["retinanet", "semantic_fpn"])
def test_a_recomputed_loss_saves_less_and_changes_nothing(name):
    model, inputs = case(name)
    if name == "semantic_fpn":
        # The labels, which both save, are larger than the codes of a few classes.
        model = scenes.segmenter(classes=40)
    step = scenes.Step(model, *inputs)
    for policy, bound in (("plain", 0.0), ("mesa8", 3e-2)):
        counts = []
        expected = step()
        for recompute in (False, True):
            model.recompute_loss = recompute
            counts.append(mesa_train.footprint(model, list(inputs), policy=policy).saved_bytes)
            if policy != "plain":
                mesa_train.wrap(model, policy)
            compared(step(), expected, bound)
            mesa_train.unwrap(model)
        model.recompute_loss = False
        assert counts[1] < 0.98 * counts[0]


PRESET_CASES = ["retinanet one empty", "semantic_fpn", "mask_rcnn"]
PRESET_CASES += [pytest.param("faster_rcnn", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", PRESET_CASES)
def test_every_preset_keeps_the_losses(name):
    model, inputs = case(name)
    step = scenes.Step(model, *inputs)
    expected = step()
    for policy in [preset for preset in PRESETS if preset not in BOUNDS]:
        mesa_train.wrap(model, policy)
        assert compared(step(), expected, 0.5) > 1e-4
        mesa_train.unwrap(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["retinanet", "semantic_fpn"])
def test_autocast_reaches_the_deformable_convolutions(name):
    """Their inputs are cast by hand: under CPU autocast torchvision refuses bfloat16."""
    model, inputs = case(name)
    step = scenes.Step(model, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        expected = step()
        mesa_train.wrap(model, "mesa8")
        compared(step(), expected, 0.1)
