"""Rows that can be checked: known bytes, known gradients, and times that are there."""

import math
import types

import pytest
import timm
import torch
from families import Row, compare
from torch import nn

import mesa_train
import mesa_train.measure.step
from mesa_train.measure.footprint import footprint
from mesa_train.measure.step import cosine, default_loss, relative_error
from mesa_train.methods.apply import METHODS
from mesa_train.methods.checkpointing import NoBlocks, checkpointed, find_blocks

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=10)
    return model.train()


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    return torch.randn(4, 3, 64, 64)


@pytest.mark.slow
def test_all_columns(vit, images):
    recorded = []
    rows = compare(
        vit,
        images,
        autocast=BF16,
        rounds=2,
        progress=lambda what, done, total: recorded.append((what, done, total)),
    )
    assert [row.method for row in rows] == list(METHODS)
    by_method = {row.method: row for row in rows}
    plain = by_method["plain"]
    assert (plain.saved_ratio, plain.time_ratio) == (1.0, 1.0)
    for row in rows:
        counted = footprint(vit, images, autocast=BF16, policy=row.method).saved_bytes
        assert row.saved_bytes == counted
        assert row.saved_ratio == plain.saved_bytes / counted
        assert row.time_ms > 0
    # bf16 has 8 bits of precision; 8-bit codes add little to that and checkpointing nothing.
    assert 0 < plain.gradient_error < 0.03
    assert by_method["checkpoint"].gradient_error == pytest.approx(plain.gradient_error, rel=1e-3)
    assert by_method["mesa8"].gradient_error < 2 * plain.gradient_error
    assert by_method["mesa8"].gradient_error < by_method["mesa4"].gradient_error
    # Every step is told once, in order, and the last call says that all are done.
    assert [done for _, done, _ in recorded] == list(range(len(recorded)))
    assert {total for _, _, total in recorded} == {len(recorded) - 1}


def test_float32_plain_has_no_error(vit, images):
    (row,) = compare(vit, images, ["plain"], time=False)
    assert row.gradient_error == 0
    assert row.time_ms is None


def test_lossless_is_exact_in_float32(vit, images):
    (row,) = compare(vit, images, ["lossless"], time=False)
    assert row.gradient_error < 1e-5  # float32 sums in another order


def test_narrow_weights_are_compared_with_float32():
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4)).bfloat16()
    (row,) = compare(model, torch.randn(8, 16, dtype=BF16), ["plain"], time=False)
    assert 1e-4 < row.gradient_error < 0.05
    assert model[0].weight.dtype is BF16


def test_fakes_give_bytes_alone(vit, images):
    real = compare(vit, images, error=False, time=False)
    fake = compare(vit, images, fake=True)
    assert [row.saved_bytes for row in fake] == [row.saved_bytes for row in real]
    assert all(row.gradient_error is None and row.time_ms is None for row in fake)


def test_times_are_medians(monkeypatch):
    """Against a clock that is set by hand: seconds of each step, in the order they run."""
    # Warming up; then rounds of plain and mesa8. No median is a mean, a minimum or a maximum, and the
    # median of the ratios, 6, 1/2 and 1/2, is no ratio of the medians.
    measured = [90.0, 90.0, 1.0, 6.0, 2.0, 1.0, 6.0, 3.0]
    ticks = iter([tick for seconds in measured for tick in (100.0, 100.0 + seconds)])
    clock = types.SimpleNamespace(perf_counter=lambda: next(ticks))
    monkeypatch.setattr(mesa_train.measure.step, "clock", clock)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))
    plain, coded = compare(model, torch.randn(4, 8), ["plain", "mesa8"], rounds=3, error=False)
    assert (plain.time_ms, coded.time_ms) == (2e3, 3e3)
    assert (plain.time_ratio, coded.time_ratio) == (1.0, 0.5)
    assert next(ticks, None) is None


def test_batch_norm_and_dropout_see_the_same_numbers():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Flatten(), nn.Linear(288, 5)
    )
    statistics = model[1].running_mean.clone()
    (row,) = compare(model, torch.randn(4, 3, 8, 8), ["plain"], rounds=1)
    assert row.gradient_error == 0
    assert torch.equal(model[1].running_mean, statistics)
    assert all(p.grad is None for p in model.parameters())


def test_wrapped_model_stays_wrapped(vit, images):
    mesa_train.wrap(vit, "mesa4")
    try:
        before = footprint(vit, images).rows
        compare(vit, images, ["plain", "checkpoint"], rounds=1)
        assert footprint(vit, images).rows == before
    finally:
        mesa_train.unwrap(vit)


def test_model_without_blocks_has_a_reason():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    plain, baseline = compare(model, torch.randn(2, 4), ["plain", "checkpoint"], rounds=1)
    assert baseline.saved_bytes is None
    assert baseline.time_ms is None
    assert "no row of equal blocks" in baseline.notes[0]
    assert plain.notes == ()


class TestBadInput:
    def test_unknown_method(self, vit, images):
        with pytest.raises(ValueError, match="did you mean 'checkpoint'"):
            compare(vit, images, ["plain", "chekpoint"])

    def test_no_method(self, vit, images):
        with pytest.raises(ValueError, match="needs a method"):
            compare(vit, images, [])

    def test_no_rounds(self, vit, images):
        with pytest.raises(ValueError, match="rounds must be at least 1"):
            compare(vit, images, rounds=0)


class TestCheckpointing:
    @pytest.mark.parametrize(
        ("name", "count", "kind"),
        [
            ("vit_tiny_patch16_224", 12, "Block"),
            ("swin_tiny_patch4_window7_224", 12, "SwinTransformerBlock"),
            ("twins_svt_small", 18, "Block"),
            ("convnext_tiny", 18, "ConvNeXtBlock"),
            ("resnet18", 8, "BasicBlock"),
            ("vgg11", 0, ""),
        ],
    )
    def test_find_blocks(self, name, count, kind):
        with torch.device("meta"):
            blocks = find_blocks(timm.create_model(name))
        assert len(blocks) == count
        assert {type(block).__name__ for block in blocks.values()} == ({kind} if kind else set())

    def test_same_gradient(self, vit, images):
        def gradients():
            loss = vit(images).square().mean()
            return torch.autograd.grad(loss, list(vit.parameters()))

        plain = gradients()
        with checkpointed(vit):
            assert all(map(torch.equal, gradients(), plain))
        assert all("forward" not in vars(module) for module in vit.modules())

    def test_no_blocks(self):
        with pytest.raises(NoBlocks, match="Linear has no row"), checkpointed(nn.Linear(2, 2)):
            pass


class TestLossAndError:
    def test_scores_get_cross_entropy(self):
        scores = torch.zeros(4, 8, requires_grad=True)
        assert default_loss(scores).item() == pytest.approx(math.log(8))

    def test_own_loss_goes_first(self):
        loss = torch.tensor(3.0, requires_grad=True)
        output = type("Output", (), {"loss": loss})()
        assert default_loss(output).item() == 3.0

    def test_features_get_a_mean_square(self):
        features = torch.full((2, 3, 4), 2.0, requires_grad=True)
        assert default_loss({"features": features}).item() == 4.0

    def test_nothing_to_train(self):
        with pytest.raises(ValueError, match="requires grad"):
            default_loss(torch.zeros(2, 2))

    def test_relative_error(self):
        exact = [torch.tensor([3.0]), torch.tensor([4.0]), None]
        assert relative_error(exact, exact) == 0
        assert relative_error([torch.tensor([3.0]), None, None], exact) == pytest.approx(0.8)
        assert math.isnan(relative_error([torch.tensor([math.nan]), None, None], exact))


class TestCosine:
    def test_by_hand(self):
        one, other = [torch.tensor([3.0, 0.0]), None], [torch.tensor([3.0, 4.0]), None]
        assert cosine(one, other) == pytest.approx(0.6)
        assert cosine(one, one) == pytest.approx(1)
        assert cosine(one, [-t if t is not None else None for t in one]) == pytest.approx(-1)

    def test_missing_and_zero(self):
        zero, some = [torch.zeros(2)], [torch.ones(2)]
        assert cosine(zero, zero) == 1
        assert cosine(zero, some) == cosine([None], some) == 0


def test_row_as_dict():
    assert Row("plain", 8, 1.0).to_dict()["saved_bytes"] == 8
