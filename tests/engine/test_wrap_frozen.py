"""Where nothing inside needs a gradient, nothing is entered: PyTorch's fast paths are taken as without a wrap."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from wrap_helpers import EIGHT, LOSSLESS, close, gradients, same

import mesa_train
from mesa_train.engine.intercept import CompressionMode
from mesa_train.engine.wrap import report_of

WIDTH = 32


def encoder(norm_first=False):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        WIDTH, 4, 2 * WIDTH, 0.0, activation="gelu", batch_first=True, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def tokens():
    return torch.randn(3, 9, WIDTH, generator=torch.Generator().manual_seed(1))


def padding():
    """Of the first sequence all, of the others the end."""
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[:, 6:] = True
    mask[0] = True
    return mask


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoder_takes_its_fast_path_or_not_as_without(norm_first, frozen, grad):
    plain = encoder(norm_first).requires_grad_(not frozen)
    model = mesa_train.wrap(copy.deepcopy(plain), EIGHT)
    with torch.set_grad_enabled(grad):
        expected, found = (m(tokens(), src_key_padding_mask=padding()) for m in (plain, model))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    # The fast path computes NaN for a sequence that is all padding.
    assert expected.isnan().any() == (frozen or not grad)


class Probe(nn.Module):
    """A part, and a head that trains. around: how the part is called."""

    def __init__(self, around=None):
        super().__init__()
        self.body, self.head, self.around = encoder(), nn.Linear(WIDTH, 3), around
        self.body.requires_grad_(around is not None)

    def forward(self, x):
        if self.around is None:
            return self.head(self.body(x, src_key_padding_mask=padding()).nan_to_num())
        with self.around():
            features = self.body(x, src_key_padding_mask=padding())
        return self.head(features.nan_to_num())


@pytest.mark.parametrize("around", [None, torch.no_grad], ids=["frozen", "no_grad"])
@pytest.mark.parametrize("outside", ["nothing", "compress", "a device"])
def test_a_part_of_a_model_that_trains(around, outside):
    plain = Probe(around)
    model = mesa_train.wrap(copy.deepcopy(plain), LOSSLESS)
    context = {
        "nothing": lambda: torch.enable_grad(),
        "compress": lambda: mesa_train.compress(EIGHT),
        "a device": lambda: torch.device("cpu"),
    }[outside]
    with context():
        found = model(tokens())
    with torch.device("cpu") if outside == "a device" else torch.enable_grad():
        expected = plain(tokens())
    assert torch.equal(found, expected)
    assert not any(name.startswith("body") for name, *_ in report_of(model).rows)
    assert any(name.startswith("head") for name, *_ in report_of(model).rows)
    assert not _get_current_function_mode_stack()
    both = [[g for g in gradients(m, tokens()) if g is not None] for m in (model, plain)]
    assert close(*both, 1e-5)


def test_a_vision_transformer_whose_head_trains():
    torch.manual_seed(0)
    plain = torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=5).eval()
    nn.init.normal_(plain.heads[-1].weight)
    plain.requires_grad_(False)
    plain.heads.requires_grad_(True)
    model = mesa_train.wrap(copy.deepcopy(plain), EIGHT)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), plain(images))


def entered(module, *args, **kwargs):
    """How many interceptions are on in the forward of its first Linear."""
    counts = []
    linear = next(m for m in module.modules() if isinstance(m, nn.Linear))
    handle = linear.register_forward_pre_hook(lambda *_: counts.append(interceptions()))
    # A hook runs before its module is entered, within the one outside.
    outer = nn.Sequential()
    outer.add_module("inner", module)
    try:
        module(*args, **kwargs)
    finally:
        handle.remove()
    return max(counts)


def interceptions():
    return sum(isinstance(m, CompressionMode) for m in _get_current_function_mode_stack())


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.other = None

    def forward(self, *args, **kwargs):
        return self.linear(torch.ones(2, 8))


class Box:
    def __init__(self, tensor):
        self.tensor = tensor


NEEDED = torch.ones(2, 8, requires_grad=True)
PLAIN = torch.ones(2, 8)


@pytest.mark.parametrize(
    ("args", "needed"),
    [
        ([], False),
        ([PLAIN, None, 3, "x", torch.Size([2])], False),
        ([[PLAIN, {"a": (PLAIN,)}]], False),
        ([NEEDED], True),
        ([{"a": [PLAIN, (NEEDED,)]}], True),
        ([Box(PLAIN)], True),  # may hold anything
    ],
)
@pytest.mark.parametrize("by", ["position", "name"])
def test_arguments_are_searched_for_what_needs_a_gradient(args, needed, by):
    model = mesa_train.wrap(Holder().requires_grad_(False), EIGHT)
    if by == "position":
        assert entered(model, *args) == needed
    else:
        assert entered(model, **{f"a{i}": a for i, a in enumerate(args)}) == needed


def test_requires_grad_may_change_at_any_time():
    model = mesa_train.wrap(Holder(), EIGHT)
    for needed in (True, False, True):
        model.linear.bias.requires_grad_(needed)
        model.linear.weight.requires_grad_(False)
        assert entered(model) == needed
    model.requires_grad_(False)
    model.other = NEEDED * 1  # as FSDP1 puts views in the place of parameters
    assert entered(model)


class Other(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_other_modes_stay_on_in_their_order():
    seen = []

    class Frozen(nn.Module):
        def forward(self, x):
            seen.append(_get_current_function_mode_stack())
            return x

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.frozen = nn.Linear(8, 8), Frozen()

        def forward(self, x):
            with Other():
                before = _get_current_function_mode_stack()
                with torch.no_grad():
                    self.frozen(x)
                assert _get_current_function_mode_stack() == before
                with pytest.raises(TypeError), torch.no_grad():
                    self.frozen()
                assert _get_current_function_mode_stack() == before
            return self.linear(x)

    model = mesa_train.wrap(Outer(), EIGHT)
    with Other():
        model(torch.ones(2, 8))
    assert [[type(m) for m in modes] for modes in seen] == [[Other, Other]]


def test_a_source_of_gradients_that_nobody_sees_costs_nothing_but_memory():
    """A hook inside a frozen model: modules behind it enter by themselves."""
    plain = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).requires_grad_(False)
    prompt = torch.randn(8, requires_grad=True)
    plain[0].register_forward_hook(lambda module, args, output: output + prompt)
    model = mesa_train.wrap(copy.deepcopy(plain), EIGHT)
    found, expected = (torch.autograd.grad(m(PLAIN).sin().sum(), prompt) for m in (model, plain))
    assert not same(found, expected)
    assert close(found, expected, 0.05)
