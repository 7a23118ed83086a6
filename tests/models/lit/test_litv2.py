"""LITv2 against the authors' model: names, numbers, gradients; and timm's interface to it."""

import golden
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from one_step import Step

import mesa_train
import mesa_train.models
from mesa_train.models.lit.litv2 import LITv2


def create(name="litv2_tiny", **options):
    torch.manual_seed(0)
    return timm.create_model(name, **options)


@pytest.fixture(scope="module")
def reference():
    with golden.arrays("litv2_s") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def small():
    return golden.fill(create("litv2_s")).eval()


@pytest.mark.parametrize("name", ["litv2_s", "litv2_m", "litv2_b", "litv2_b_384"])
def test_keys_shapes_and_parameters_are_the_authors(name):
    with torch.device("meta"):
        model = create(name)
    expected = golden.keys(name.removesuffix("_384"))
    assert [[k, list(v.shape)] for k, v in model.state_dict().items()] == expected["keys"]
    assert sum(p.numel() for p in model.parameters()) == expected["num_params"]


@pytest.mark.parametrize(
    ("name", "size", "theirs", "corrected"),
    [
        ("litv2_s", 224, 3_734_401_596, 3_732_177_192),
        ("litv2_m", 224, 7_479_237_180, 7_477_012_776),
        ("litv2_b", 224, 13_193_561_148, 13_190_596_648),
        ("litv2_b", 384, 39_709_486_528, None),
    ],
)
def test_flops(name, size, theirs, corrected):
    with torch.device("meta"):
        model = create(name, img_size=size)
    assert model.flops() == theirs
    if corrected is not None:
        assert model.flops(corrected=True) == corrected


@pytest.mark.parametrize(
    ("alpha", "parameters", "giga"),
    [
        (0.0, 28_089_760, 3.965),
        (0.2, 27_844_000, 3.881),
        (0.4, 27_696_544, 3.815),
        (0.5, 27_647_392, 3.769),
        (0.7, 27_696_544, 3.742),
        (1.0, 28_089_760, 3.746),
    ],
)
def test_variants_of_alpha(alpha, parameters, giga):
    with torch.device("meta"):
        model = create("litv2_s", alpha=alpha)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.flops() / 1e9 == pytest.approx(giga, abs=5e-4)


def test_every_map_and_the_logits_are_the_authors(small, reference):
    maps = {}

    def note(name):
        def hook(module, inputs, output):
            maps[name] = output.detach()

        return hook

    modules = dict(small.named_modules())
    names = [n for n in reference["stat_names"].tolist() if n in modules]
    hooks = [modules[n].register_forward_hook(note(n)) for n in names]
    with torch.no_grad():
        logits = small(golden.images(2, 3, 224, 224))
    for hook in hooks:
        hook.remove()
    # Their own float32 is 4e-6 from their float64; the least mistake, eps 1e-6, makes 7e-5.
    np.testing.assert_allclose(logits.numpy(), reference["logits"], atol=3e-5, rtol=0)
    rows = dict(
        zip(reference["stat_names"].tolist(), reference["stat_mean_std_absmax"], strict=True)
    )
    # All but the pooling, which is a mean here and not a module.
    assert len(names) == len(rows) - 1
    for name in names:
        value = maps[name].double()
        numbers = [value.mean(), value.std(correction=0), value.abs().max()]
        np.testing.assert_allclose(numbers, rows[name], atol=1e-4, err_msg=name)
    with torch.no_grad():
        pooled = small.forward_head(maps["norm"], pre_logits=True)
    np.testing.assert_allclose(pooled.numpy(), reference["pooled"], atol=3e-5, rtol=0)


@pytest.mark.slow
def test_gradients_are_the_authors(reference):
    model = golden.fill(create("litv2_s")).eval().double()
    images = golden.images(2, 3, 224, 224).double().requires_grad_()
    weights = golden.images(2, 1000, seed=1) / 1000**0.5
    (model(images) * weights.double()).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert sorted(gradients) == sorted(reference["grad_keys"].tolist())
    for key, length, total in zip(
        reference["grad_keys"].tolist(), reference["grad_l2"], reference["grad_sum"], strict=True
    ):
        # Both in float64: what differs is the order of sums.
        assert gradients[key].norm().item() == pytest.approx(length, rel=1e-9), key
        assert gradients[key].sum().item() == pytest.approx(total, rel=1e-9, abs=1e-9 * length), key
    assert images.grad.norm().item() == pytest.approx(float(reference["grad_input_l2"]), rel=1e-9)


@pytest.mark.slow
def test_batch_norm_statistics_move_as_the_authors(reference):
    model = golden.fill(create("litv2_s")).double().train()
    with torch.no_grad():
        logits = model(golden.images(2, 3, 224, 224).double())
    np.testing.assert_allclose(logits.numpy(), reference["train_logits_f64"], atol=1e-10, rtol=0)
    for stage in range(3):
        norm = model.layers[stage].downsample.norm_layer
        for name in ("running_mean", "running_var"):
            expected = reference[f"train_bn{stage}_{name}"]
            np.testing.assert_allclose(getattr(norm, name).numpy(), expected, atol=1e-6)


@pytest.mark.slow
def test_kept_bytes_of_litv2_s():
    with torch.device("meta"):
        model = create("litv2_s", drop_path_rate=0.2).train()
    images = torch.empty(16, 3, 224, 224, device="meta")
    saved = {
        policy: mesa_train.footprint(model, images, policy=policy, autocast=torch.bfloat16)
        for policy in ("plain", "mesa8", "mesa4")
    }
    plain = saved["plain"].saved_bytes
    assert plain >= 3.5 * saved["mesa8"].saved_bytes
    assert plain >= 5.9 * saved["mesa4"].saved_bytes
    # Nothing large is kept as it is: beyond codes there are scales, statistics and offsets.
    uncompressed = sum(
        r.saved_bytes for r in saved["mesa8"].rows if r.dtype in ("float32", "bfloat16")
    )
    assert uncompressed < 0.08 * saved["mesa8"].saved_bytes


@pytest.mark.parametrize("policy", mesa_train.PRESETS)
def test_it_trains_under_every_preset(policy):
    model = create(num_classes=10, img_size=40).train()
    step = Step(model, torch.randn(6, 3, 40, 36), torch.arange(6))
    loss, expected = step()
    mesa_train.wrap(model, policy)
    wrapped_loss, gradient = step()
    assert torch.equal(wrapped_loss, loss)
    # Lossless differs by summation order, magnified by batch norms over few positions; codes add
    # 0.7 % an operand at 8 bits, up to 16 % at 4.
    bound = 1e-3 if policy == "lossless" else 0.5 if policy.startswith(("mesa4", "mesa3")) else 0.05
    assert (gradient - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize("size", [(32, 32), (37, 45), (64, 33), (29, 29)])
@pytest.mark.parametrize("batch", [1, 5, 7])
def test_any_size_and_any_batch(size, batch):
    model = create(num_classes=10).eval()
    images = torch.randn(batch, 3, *size)
    logits = model(images)
    assert logits.shape == (batch, 10)
    # An image's logits do not depend on its neighbours; kernels sum in other orders by batch size.
    torch.testing.assert_close(model(images[-1:])[0], logits[-1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_bfloat16_models_and_autocast(dtype):
    model = create(num_classes=10)
    images = torch.randn(2, 3, 32, 32)
    if dtype is not None:
        model, images = model.to(dtype), images.to(dtype)
        logits = model(images)
        assert logits.dtype is dtype
    else:
        stream = []
        model.layers[2].blocks[0].register_forward_hook(lambda m, i, o: stream.append(o.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        assert stream == [torch.float32]
    logits.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_checkpoint_serves_other_sizes():
    model = create(num_classes=10)
    other = create(num_classes=10, img_size=48)
    other.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 48, 48)
    assert torch.equal(model.eval()(images), other.eval()(images))


def test_it_runs_on_the_meta_device():
    with torch.device("meta"):
        assert create(num_classes=10)(torch.empty(2, 3, 32, 32)).shape == (2, 10)


def test_features_for_dense_tasks():
    dense = create(features_only=True)
    names = {key.partition(".")[0] for key in dense.state_dict()}
    assert names == {"patch_embed", "layers", "norm0", "norm1", "norm2", "norm3"}
    assert dense.feature_info.channels() == [32, 64, 128, 256]
    assert dense.feature_info.reduction() == [4, 8, 16, 32]
    maps = dense(torch.randn(1, 3, 118, 90))
    assert [tuple(m.shape) for m in maps] == [
        (1, 32, 30, 23),
        (1, 64, 15, 11),
        (1, 128, 7, 5),
        (1, 256, 3, 2),
    ]


def test_chosen_features_drop_what_they_do_not_need():
    dense = create(features_only=True, out_indices=(1, 2))
    keys = dense.state_dict()
    assert not any(k.startswith(("layers.3", "layers.2.downsample", "norm0", "head")) for k in keys)
    assert [m.shape[1] for m in dense(torch.randn(1, 3, 64, 64))] == [64, 128]


def test_features_are_the_classifiers_maps():
    model, dense = create().eval(), create(features_only=True).eval()
    images = torch.randn(2, 3, 64, 64)
    final, maps = model.forward_intermediates(images)
    for index, (head_maps, normed) in enumerate(zip(maps, dense(images), strict=True)):
        expected = F.layer_norm(head_maps.permute(0, 2, 3, 1), head_maps.shape[1:2]).permute(
            0, 3, 1, 2
        )
        torch.testing.assert_close(normed, expected, msg=f"stage {index}")
    assert torch.equal(final, model.forward_features(images))


def test_timms_interface():
    model = create(num_classes=10, drop_path_rate=0.3, in_chans=1)
    images = torch.randn(2, 1, 32, 32)
    features = model.eval().forward_features(images)
    assert features.shape == (2, 1, 1, 256)
    assert model.get_classifier() is model.head
    assert model.no_weight_decay() == set()
    torch.testing.assert_close(model.forward_head(features), model(images))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    model.reset_classifier(0, "")
    assert model(images).shape == (2, 1, 1, 256)
    assert timm.is_model("litv2_b")
    assert timm.create_model("litv2_s", img_size=256, drop_path_rate=0.2).img_size == (256, 256)


def test_drop_path_rises_linearly():
    model = create(drop_path_rate=0.4)
    blocks = [block for stage in model.layers for block in stage.blocks]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert isinstance(blocks[0].drop_path, torch.nn.Identity)


def test_start_of_training():
    model = create("litv2_tiny", num_classes=100)
    for name, parameter in model.named_parameters():
        if "conv_offset" in name:
            assert not parameter.any()
    hidden = model.layers[3].blocks[0].mlp
    assert hidden.dwconv.dwconv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.03)
    assert hidden.fc1.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert not hidden.fc1.bias.any()


def test_grad_checkpointing_changes_no_gradient():
    model = create(num_classes=10).eval()
    images = torch.randn(2, 3, 32, 32)

    def gradients():
        model.zero_grad()
        model(images).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    plain = mesa_train.footprint(model, images).saved_bytes
    model.set_grad_checkpointing()
    assert mesa_train.footprint(model, images).saved_bytes < plain
    assert all(torch.equal(f, e) for f, e in zip(gradients(), expected, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 28}, "must be at least 29x29, got 28x28"),
        ({"depths": (1, 1)}, "have one length, got 2, 4 and 4"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must be at least 0 and below 1, got 1.0"),
        ({"global_pool": "max"}, "global_pool must be 'avg' or '', got 'max'"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)


def test_small_images_are_refused_in_the_forward_too():
    with pytest.raises(ValueError, match="LITv2: images must be at least 29x29, got 32x28"):
        LITv2(width=32, num_heads=(1, 2, 4, 8), depths=(1, 1, 1, 1))(torch.randn(1, 3, 32, 28))


@pytest.mark.slow
def test_the_whole_graph_compiles():
    model = create(num_classes=10, img_size=64).train()
    mesa_train.wrap(model, "mesa8")
    images = torch.randn(4, 3, 64, 64)

    def gradients(function):
        model.zero_grad()
        function(images).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    expected = gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradient = gradients(compiled)
    assert (gradient - expected).norm() < 1e-5 * expected.norm()
