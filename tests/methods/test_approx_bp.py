"""Approx-BP: the forward is PyTorch's, the gradient the published steps', two bits an element are kept."""

import pytest
import timm
import torch
import torch.nn.functional as F

from mesa_train import footprint
from mesa_train.methods.approx_bp import ApproxBP
from mesa_train.methods.variants import Variant

# On either side of each threshold, and the slope between them: the running sums of the published
# rises, lomem/csrc/activation_cuda.cu.
GELU = [(-3.19, 0.0), (-3.18, -0.0492226), (-0.0012, -0.0492226), (-0.0011, 1.0487406)]
GELU += [(3.19, 1.0487406), (3.2, 1.0)]
SILU = [(-6.31, 0.0), (-6.3, -0.0406036), (-0.0009, -0.0406036), (-0.0008, 1.0403219)]
SILU += [(6.32, 1.0403219), (6.33, 1.0)]


@pytest.mark.parametrize(("function", "steps"), [(F.gelu, GELU), (F.silu, SILU)])
def test_gradient_is_the_published_steps(function, steps):
    x = torch.tensor([at for at, _ in steps], requires_grad=True)
    with ApproxBP():
        y = function(x)
    assert torch.equal(y, function(x))
    (grad,) = torch.autograd.grad(y, x, torch.full_like(y, 2.0))
    # The constants above have seven digits.
    torch.testing.assert_close(
        grad, torch.tensor([2 * slope for _, slope in steps]), atol=2e-6, rtol=0
    )


def test_what_it_is_not_meant_for_is_left_alone():
    x = torch.linspace(-4, 4, 33, requires_grad=True)
    with ApproxBP():
        (grad,) = torch.autograd.grad(F.gelu(x, approximate="tanh").sum(), x)
        assert F.gelu(x.detach()).grad_fn is None
    expected = torch.autograd.grad(F.gelu(x, approximate="tanh").sum(), x)[0]
    assert torch.equal(grad, expected)


def test_a_model_keeps_two_bits_of_each_activation_input():
    model = timm.create_model("test_vit", num_classes=10, img_size=64)
    images = torch.randn(2, 3, 64, 64)
    plain = footprint(model, images, policy="plain", autocast=torch.bfloat16).saved_bytes
    saved = footprint(model, images, policy="approx-bp", autocast=torch.bfloat16).saved_bytes
    hidden = sum(2 * 17 * block.mlp.fc1.out_features for block in model.blocks)
    assert plain - saved == hidden * 2 - hidden // 4
    with Variant(model, "approx-bp").active() as module:
        module(images).sum().backward()
    stepped = model.blocks[0].mlp.fc1.weight.grad.clone()
    model.zero_grad()
    model(images).sum().backward()
    assert not torch.equal(stepped, model.blocks[0].mlp.fc1.weight.grad)
