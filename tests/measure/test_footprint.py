"""Bytes from first principles, on real and on fake tensors; the model is as it was afterwards."""

import copy
import json
import sys
import types

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import mesa_train
from mesa_train import Policy
from mesa_train.measure.footprint import footprint

BF16 = torch.bfloat16


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def grad_randn(*shape, **kwargs):
    return torch.randn(*shape, requires_grad=True, **kwargs)


@pytest.fixture(params=[False, True], ids=["real", "fake"])
def fake(request):
    return request.param


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=10)
    return model.train()


class TestFirstPrinciples:
    def test_linear_keeps_its_input(self, fake):
        counted = footprint(nn.Linear(6, 5), torch.randn(3, 4, 6), fake=fake)
        assert counted.saved_bytes == 3 * 4 * 6 * 4
        assert counted.parameter_bytes == (6 * 5 + 5) * 4
        assert counted.by_operator == {"linear": 288}
        assert counted.by_dtype == {"float32": 288}
        assert counted.by_module == {"": 288}

    def test_autocast_counts_casts_of_input_and_weight(self, fake):
        counted = footprint(nn.Linear(6, 5), grad_randn(4, 6), autocast=BF16, fake=fake)
        assert counted.by_operator == {"weight cast": 6 * 5 * 2, "linear": 4 * 6 * 2}
        assert counted.by_dtype == {"bfloat16": 108}

    def test_frozen_weight_keeps_no_input(self, fake):
        model = nn.Linear(6, 5).requires_grad_(False)
        assert footprint(model, grad_randn(4, 6), fake=fake).saved_bytes == 0

    def test_layer_norm_keeps_input_and_two_statistics(self, fake):
        counted = footprint(nn.LayerNorm(8), torch.randn(5, 8), fake=fake)
        assert counted.by_operator == {"layer_norm": 5 * 8 * 4 + 2 * 5 * 4}

    def test_conv_keeps_its_input(self, fake):
        counted = footprint(nn.Conv2d(3, 4, 3), torch.randn(2, 3, 9, 9), fake=fake)
        assert counted.by_operator == {"conv2d": 2 * 3 * 9 * 9 * 4}

    def test_batch_norm_keeps_input_and_two_statistics(self, fake):
        counted = footprint(nn.BatchNorm2d(3), torch.randn(2, 3, 5, 5), fake=fake)
        assert counted.by_operator == {"batch_norm": 2 * 3 * 5 * 5 * 4 + 2 * 3 * 4}
        assert counted.buffer_bytes == 2 * 3 * 4 + 8

    def test_attention_keeps_q_k_v_output_and_logsumexp(self, fake):
        batch, heads, tokens, width = 2, 3, 7, 8
        q, k, v = (grad_randn(batch, heads, tokens, width) for _ in range(3))
        counted = footprint(Call(F.scaled_dot_product_attention), (q, k, v), fake=fake)
        elements = batch * heads * tokens * (4 * width + 1)
        assert counted.by_operator == {"scaled_dot_product_attention": elements * 4}

    def test_one_storage_counts_once_and_whole(self, fake):
        def three_views(x):
            a, b, c = (x + 0).chunk(3, dim=-1)
            return a.sin() + b.sin() + c.sin()

        counted = footprint(Call(three_views), grad_randn(4, 12), fake=fake)
        assert counted.saved_bytes == 4 * 12 * 4
        assert len(counted.rows) == 1

    def test_what_the_graph_dropped_does_not_count(self, fake):
        def with_a_dead_branch(x):
            x.exp()
            F.softmax(x @ x.mT, -1).square().sum()
            return x.sin()

        counted = footprint(Call(with_a_dead_branch), grad_randn(4, 4), fake=fake)
        assert counted.by_operator == {"sin": 64}

    def test_loss_counts_with_it(self, fake):
        def loss(scores):
            return F.cross_entropy(scores, torch.zeros(4, dtype=torch.long))

        model, x = nn.Linear(6, 5), torch.randn(4, 6)
        # log_softmax keeps its output, nll_loss its targets and the total weight.
        extra = 4 * 5 * 4 + 4 * 8 + 4
        with_loss = footprint(model, x, loss=loss, fake=fake)
        assert with_loss.saved_bytes == footprint(model, x, fake=fake).saved_bytes + extra
        assert with_loss.by_operator["cross_entropy"] == extra

    def test_vit_block(self, fake):
        """36C + 4H + 16 bytes a token and 24C^2 of weight casts a block, under bf16 autocast."""
        width, heads, tokens, batch = 192, 3, 17, 4
        models = [timm.create_model("vit_tiny_patch16_224", img_size=64, depth=d) for d in (1, 3)]
        images = torch.randn(batch, 3, 64, 64)
        one, three = (footprint(m.train(), images, autocast=BF16, fake=fake) for m in models)
        casts = three.by_operator["weight cast"] - one.by_operator["weight cast"]
        assert casts == 2 * 24 * width**2
        saved = three.saved_bytes - one.saved_bytes - casts
        assert saved == 2 * (36 * width + 4 * heads + 16) * tokens * batch

    def test_checkpointed_block_keeps_its_input(self, fake):
        width, tokens, batch = 192, 17, 4
        models = [timm.create_model("vit_tiny_patch16_224", img_size=64, depth=d) for d in (1, 3)]
        images = torch.randn(batch, 3, 64, 64)
        one, three = (
            footprint(m.train(), images, autocast=BF16, policy="checkpoint", fake=fake)
            for m in models
        )
        assert three.saved_bytes - one.saved_bytes == 2 * 4 * width * tokens * batch
        assert three.by_operator["checkpoint"] == 3 * 4 * width * tokens * batch

    def test_a_checkpoint_in_the_model_itself(self, fake):
        class Halves(nn.Module):
            def __init__(self):
                super().__init__()
                self.mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

            def forward(self, x):
                return checkpoint(self.mlp, x, use_reentrant=False)

        counted = footprint(Halves(), grad_randn(4, 8), fake=fake)
        assert counted.by_operator == {"checkpoint": 4 * 8 * 4}


class TestFakes:
    @pytest.mark.slow
    @pytest.mark.parametrize("policy", ["plain", "mesa8", "mesa4-recompute", "checkpoint"])
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}),
            ("swin_tiny_patch4_window7_224", {"img_size": 64, "depths": (1, 2, 1, 1)}),
            ("resnet18", {}),
        ],
    )
    def test_same_rows_as_real(self, name, options, policy):
        model = timm.create_model(name, **options).train()
        images = torch.randn(2, 3, 64, 64)
        real = footprint(model, images, autocast=BF16, policy=policy)
        assert footprint(model, images, autocast=BF16, policy=policy, fake=True).rows == real.rows

    def test_meta_model_is_counted_as_on_the_cpu(self, vit):
        images = torch.randn(2, 3, 64, 64)
        real = footprint(vit, images, autocast=BF16)
        meta = copy.deepcopy(vit).to("meta")
        counted = footprint(meta, images.to("meta"), autocast=BF16)
        assert counted.rows == real.rows
        assert counted.parameter_bytes == real.parameter_bytes
        assert counted.notes == ("counted on fake cpu tensors",)
        assert all(p.device.type == "meta" for p in meta.parameters())

    def test_tied_weights_stay_tied(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        real = footprint(model, torch.randn(2, 4))
        assert footprint(model, torch.randn(2, 4), fake=True) == real.__class__(
            real.saved_bytes, real.parameter_bytes, 0, real.rows, ("counted on fake cpu tensors",)
        )

    def test_larger_than_any_machine(self):
        with torch.device("meta"):
            model = nn.Sequential(*[nn.Linear(2**16, 2**16) for _ in range(8)])
            counted = footprint(model, torch.randn(2**20, 2**16))
        assert counted.parameter_bytes == 8 * (2**32 + 2**16) * 4
        assert counted.saved_bytes == 8 * 2**36 * 4

    def test_lstm_weights_in_a_list(self):
        model, x = nn.LSTM(4, 4), torch.randn(3, 2, 4)
        counted = footprint(model, x, fake=True)
        assert counted.saved_bytes > 0
        assert "workspace" in counted.notes[1]
        model(x)[0].sum().backward()

    def test_forward_that_needs_values(self):
        model = Call(lambda x: x if x.sum().item() > 0 else -x)
        with pytest.raises(ValueError, match="reads values"):
            footprint(model, grad_randn(3), fake=True)

    def test_cuda_without_a_gpu(self, vit, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        images = torch.randn(2, 3, 64, 64)
        with pytest.raises(ValueError, match="device='cpu' is close to"):
            footprint(vit, images, device="cuda", fake=True, autocast=BF16)
        assert "math kernel" in footprint(vit, images, device="cuda", fake=True).notes[1]


@pytest.mark.slow
class TestLargestModels:
    def test_vit_22b_in_seconds(self):
        """Parallel blocks of width 6144, 48 deep: 159 GiB plain under bf16 autocast at batch 64."""
        from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer

        with torch.device("meta"):
            model = VisionTransformer(
                embed_dim=6144, depth=48, num_heads=48, qk_norm=True, block_fn=ParallelScalingBlock
            )
            images = torch.randn(64, 3, 224, 224)
        plain, coded = (
            footprint(model, images, autocast=BF16, policy=p) for p in ("plain", "mesa8")
        )
        assert plain.parameter_bytes > 80 * 2**30
        assert plain.saved_bytes > 150 * 2**30
        assert coded.saved_bytes < plain.saved_bytes / 4


class TestUntouched:
    @pytest.mark.parametrize("policy", [None, "plain", "mesa8", "paper", "checkpoint"])
    def test_model_and_random_state(self, policy, fake):
        model = timm.create_model("resnet18", num_classes=3, drop_rate=0.5).train()
        state = copy.deepcopy(model.state_dict())
        attributes = {name: (type(m), dict(vars(m))) for name, m in model.named_modules()}
        versions = {n: t._version for n, t in model.state_dict(keep_vars=True).items()}
        images = torch.randn(2, 3, 32, 32)
        random = torch.get_rng_state()
        footprint(model, images, policy=policy, fake=fake, autocast=BF16)
        assert torch.equal(torch.get_rng_state(), random)
        torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
        for name, tensor in model.state_dict(keep_vars=True).items():
            assert tensor._version == versions[name]
            assert tensor.grad is None
        for name, module in model.named_modules():
            kind, before = attributes[name]
            assert type(module) is kind
            assert list(vars(module)) == list(before)
            assert all(vars(module)[key] is value for key, value in before.items())
            assert not module._forward_hooks
            assert not module._forward_pre_hooks

    def test_after_an_exception(self, fake):
        class Fails(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm1d(4)

            def forward(self, x):
                self.norm(x)
                raise RuntimeError("in the middle")

        model = Fails()
        with pytest.raises(RuntimeError, match="in the middle"):
            footprint(model, torch.randn(8, 4), policy="mesa8", fake=fake)
        assert type(model) is Fails
        assert not model.norm._forward_hooks
        assert model.norm.num_batches_tracked == 0
        assert type(model.norm.weight.data) is torch.Tensor

    def test_a_wrapped_model_stays_wrapped(self, vit, fake):
        images = torch.randn(2, 3, 64, 64)
        model = mesa_train.wrap(copy.deepcopy(vit), "mesa4")
        plain, wrapped = (
            footprint(model, images, policy=policy, fake=fake) for policy in ("plain", None)
        )
        assert plain.rows == footprint(vit, images, fake=fake).rows
        assert wrapped.rows == footprint(vit, images, policy="mesa4", fake=fake).rows
        assert wrapped.saved_bytes < plain.saved_bytes / 2
        assert wrapped.by_dtype["uint8"] > wrapped.saved_bytes / 2
        assert footprint(model, images, policy="mesa8", fake=fake).saved_bytes > wrapped.saved_bytes
        assert footprint(model, images, fake=fake).rows == wrapped.rows
        model(images).sum().backward()

    def test_the_forward_is_usable_in_between(self, vit):
        images = torch.randn(2, 3, 64, 64)
        output = vit(images)
        footprint(vit, images, policy="mesa8")
        output.sum().backward()
        assert all(p.grad is not None for p in vit.parameters())
        vit.zero_grad()


class TestAttribution:
    def test_modules_and_operators_match_plain(self, vit):
        images = torch.randn(2, 3, 64, 64)
        plain = footprint(vit, images, autocast=BF16)
        coded = footprint(vit, images, autocast=BF16, policy="mesa8")
        assert set(coded.by_module) <= set(plain.by_module)
        assert set(coded.by_operator) <= set(plain.by_operator)
        assert "other" not in plain.by_operator

    def test_override_by_module_name(self, vit):
        images = torch.randn(8, 3, 64, 64)
        policy = mesa_train.Policy(overrides={"blocks.1": {"enabled": False}})
        coded, mixed = (
            footprint(vit, images, autocast=BF16, policy=p).by_module for p in ("mesa8", policy)
        )
        assert mixed["blocks.0.mlp.act"] == coded["blocks.0.mlp.act"]
        assert mixed["blocks.1.mlp.act"] > coded["blocks.1.mlp.act"]

    def test_module_called_twice_and_shared(self):
        layer = nn.Linear(4, 4)

        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = self.second = layer

            def forward(self, x):
                return self.second(self.first(x))

        assert footprint(Twice(), torch.randn(2, 4)).by_module == {"first": 64}

    def test_arithmetic_methods_have_plain_names(self):
        def arithmetic(x):
            y = (2.0 / x.exp()) / x.cosh().detach()
            z = y * y.T
            return z.relu_() @ x

        names = footprint(Call(arithmetic), grad_randn(3, 3)).by_operator
        assert set(names) == {"exp", "div", "mul", "relu", "matmul"}

    def test_huggingface_output_and_dict_input(self, fake):
        transformers = pytest.importorskip("transformers")
        config = transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        )
        config.image_size = 32
        model = transformers.ViTForImageClassification(config).train()
        counted = footprint(model, {"pixel_values": torch.randn(2, 3, 32, 32)}, fake=fake)
        assert counted.by_operator["gelu"] == 2 * 2 * 5 * 64 * 4


class TestBadInput:
    def test_not_a_module(self):
        with pytest.raises(TypeError, match="got function"):
            footprint(lambda x: x, torch.randn(2))

    def test_nothing_requires_grad(self, fake):
        model = nn.Linear(3, 3).requires_grad_(False)
        with pytest.raises(ValueError, match="no output of Linear requires grad"):
            footprint(model, torch.randn(2, 3), fake=fake)

    def test_unknown_policy(self):
        with pytest.raises(ValueError, match="did you mean 'mesa8'"):
            footprint(nn.Linear(3, 3), torch.randn(2, 3), policy="mesa9")

    def test_policy_of_a_wrong_type(self):
        with pytest.raises(TypeError, match="policy must be"):
            footprint(nn.Linear(3, 3), torch.randn(2, 3), policy=8)

    def test_autocast_dtype(self):
        with pytest.raises(ValueError, match=r"got torch\.float32"):
            footprint(nn.Linear(3, 3), torch.randn(2, 3), autocast=torch.float32)

    def test_device_without_fakes(self):
        with pytest.raises(ValueError, match="fake=True"):
            footprint(nn.Linear(3, 3), torch.randn(2, 3), device="cuda")

    def test_device_meta(self):
        with pytest.raises(ValueError, match="got 'meta'"):
            footprint(nn.Linear(3, 3), torch.randn(2, 3), device="meta", fake=True)


def test_table_and_json(vit):
    counted = footprint(vit, torch.randn(2, 3, 64, 64), autocast=BF16)
    lines = str(counted).splitlines()
    assert lines[0].split() == ["operator", "tensors", "size", "share"]
    assert len({len(line) for line in lines[:2]}) == 1
    assert "weight cast" in str(counted)
    assert "blocks.0.mlp.act" in counted.table("module")
    assert "bfloat16" in counted.table("dtype")
    with pytest.raises(ValueError, match="choose from operator"):
        counted.table("colour")
    parsed = json.loads(counted.to_json())
    assert parsed == counted.to_dict()
    assert sum(row["saved_bytes"] for row in parsed["rows"]) == parsed["saved_bytes"]
    for name in ("operator", "dtype", "module"):
        assert sum(parsed[f"by_{name}"].values()) == parsed["saved_bytes"]


def test_exported():
    assert mesa_train.footprint is footprint


def test_deepspeed_only_loaded_changes_nothing(monkeypatch):
    name = "deepspeed.runtime.zero.parameter_offload"
    monkeypatch.delitem(sys.modules, name, raising=False)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    inputs = torch.randn(8, 32, 64)
    counted = [footprint(model, inputs, policy=Policy(min_bytes=0), fake=True)]
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    counted.append(footprint(model, inputs, policy=Policy(min_bytes=0), fake=True))
    assert counted[0].saved_bytes == counted[1].saved_bytes
