"""ViT-22B's block equals its unfused parts in float64, and weights convert between layouts exactly."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.layers import RmsNorm
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import nn
from vit22b_helpers import HEADS, TOKENS, WIDTH, block, tiny

from mesa_train.models.vit22b import convert as vit22b_convert
from mesa_train.models.vit22b import layers
from mesa_train.models.vit22b import model as vit22b


class Unfused(nn.Module):
    """The same block as seven Linears and three norms, written down from the paper."""

    def __init__(self, plain, qk_norm, gelu):
        super().__init__()
        self.plain = nn.ParameterDict({n.replace(".", "/"): v for n, v in plain.items()})
        self.qk_norm, self.gelu = qk_norm, gelu

    def heads(self, x, name):
        x = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        if name == "v" or self.qk_norm == "none":
            return x
        if self.qk_norm == "layer":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + layers.EPS).sqrt()
        return x * self.plain[f"{name}_norm/weight"]

    def forward(self, x):
        p = self.plain
        y = x / (x.square().mean(-1, keepdim=True) + layers.EPS).sqrt() * p["norm/weight"]
        q, k, v = [self.heads(y @ p[f"{n}/weight"].T, n) for n in "qkv"]
        weights = (q @ k.mT / (WIDTH // HEADS) ** 0.5).softmax(-1)
        attention = (weights @ v).transpose(1, 2).flatten(2) @ p["proj/weight"].T
        hidden = F.gelu(y @ p["fc1/weight"].T + p["fc1/bias"], approximate=self.gelu)
        return x + attention + hidden @ p["fc2/weight"].T + p["fc2/bias"]


def gradients(module, x):
    """(output, gradient of x, gradients by name)."""
    x = x.clone().requires_grad_()
    output = module(x)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    expected = dict(module.named_parameters())
    result = torch.autograd.grad(output, [x, *expected.values()], weights)
    return output, result[0], dict(zip(expected, result[1:], strict=True))


@pytest.mark.parametrize("qk_norm", layers.QK_NORMS)
@pytest.mark.parametrize("gelu", layers.GELUS)
def test_fused_equals_unfused_in_float64(qk_norm, gelu):
    fused = block(qk_norm=qk_norm, gelu=gelu)
    state = {f"blocks.0.{n}": v for n, v in fused.state_dict().items()}
    plain = dict(vit22b_convert.to_plain(state, HEADS))
    unfused = Unfused({n.removeprefix("blocks.0."): v for n, v in plain.items()}, qk_norm, gelu)
    x = torch.randn(3, TOKENS, WIDTH, dtype=torch.float64)
    output, dx, grads = gradients(fused, x)
    expected, expected_dx, by_name = gradients(unfused, x)
    # float64's rounding over sums of 512 products.
    assert_close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11)
    assert_close(output, expected)
    assert_close(dx, expected_dx)
    back = {f"blocks.0.{n.removeprefix('plain.').replace('/', '.')}": g for n, g in by_name.items()}
    for name, gradient in vit22b_convert.from_plain(back, HEADS):
        assert_close(grads[name.removeprefix("blocks.0.")], gradient, msg=name)


@pytest.mark.parametrize("fuse_out_proj", [True, False])
def test_timms_block_gives_the_same_and_comes_back(fuse_out_proj):
    timm_model = VisionTransformer(
        img_size=56, patch_size=14, embed_dim=WIDTH, depth=2, num_heads=HEADS, num_classes=5,
        qkv_bias=False, qk_norm=True, norm_layer=RmsNorm, class_token=False, global_pool="map",
        block_fn=partial(ParallelScalingBlock, fuse_out_proj=fuse_out_proj),
    ).double()  # fmt: skip
    for name, parameter in timm_model.named_parameters():
        # Zeros and ones would hide a parameter that goes to the wrong place.
        nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    vit22b_model = vit22b.ViT22B(
        img_size=56, embed_dim=WIDTH, depth=2, num_heads=HEADS, num_classes=5, gelu="none"
    ).double()
    state = dict(vit22b_convert.from_timm(timm_model.state_dict(), HEADS))
    vit22b_model.load_state_dict(state)
    images = torch.randn(2, 3, 56, 56, dtype=torch.float64)
    torch.testing.assert_close(vit22b_model(images), timm_model(images), rtol=1e-10, atol=1e-10)
    back = dict(vit22b_convert.to_timm(state, HEADS, fuse_out_proj))
    assert back.keys() == timm_model.state_dict().keys()
    timm_model.load_state_dict(back)
    torch.testing.assert_close(vit22b_model(images), timm_model(images), rtol=1e-10, atol=1e-10)


def test_plain_layout_is_a_permutation():
    state = tiny().state_dict()
    plain = dict(vit22b_convert.to_plain(state, 4))
    assert plain["blocks.2.q.weight"].shape == (64, 64)
    assert plain["blocks.2.fc2.weight"].shape == (64, 256)
    back = dict(vit22b_convert.from_plain(plain, 4))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[n], v) for n, v in state.items())


def test_flax_arrays_come_in():
    model = tiny().double()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    plain = dict(vit22b_convert.to_plain(model.state_dict(), 4))
    attention = "MultiHeadDotProductAttention_0"
    flax = {
        "params/embedding/kernel": plain["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "params/embedding/bias": plain["patch_embed.proj.bias"],
        "params/pos_embedding": plain["pos_embed"],
        "params/Transformer/encoder_norm/scale": plain["norm.weight"],
        "params/head/kernel": plain["head.weight"].t(),
        "params/head/bias": plain["head.bias"],
    }
    for i in range(3):
        prefix, flax_prefix = f"blocks.{i}.", f"params/Transformer/encoderblock_{i}/"
        flax[flax_prefix + "LayerNorm_0/scale"] = plain[prefix + "norm.weight"]
        for a, b in (("query", "q"), ("key", "k"), ("value", "v")):
            kernel = plain[f"{prefix}{b}.weight"].t().unflatten(1, (4, 16))
            flax[f"{flax_prefix}{attention}/{a}/kernel"] = kernel
        out = plain[prefix + "proj.weight"].t().unflatten(0, (4, 16))
        flax[f"{flax_prefix}{attention}/out/kernel"] = out
        flax[f"{flax_prefix}{attention}/query_ln/scale"] = plain[prefix + "q_norm.weight"]
        flax[f"{flax_prefix}{attention}/key_ln/scale"] = plain[prefix + "k_norm.weight"]
        for j in (0, 1):
            flax[f"{flax_prefix}MlpBlock_0/Dense_{j}/kernel"] = plain[
                f"{prefix}fc{j + 1}.weight"
            ].t()
            flax[f"{flax_prefix}MlpBlock_0/Dense_{j}/bias"] = plain[f"{prefix}fc{j + 1}.bias"]
    pool, kv = "params/MAPHead_0/", plain["attn_pool.kv.weight"].split(64)
    flax[pool + "probe"] = plain["attn_pool.latent"]
    weights = {"query": plain["attn_pool.q.weight"], "key": kv[0], "value": kv[1]}
    biases = dict(zip(("key", "value"), plain["attn_pool.kv.bias"].split(64), strict=True))
    biases["query"] = plain["attn_pool.q.bias"]
    for a, weight in weights.items():
        flax[f"{pool}{attention}/{a}/kernel"] = weight.t().unflatten(1, (4, 16))
        flax[f"{pool}{attention}/{a}/bias"] = biases[a].unflatten(0, (4, 16))
    out = plain["attn_pool.proj.weight"].t().unflatten(0, (4, 16))
    flax[f"{pool}{attention}/out/kernel"] = out
    flax[f"{pool}{attention}/out/bias"] = plain["attn_pool.proj.bias"]
    flax[pool + "LayerNorm_0/scale"] = plain["attn_pool.norm.weight"]
    for j in (0, 1):
        flax[f"{pool}MlpBlock_0/Dense_{j}/kernel"] = plain[f"attn_pool.mlp.fc{j + 1}.weight"].t()
        flax[f"{pool}MlpBlock_0/Dense_{j}/bias"] = plain[f"attn_pool.mlp.fc{j + 1}.bias"]
    arrays = {name: value.contiguous().numpy() for name, value in flax.items()}
    converted = dict(vit22b_convert.from_flax(arrays, 4))
    assert converted.keys() == model.state_dict().keys()
    assert all(torch.equal(converted[n], v) for n, v in model.state_dict().items())
    with pytest.raises(ValueError, match="'what' is not a parameter of a ViT-22B"):
        list(vit22b_convert.from_flax({"params/what": arrays["params/head/bias"]}, 4))


def test_conversion_names_what_is_wrong():
    state = dict(vit22b_convert.to_plain(tiny().state_dict(), 4))
    with pytest.raises(ValueError, match=r"blocks\.0\.q\.weight of shape \(64, 64\) .* 5 heads"):
        list(vit22b_convert.from_plain(state, 5))
    del state["blocks.1.fc1.bias"]
    with pytest.raises(ValueError, match=r"blocks\.1\.fc1\.bias is missing"):
        list(vit22b_convert.from_plain(state, 4))
    with pytest.raises(ValueError, match=r"no parameter is named blocks\.N"):
        list(vit22b_convert.from_plain({"encoder.weight": torch.zeros(2)}, 4))
