"""SPViT of DeiT and Swin against the authors' model: search, fine-tuning, folding."""

import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import zoo

import mesa_train.models
from mesa_train.models.common.swin import in_windows, shift_mask
from mesa_train.models.spvit import fold, load_official
from mesa_train.models.spvit.layers import FoldedConv, MixedConv
from mesa_train.models.spvit.network import masks_of, pruned_weights
from mesa_train.models.spvit.search import expected, gates

DEIT = {"img_size": 64, "embed_dim": 32, "num_heads": 2, "depth": 4, "num_classes": 10}
SWIN = {
    "img_size": 64,
    "embed_dim": 16,
    "num_heads": (2, 4),
    "depths": (2, 2),
    "window_size": 4,
    "num_classes": 10,
}
FAMILIES = {"deit": ("spvit_deit_ti", DEIT), "swin": ("spvit_swin_t", SWIN)}
EVERY_KIND = [[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]]
# (family, model, file, batch, lambda, target)
GOLDEN = [
    ("deit", "spvit_deit_ti", "spvit", 2, 20, 1.0),
    pytest.param("swin", "spvit_swin_t", "spvit_swin", 1, 2.8, 3.2, marks=pytest.mark.slow),
]


def create(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, **options)


def small(family, **options):
    name, sizes = FAMILIES[family]
    return create(name, **sizes | options)


def filled(family, model):
    rules = {
        "kernel_thresholds": lambda z: 0.8 + z,
        "kernel_thresholds_full": lambda z: 0.8 + z,
        "ffn_thresholds": lambda z: 0.3 + z,
        "head_probs": (lambda z: 0.01 * z) if family == "deit" else (lambda z: z),
    }
    return zoo.fill(model, rules)


def uniforms(model):
    shapes = [s for b in model.all_blocks() for s in ((3,), tuple(b.mlp.ffn_thresholds.shape))]
    return [torch.from_numpy(np.random.RandomState(200 + n).rand(*s)) for n, s in enumerate(shapes)]


@pytest.mark.parametrize(
    ("name", "parameters", "folded", "search", "flops"),
    [
        ("spvit_deit_ti", 4_873_422, 4_774_808, 5_730_064, 1.037),
        ("spvit_deit_s", 16_116_858, 15_870_724, 22_072_852, 3.347),
        ("spvit_deit_b", 46_207_987, 41_583_639, 86_608_924, 8.391),
        ("spvit_swin_t", 26_306_263, 26_232_230, None, 3.334),
    ],
)
def test_sizes_are_the_authors(name, parameters, folded, search, flops):
    with torch.device("meta"):
        networks = [create(name), create(name, folded=True), create(name, search=True)]
    counts = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert counts[:2] == [parameters, folded]
    if search is not None:
        assert counts[2] == search
    assert create(name).flops() / 1e9 == pytest.approx(flops, abs=5e-4)


def test_another_architecture_of_deit_b():
    keep = [1253, 610, 1343, 1912, 2354, 2306, 2483, 2753, 2869, 2860, 2443, 934]
    msa = [[1, 0, 0]] * 3 + [[1, 1, 0]] + [[1, 1, 1]] * 8
    with torch.device("meta"):
        model = create("spvit_deit_b", msa=msa, ffn_keep=keep)
        folded = create("spvit_deit_b", msa=msa, ffn_keep=keep, folded=True)
    assert sum(p.numel() for p in model.parameters()) == 62_256_336
    assert sum(p.numel() for p in folded.parameters()) == 58_320_928


@pytest.mark.parametrize(("family", "name", "file", "batch", "weight", "target"), GOLDEN)
def test_a_found_network_is_the_authors(family, name, file, batch, weight, target):
    reference = zoo.arrays(file)
    architecture = {"msa": reference["ft_msa"], "ffn_keep": reference["ft_keep"]}
    model = filled(family, create(name, **architecture)).eval()
    images = zoo.images(batch, 224)
    with torch.no_grad():
        zoo.close(model(images), reference["ft_logits"], atol=3e-5)
    model, images = model.double(), images.double().requires_grad_()
    logits, seen, named = zoo.check_stats(model, lambda: model(images), reference, "ft_")
    assert seen == named
    zoo.close(logits, reference["ft_logits_f64"], atol=1e-9)
    (logits * zoo.probe(batch).double()).sum().backward()
    zoo.check_gradients(model, images, reference, "ft_")
    folded = fold(copy.deepcopy(model))
    assert any(isinstance(m, FoldedConv) for m in folded.modules())
    assert not any(isinstance(m, MixedConv) for m in folded.modules())
    with torch.no_grad():
        zoo.close(folded(images), reference["ft_logits_f64"], atol=1e-9)
        if "ft_train_logits_f64" in reference:
            zoo.close(model.train()(images), reference["ft_train_logits_f64"], atol=1e-9)


@pytest.mark.parametrize(("family", "name", "file", "batch", "weight", "target"), GOLDEN)
def test_a_search_network_and_its_step_are_the_authors(family, name, file, batch, weight, target):
    reference = zoo.arrays(f"{file}_search")
    model = filled(family, create(name, search=True)).eval()
    images = zoo.images(batch, 224)
    with torch.no_grad():
        zoo.close(model(images), reference["eval_logits"], atol=3e-5)
        model, images = model.double(), images.double()
        run = lambda: model(images)  # noqa: E731
        logits, seen, named = zoo.check_stats(model, run, reference, "eval_")
    assert seen == named
    zoo.close(logits, reference["eval_logits_f64"], atol=1e-9)
    zoo.close(torch.stack(model.cost()), reference["eval_flops"], atol=0)
    images.requires_grad_()
    logits = model.train()(images, uniforms(model))
    zoo.close(logits, reference["train_logits_f64"], atol=1e-9)
    classification = F.cross_entropy(logits, zoo.labels(batch))
    budget = model.budget_loss(target, weight)
    assert classification.item() == pytest.approx(float(reference["train_cls"]), rel=1e-12)
    assert budget.item() == pytest.approx(float(reference["train_bop"]), rel=1e-12)
    (classification + budget).backward()
    zoo.check_gradients(model, images, reference, "train_")
    thresholds = torch.stack([b.attn.thresholds.grad for b in model.all_blocks()])
    zoo.close(thresholds, reference["train_kernel_threshold_grad"], atol=1e-9)
    buffers = dict(model.named_buffers())
    sums = torch.stack([buffers[n].sum() for n in reference["train_bn_keys"].tolist()])
    zoo.close(sums, reference["train_bn_sum"], atol=1e-9)


def test_gates_are_hard_and_their_gradient_soft():
    thresholds = torch.tensor([-3.0, -0.1, 0.1, 3.0], requires_grad=True)
    assert gates(thresholds, training=False).tolist() == [0, 0, 1, 1]
    drawn = gates(thresholds, True, torch.tensor([0.9, 0.9, 0.9, 0.9]))
    assert drawn.tolist() == [0, 1, 1, 1]
    drawn.sum().backward()
    soft = torch.sigmoid(thresholds.detach() + torch.tensor(0.9).logit())
    torch.testing.assert_close(thresholds.grad, soft * (1 - soft))
    thresholds.grad = None
    on = expected(thresholds)
    assert on.tolist() == [0, 0, 1, 1]
    on.sum().backward()
    p = thresholds.detach().sigmoid()
    soft = (p - 0.5).sigmoid()
    torch.testing.assert_close(thresholds.grad, soft * (1 - soft) * p * (1 - p))


def convolution_literally(layer, u):
    """The authors' formula of a 3x3 layer on a map, position by position, in float64."""
    heads, columns = layer.head_probs.shape[0], layer.mixing.columns
    p = (layer.head_probs / layer.mixing.alpha).softmax(0)
    v = F.linear(u, layer.v.weight, layer.v.bias).unflatten(-1, (heads, -1))
    constant = layer.v.bias.view(heads, -1)
    out = torch.zeros(*u.shape[:3], v.shape[-1], dtype=u.dtype)
    height, width = u.shape[1:3]
    for dx in (-1, 0, 1):
        for dy in (-1, 0, 1):
            weight = p[:, columns[(dy + 1) + 3 * (dx + 1)]]
            values = torch.einsum("h,bywhd->bywd", weight, v - constant)
            shifted = torch.zeros_like(values)
            ys, xs = slice(max(-dy, 0), height - max(dy, 0)), slice(max(-dx, 0), width - max(dx, 0))
            ty, tx = slice(max(dy, 0), height + min(dy, 0)), slice(max(dx, 0), width + min(dx, 0))
            shifted[:, ys, xs] = values[:, ty, tx]
            out = out + shifted + weight @ constant
    hidden = F.relu(layer.norm(out.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    o = torch.einsum("hk,chd->cd", p, layer.proj.weight.unflatten(1, (heads, -1)))
    return hidden @ o.t() + layer.proj.bias


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_convolution_is_the_formula(family):
    model = filled(family, small(family, msa=EVERY_KIND)).double().eval()
    layer = next(m for m in model.modules() if isinstance(m, MixedConv) and m.side == 3)
    layer.grid = None
    u = torch.randn(2, 4, 5, layer.v.weight.shape[1]).double()
    torch.testing.assert_close(layer(u), convolution_literally(layer, u))


def test_windows_are_swins():
    x = torch.arange(64.0).view(1, 8, 8, 1)
    assert torch.equal(in_windows(x, (4, 4), 2, lambda w: w), x)
    seen = []
    in_windows(x, (4, 4), 2, lambda w: seen.append(w.squeeze(-1)) or w)
    mask = shift_mask((8, 8), (4, 4), 2)
    assert mask.shape == (4, 16, 16)
    # Tokens of a window see each other where they are neighbours in the image.
    for window, allowed in zip(seen[0], mask == 0, strict=True):
        rows, columns = window // 8, window % 8
        near = (rows[:, None] - rows).abs().max(), (columns[:, None] - columns).abs().max()
        expected_mask = ((rows[:, None] - rows).abs() < 4) & (
            (columns[:, None] - columns).abs() < 4
        )
        assert torch.equal(allowed, expected_mask), near


@pytest.mark.parametrize("family", FAMILIES)
def test_from_pretrained_weights_over_the_search_to_the_fine_tuning(tmp_path, family):
    # A pretrained network has q, k and v in one Linear.
    whole = small(family, msa=[[1, 1, 1]] * 4)
    pretrained = {}
    for key, value in whole.state_dict().items():
        if ".attn.v." in key:
            qk = whole.state_dict()[key.replace(".v.", ".qk.")]
            pretrained[key.replace(".v.", ".qkv.")] = torch.cat([qk, value])
        elif ".attn.qk." not in key:
            pretrained[key] = value
    torch.save({"model": pretrained}, tmp_path / "pretrained.pth")
    search = filled(family, small(family, search=True))
    load_official(search, tmp_path / "pretrained.pth")
    for key, value in whole.state_dict().items():
        assert torch.equal(search.state_dict()[key], value), key
    with torch.no_grad():
        for block, kind in zip(search.all_blocks(), EVERY_KIND, strict=True):
            block.attn.thresholds.copy_(torch.tensor(kind) - 0.5)
    found = search.architecture()
    assert found.msa == EVERY_KIND
    masks = masks_of(search.state_dict())
    assert [int(mask.sum()) for mask in masks.values()] == found.ffn_keep
    assert 0 < found.ffn_keep[0] < len(masks[next(iter(masks))])
    torch.save(pruned_weights(pretrained, masks), tmp_path / "pruned.pth")
    tuned = filled(family, small(family, msa=found.msa, ffn_keep=found.ffn_keep))
    load_official(tuned, tmp_path / "pruned.pth")
    name, mask = next(iter(masks.items()))
    assert torch.equal(
        tuned.get_submodule(name).mlp.fc2.weight,
        pretrained[f"{name}.mlp.fc2.weight"][:, mask.bool()],
    )
    assert torch.equal(
        tuned.get_submodule(name).attn.v.weight, whole.get_submodule(name).attn.v.weight
    )
    # The cost of the found network is the cost that the search expects.
    assert tuned.flops() == search.flops()
    # A folded network of the same architecture takes the folded weights.
    other = small(family, msa=found.msa, ffn_keep=found.ffn_keep, folded=True).eval()
    other.load_state_dict(fold(tuned).state_dict())
    size = 64
    images = torch.randn(2, 3, size, size)
    assert torch.equal(other(images), tuned.eval()(images))


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_keeps_the_outputs(family):
    model = filled(family, small(family, msa=EVERY_KIND)).eval()
    images = torch.randn(2, 3, 64, 64)
    expected_logits = model(images)
    folded = fold(copy.deepcopy(model))
    torch.testing.assert_close(folded(images), expected_logits, atol=1e-5, rtol=1e-5)
    assert not any("head_probs" in name for name in folded.state_dict())
    with pytest.raises(ValueError, match="found architecture, got a search network"):
        fold(small(family, search=True))


def test_a_skip_adds_the_normalised_input():
    model = small("deit", msa=[[0, 0, 0]] * 4).eval()
    x = torch.randn(2, 17, 32)
    block = model.blocks[0]
    torch.testing.assert_close(
        block(x), x + block.norm1(x) + block.mlp(block.norm2(x + block.norm1(x)))
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_forwards_write_no_buffer_but_batch_norms(family):
    model = small(family, search=True).train()
    before = {k: b.clone() for k, b in model.named_buffers() if ".bn_" not in k}
    with torch.no_grad():
        for block in model.all_blocks():
            block.mlp.ffn_thresholds[:5] = -1
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    for key, value in model.named_buffers():
        assert ".bn_" in key or torch.equal(value, before[key])
    copy.deepcopy(model)
    masks = masks_of(model.state_dict())
    assert all(mask[:5].sum() == 0 and mask[5:].all() for mask in masks.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_blocks_use_the_same_draws(family):
    images, gradients = torch.randn(2, 3, 64, 64), []
    for enable in (False, True):
        model = small(family, search=True).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(5)
        (model(images).square().sum() + model.budget_loss(0.01, 1.0)).backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"msa": [[1, 1, 1]]}, "msa must have 4 entries, got 1"),
        ({"msa": [[0, 1, 0]] * 4}, r"msa\[0\] must be one of \[1, 1, 1\], .*, got \[0, 1, 0\]"),
        ({"ffn_keep": [0, 1, 1, 1]}, r"ffn_keep\[0\] must be from 1 to \d+, got 0"),
        ({"ffn_keep": [1, 1, 1]}, "ffn_keep must have 4 entries, got 3"),
        ({"search": True, "ffn_keep": [1] * 4}, "search=True finds msa and ffn_keep"),
        ({"img_size": 60}, "img_size must (be a|give maps that are) multiple"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_bad_options_are_named(family, options, message):
    with pytest.raises(ValueError, match=message):
        small(family, **options)


def test_what_cannot_be_pruned_or_found_is_refused():
    model = small("deit", msa=EVERY_KIND)
    with pytest.raises(RuntimeError, match="only a search network"):
        model.architecture()
    with pytest.raises(ValueError, match=r"the weights have no blocks\.9\.mlp\.fc1\.weight"):
        pruned_weights(model.state_dict(), {"blocks.9": torch.ones(128)})
    with pytest.raises(ValueError, match=r"blocks\.0 has 128 hidden units, its mask 3"):
        pruned_weights(model.state_dict(), {"blocks.0": torch.ones(3)})


def test_registration():
    names = {"spvit_deit_ti", "spvit_deit_s", "spvit_deit_b", "spvit_swin_t", "spvit_swin_s"}
    assert names <= set(timm.list_models("spvit_*"))
    assert mesa_train.models.spvit is not None
