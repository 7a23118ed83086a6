"""The efficient models under mesa_train: the same outputs, and gradients within the codec's error."""

import copy

import pytest
import timm
import torch

import mesa_train
import mesa_train.models
from mesa_train.models.dynamicvit.losses import DynamicViTLoss
from mesa_train.models.dynamicvit.outputs import TeacherOutput
from mesa_train.models.ecoformer import fit_hashes
from mesa_train.utils.formatting import format_bytes


def hvt():
    return (
        timm.create_model("hvt_ti_1", depth=4, pool_after=(0, 2), num_classes=10),
        224,
        cross_entropy,
    )


def cross_entropy(output, model):
    return torch.nn.functional.cross_entropy(output, torch.arange(len(output)))


def dynamicvit(name, **options):
    model = timm.create_model(f"dynamicvit_{name}", num_classes=10, **options)
    return model, 224, dynamicvit_loss


def dynamicvit_loss(output, model):
    teacher = TeacherOutput(output.logits.detach().roll(1, 1), output.tokens.detach().roll(1, 1))
    loss = DynamicViTLoss(model.keep_rates, token_loss="kl" if "aux_head" in dir(model) else "mse")
    return loss(output, torch.arange(len(output.logits)), teacher).total


def ecoformer(name, **options):
    model = timm.create_model(f"ecoformer_{name}", num_classes=10, depths=(1, 1, 1, 1), **options)
    fit_hashes(model, torch.randn(1, 3, 96, 96), steps=2)
    return model, 112, cross_entropy


def spvit(name, **options):
    model = timm.create_model(name, num_classes=10, **options)
    return model, 224, spvit_loss if options.get("search") else cross_entropy


def spvit_loss(output, model):
    return cross_entropy(output, model) + model.budget_loss(0.5, 1.0)


EVERY_KIND = [[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]]
SWIN = {"depths": (1, 1, 1, 1)}
MODELS = {
    "hvt": hvt,
    "dynamicvit_deit": lambda: dynamicvit("deit_256", depth=4, predictors=(1, 2, 3)),
    "dynamicvit_lvvit": lambda: dynamicvit("lvvit_s", depth=4, predictors=(1, 2, 3)),
    "dynamicvit_convnext": lambda: dynamicvit("convnext_t", depths=(1, 1, 4, 1)),
    "dynamicvit_swin": lambda: dynamicvit("swin_t", depths=(1, 1, 4, 1)),
    "ecoformer_pvt": lambda: ecoformer("pvt_v2_b0"),
    "ecoformer_twins": lambda: ecoformer("twins_svt_s"),
    "ecoformer_consistent": lambda: ecoformer("pvt_v2_b0", kernel="consistent"),
    "spvit_deit": lambda: spvit("spvit_deit_ti", depth=4, msa=EVERY_KIND),
    "spvit_deit_search": lambda: spvit("spvit_deit_ti", depth=2, search=True),
    "spvit_swin": lambda: spvit("spvit_swin_t", msa=EVERY_KIND, **SWIN),
    "spvit_swin_search": lambda: spvit("spvit_swin_t", search=True, **SWIN),
}


QUICK = ("hvt", "dynamicvit_deit", "ecoformer_pvt", "spvit_deit", "spvit_deit_search")
CASES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


def step(model, images, loss, state):
    """(outputs, all gradients as one vector) of a step that starts from `state` and one seed."""
    model.load_state_dict(state)
    model.zero_grad()
    torch.manual_seed(1)
    output = model(images)
    value = loss(output, model)
    value.backward()
    tensors = [output] if isinstance(output, torch.Tensor) else flat(output)
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return [*[t.detach() for t in tensors], value.detach()], torch.cat(gradients).double()


def flat(output):
    return [t for part in output for t in (part if isinstance(part, tuple) else [part])]


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_plains_and_gradients_within_the_codecs_error(name):
    torch.manual_seed(0)
    model, size, loss = MODELS[name]()
    model.train()
    images = torch.randn(2, 3, size, size)
    state = copy.deepcopy(model.state_dict())
    outputs, expected = step(model, images, loss, state)
    # Lossless differs by the order of sums; 8 bits add about 1 % to a gradient.
    for policy, bound in (("lossless", 1e-5), ("mesa8", 3e-2), ("mesa8-recompute", 3e-2)):
        mesa_train.wrap(model, policy)
        wrapped_outputs, gradient = step(model, images, loss, state)
        mesa_train.unwrap(model)
        for wrapped, plain in zip(wrapped_outputs, outputs, strict=True):
            assert torch.equal(wrapped, plain), policy
        error = ((gradient - expected).norm() / expected.norm()).item()
        assert error <= bound, (policy, error)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_fewer_bytes_are_saved(name):
    torch.manual_seed(0)
    model, size, _ = MODELS[name]()
    model.train()
    images = torch.randn(2, 3, size, size)
    saved = {
        policy: mesa_train.footprint(model, images, policy=policy, fake=True).saved_bytes
        for policy in ("plain", "mesa8")
    }
    assert saved["plain"] >= 3 * saved["mesa8"], {k: format_bytes(v) for k, v in saved.items()}
