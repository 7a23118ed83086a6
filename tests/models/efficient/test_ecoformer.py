"""EcoFormer against the authors' model; the fit of its hashes; weights from PVTv2 and Twins."""

import copy

import numpy as np
import pytest
import timm
import torch
import torch.multiprocessing
import zoo
from hash_worker import run, small

import mesa_train.models
from mesa_train.models.ecoformer import fit_hashes, hashes_fitted, load_official
from mesa_train.models.ecoformer.attention import EcoFormerAttention
from mesa_train.models.ecoformer.fit import fit_hash

HASH = {
    "ksh.A": lambda z: z,
    "ksh.mvec": lambda z: 0.6 + 0.02 * z,
    "ksh.anchor": lambda z: z / np.linalg.norm(z, axis=-1, keepdims=True),
}


def create(name="ecoformer_pvt_v2_b0", **options):
    torch.manual_seed(0)
    return timm.create_model(name, **options)


@pytest.mark.parametrize(
    (
        "name",
        "parameters",
        "of_msa",
        "multiplications",
        "additions",
        "energy",
        "of_msa_energy",
        "keys",
    ),
    [
        ("pvt_v2_b0", 3_136_328, 3_198_280, 0.530, 0.559, 2.47, 9.23, 174),
        ("pvt_v2_b1", 11_891_368, 12_138_152, 2.019, 2.078, 9.34, 23.0, 174),
        ("pvt_v2_b2", 20_367_528, 21_062_376, 3.835, 3.948, 17.7, 39.6, 328),
        ("pvt_v2_b3", 34_084_008, 36_011_496, 6.518, 6.691, 30.1, 54.4, 568),
        ("pvt_v2_b4", 45_665_704, 48_583_720, 9.538, 9.791, 44.1, 73.3, 828),
        ("twins_svt_s", 21_522_088, 22_221_352, 2.713, 2.802, 12.6, None, 328),
    ],
)
def test_sizes_are_the_authors(
    name, parameters, of_msa, multiplications, additions, energy, of_msa_energy, keys
):
    with torch.device("meta"):
        model, msa = create(f"ecoformer_{name}"), create(f"ecoformer_{name}", attention="msa")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in msa.parameters()) == of_msa
    counted = [count / 1e9 for count in model.operations()]
    assert counted == pytest.approx([multiplications, additions], abs=6e-4)
    assert model.energy_pj() / 1e9 == pytest.approx(energy, abs=0.05)
    if of_msa_energy is not None:
        assert msa.energy_pj() / 1e9 == pytest.approx(of_msa_energy, abs=0.05)
    assert len(model.state_dict()) == keys


@pytest.mark.parametrize(
    ("file", "prefix", "name", "size"),
    [
        ("ecoformer", "b0_112_", "ecoformer_pvt_v2_b0", 112),
        ("ecoformer", "b0_224_", "ecoformer_pvt_v2_b0", 224),
        pytest.param("ecoformer_twins", "", "ecoformer_twins_svt_s", 112, marks=pytest.mark.slow),
    ],
)
def test_logits_outputs_and_gradients_are_the_authors(file, prefix, name, size):
    reference = zoo.arrays(file)
    model = zoo.fill(create(name), HASH).eval()
    images = zoo.images(len(reference[f"{prefix}logits"]), size)
    with torch.no_grad():
        # A bit whose score is within 2e-6 of 0 could flip; none does.
        zoo.close(model(images), reference[f"{prefix}logits"], atol=3e-5)
    model, images = model.double(), images.double().requires_grad_()
    if f"{prefix}stat_names" not in reference:
        with torch.no_grad():
            zoo.close(model(images), reference[f"{prefix}logits_f64"], atol=1e-9)
        return
    logits, seen, named = zoo.check_stats(model, lambda: model(images), reference, prefix)
    assert seen == named
    zoo.close(logits, reference[f"{prefix}logits_f64"], atol=1e-9)
    (logits * zoo.probe(len(images)).double()).sum().backward()
    zoo.check_gradients(model, images, reference, prefix)


@pytest.fixture
def layer():
    eightfold = {**HASH, "ksh.A": lambda z: 8 * z}
    return zoo.fill(EcoFormerAttention(64, 2), eightfold).double()


def tokens(seed=0):
    return torch.from_numpy(np.random.RandomState(seed).randn(2, 144, 64))


def codes(layer, x):
    return layer.fast_attention.ksh(layer.unit_vectors(x)).detach()


def test_a_layer_is_the_authors_where_most_bits_have_no_gradient(layer):
    reference = zoo.arrays("ecoformer_layer")
    x = tokens().requires_grad_()
    out = layer(x)
    zoo.close(out[:, ::4], reference["layer_out"], atol=1e-9)
    assert np.array_equal(codes(layer, x), reference["layer_codes"])
    (out * tokens(1) / 8).sum().backward()
    zoo.close(x.grad[:, ::8], reference["layer_x_grad"], atol=1e-9)
    zoo.check_gradients(layer, x, reference, "layer_")


def test_the_fit_is_the_authors(layer):
    reference = zoo.arrays("ecoformer_layer")
    ksh = layer.fast_attention.ksh
    ksh.A.copy_(zoo.value_of("A", ksh.A.shape, {"A": lambda z: z}))
    fit = fit_hash(ksh, layer.unit_vectors(tokens()), torch.arange(0, 121, 5))
    for name in ("A", "mvec", "anchor"):
        zoo.close(getattr(ksh, name), reference[f"ksh_{name}"], atol=1e-12)
    zoo.close(
        torch.stack([fit.first_loss, fit.last_loss], 1), reference["ksh_loss_first_last"], 1e-12
    )
    assert np.array_equal(fit.accepted, reference["ksh_accepted"])
    assert np.array_equal(codes(layer, tokens()), reference["ksh_codes_after"])


def test_a_map_and_its_tokens_are_one_input(layer):
    x = tokens()
    assert torch.equal(layer(x.view(2, 12, 12, 64)).flatten(1, 2), layer(x))


def test_the_consistent_kernel_averages_all_values(layer):
    other = EcoFormerAttention(64, 2, kernel="consistent").double()
    other.load_state_dict(layer.state_dict())
    x, ones = tokens(), torch.ones(2, 2, 144, 32).double()
    heads = layer._heads(x)
    # Its weights sum to 1: constant values stay what they are. The official form's do not.
    torch.testing.assert_close(other.fast_attention(heads, ones), ones)
    assert (layer.fast_attention(heads, ones) - ones).abs().max() > 0.1
    h = other.fast_attention.codes(heads)
    weights = h @ h.transpose(-2, -1) + 17
    expected = weights / weights.sum(-1, keepdim=True) @ heads
    torch.testing.assert_close(other.fast_attention(heads, heads), expected)
    with pytest.raises(
        ValueError, match="kernel must be one of official, consistent, got 'linear'"
    ):
        EcoFormerAttention(64, 2, kernel="linear")


def test_a_zero_token_stays_finite(layer):
    with torch.no_grad():
        layer.to_qk.bias.zero_()
    x = tokens()
    x[:, 0] = 0
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad.isfinite().all()


def hashes(model):
    return {key: value.clone() for key, value in model.named_buffers()}


def test_the_fit_is_explicit_seeded_and_in_the_state_dict():
    torch.manual_seed(0)
    model = small().train()
    images = torch.randn(2, 3, 80, 80)
    untouched = hashes(model)
    model(images).sum().backward()
    assert not hashes_fitted(model)
    for key, value in hashes(model).items():
        assert torch.equal(value, untouched[key])
    parameters = [p.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    fits = fit_hashes(model, images, steps=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(fits) == 3
    assert hashes_fitted(model)
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), parameters, strict=True))
    # The fit improves the loss, and it does not depend on torch's generators.
    assert all((fit.last_loss < fit.first_loss).float().mean() > 0.8 for fit in fits)
    torch.manual_seed(0)
    again = small().train()
    again.load_state_dict({**model.state_dict(), **untouched})
    torch.manual_seed(7)
    fit_hashes(again, images, steps=5)
    for key, value in hashes(model).items():
        assert torch.equal(value, hashes(again)[key]), key
    fresh = small()
    fresh.load_state_dict(model.state_dict())
    assert hashes_fitted(fresh)
    assert torch.equal(fresh.eval()(images), model.eval()(images))
    again.load_state_dict({**model.state_dict(), **untouched})
    fit_hashes(again, images, seed=1, steps=5)
    assert not torch.equal(
        again.block1[0].attn.fast_attention.ksh.anchor,
        model.block1[0].attn.fast_attention.ksh.anchor,
    )


def test_the_fit_is_the_same_under_mesa_train():
    torch.manual_seed(0)
    model = small()
    wrapped = mesa_train.wrap(copy.deepcopy(model), "mesa4")
    images = torch.randn(2, 3, 80, 80)
    fit_hashes(model, images, steps=5)
    fit_hashes(wrapped, images, steps=5)
    for key, value in hashes(model).items():
        assert torch.equal(value, hashes(wrapped)[key]), key


@pytest.mark.slow
def test_all_ranks_get_the_hashes_of_rank_0(tmp_path):
    torch.multiprocessing.spawn(run, (str(tmp_path),), nprocs=2)
    (fits, first), (others, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert (fits, others) == (3, 0)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    torch.manual_seed(0)
    assert not torch.equal(
        first["block1.0.attn.fast_attention.ksh.A"], small().block1[0].attn.fast_attention.ksh.A
    )


def test_what_cannot_be_fitted_is_refused_and_changes_nothing():
    model = small()
    before = hashes(model)
    with pytest.raises(ValueError, match="needs at least 25 tokens, got 16; take larger images"):
        fit_hashes(model, torch.randn(1, 3, 64, 64), steps=1)
    for key, value in hashes(model).items():
        assert torch.equal(value, before[key])
    with pytest.raises(ValueError, match="Linear has no EcoFormerAttention layer to fit"):
        fit_hashes(torch.nn.Linear(2, 2), torch.randn(1, 2))
    with pytest.raises(
        ValueError, match="attention must be one of ecoformer, msa, got 'performer'"
    ):
        create(attention="performer")


def test_weights_pass_from_pvt_to_softmax_attention_to_codes(tmp_path):
    msa = create(attention="msa")
    official = {}
    for key, value in msa.state_dict().items():
        if ".attn.qkv." in key and not key.startswith("block4"):
            dim = len(value) // 3
            official[key.replace("qkv", "q")] = value[:dim]
            official[key.replace("qkv", "kv")] = value[dim:]
            if key.endswith("weight"):
                official[key.replace("qkv", "sr")] = torch.zeros(dim, dim, 2, 2)
                official[key.replace("qkv", "norm")] = torch.zeros(dim)
        else:
            official[key] = value
    torch.save(official, tmp_path / "pvt.pth")
    second = zoo.fill(create(attention="msa"))
    load_official(second, tmp_path / "pvt.pth")
    for key, value in msa.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key
    torch.save(msa.state_dict(), tmp_path / "msa.pth")
    for file in ("pvt.pth", "msa.pth"):
        model = zoo.fill(create(), HASH)
        before = hashes(model)
        load_official(model, tmp_path / file)
        qkv = msa.block1[0].attn.qkv
        attn = model.block1[0].attn
        assert torch.equal(attn.to_qk.weight, qkv.weight[:32])
        assert torch.equal(attn.to_v.bias, qkv.bias[64:])
        for key, value in hashes(model).items():
            assert torch.equal(value, before[key])
    torch.save({"model": model.state_dict()}, tmp_path / "eco.pth")
    other = create()
    load_official(other, tmp_path / "eco.pth")
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)


@pytest.mark.parametrize("name", ["ecoformer_pvt_v2_b0", "ecoformer_twins_svt_s"])
def test_features_and_heads_are_timms(name):
    options = {"widths": (8, 16, 16, 32), "num_heads": (1, 2, 2, 4), "depths": (1, 1, 1, 1)}
    model = create(name, num_classes=10, **options).eval()
    images = torch.randn(2, 3, 96, 64)
    assert model(images).shape == (2, 10)
    final, maps = model.forward_intermediates(images)
    assert [tuple(m.shape) for m in maps] == [
        (2, 8, 24, 16),
        (2, 16, 12, 8),
        (2, 16, 6, 4),
        (2, 32, 3, 2),
    ]
    assert torch.equal(final, model.forward_features(images))
    model.prune_intermediate_layers([0, 1])
    assert len(model.forward_intermediates(images, intermediates_only=True)) == 2


def test_registration():
    names = {*(f"ecoformer_pvt_v2_b{i}" for i in range(5)), "ecoformer_twins_svt_s"}
    assert names <= set(timm.list_models("ecoformer_*"))
