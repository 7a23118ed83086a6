"""Codes without a kernel: their bits, their values, the rows of a small model, and the tables."""

import code_structure
import pytest
import structured_codes
import timm
import torch
import torch.nn.functional as F
from code_models import Subject, subject
from structured_codes import VARIANTS, Variant, code, image_means, lloyd
from tables import codes as tables

from mesa_train.codecs.affine import Affine

FIVE = Affine(5, 128)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "num_heads": 2, "depth": 1}
    network = timm.create_model("deit_tiny_patch16_224", num_classes=5, **options)
    x, y = torch.randn(8, 3, 32, 32), torch.randint(0, 5, (8,))
    return Subject("a ViT", network, lambda: F.cross_entropy(network(x), y), 8)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("affine, groups of 128", 5 + 32 / 128),
        ("8-bit scales, groups of 64", 5 + 16 / 64 + 16 / 384),
        ("mean of 32 rows of each image", 5 + 32 / 128 + 16 / 65),  # 8 images of 65 tokens
        ("mean of the batch", 5 + 32 / 128 + 16 / (8 * 65)),
        ("Lloyd-Max levels", 5),
        ("2 bits, Lloyd-Max levels of a group", 2 + 32 / 128),
    ],
)
def test_bits_of_an_element(name, bits):
    assert VARIANTS[name].bits(FIVE, 8 * 65, 384, 8) == pytest.approx(bits)


def test_the_mean_of_some_rows_is_of_evenly_spaced_rows():
    x = torch.arange(2 * 8 * 3.0).view(16, 3)
    means = image_means(x, 2, rows=2)
    assert torch.equal(means, torch.stack([(x[0] + x[4]) / 2, (x[8] + x[12]) / 2]))
    assert torch.equal(image_means(x, 2, rows=99), x.view(2, 8, 3).mean(1))


def test_an_offset_is_added_back_and_saves_error():
    torch.manual_seed(0)
    offsets = 8 * torch.randn(4, 1, 128).expand(-1, 32, -1).reshape(128, 128)
    x = torch.randn(128, 128) + offsets
    errors = {
        name: (code(x, FIVE, variant, 4) - x).norm() / torch.randn(128, 128).norm()
        for name, variant in (
            ("whole", Variant()),
            ("mean", Variant(mean="image")),
            ("16 rows", Variant(mean="image", rows=16)),
        )
    }
    assert errors["mean"] < 0.2 * errors["whole"]
    assert errors["mean"] == pytest.approx(errors["16 rows"].item(), rel=0.15)


@pytest.mark.parametrize(("bits", "least"), [(2, 0.1175), (3, 0.03454)])
def test_lloyd_levels_have_the_known_distortion(bits, least):
    """J. Max, Quantizing for minimum distortion, 1960, table I."""
    torch.manual_seed(0)
    x = torch.randn(400_000)
    assert (lloyd(x, bits) - x).square().mean().item() == pytest.approx(least, rel=0.02)
    grouped = 3 * x[: 4096 * 64].view(4096, 64) + 5
    distortion = (code(grouped, FIVE, Variant(levels="group", width=bits), 1) - grouped) / 3
    assert distortion.square().mean().item() == pytest.approx(least, rel=0.1)


def test_few_rows_keep_no_mean():
    x = torch.randn(8 * 4, 64)
    used = ([], [])
    codec = structured_codes.rounded_codec(
        Variant(mean="image"), "x_hat", 8, used, 5, 128, "nearest", running=False
    )
    codec.encode_normalized(x, None, torch.ones(32))
    assert used[0] == [x.numel() * 5.5]


def test_means_have_the_share_of_the_energy():
    """The GELU before the first layer norm is in a stem."""
    torch.manual_seed(0)
    pattern = torch.randn(64)
    x = 2 * pattern + torch.randn(4, 200, 64)

    def loss():
        return F.gelu(F.layer_norm(x + 0 * F.gelu(x), (64,))).sum()

    rows = list(code_structure.mean_shares(Subject("", torch.nn.Identity(), loss, 4)))
    assert [row["operand"] for row in rows] == ["x_hat", "GELU's input"]
    x_hat = F.layer_norm(x, (64,))
    expected = x_hat.mean(1).square().sum() * 200 / x_hat.square().sum()
    for row in rows:
        assert row["of_images"] == pytest.approx([expected.item()], rel=1e-3)
        assert 0.6 < row["of_batch"][0] <= row["of_images"][0] < 0.95


def test_rows_of_a_small_model(small):
    chosen = ["affine, groups of 128", "mean of each image", "2 bits, affine", "Lloyd-Max levels"]
    operands = list(code_structure.WHOLE)
    operands[:0] = ["x_hat"]
    rows = list(code_structure.measure(small, 1, operands, chosen))
    found = {(row["operand"], row["variant"]): row for row in rows}
    assert ("mesa4", "Lloyd-Max levels") not in found
    assert [key[1] for key in found if key[0] == operands[2]] == chosen[:2]
    assert 0 < found["x_hat", "affine, groups of 128"]["gradient_error"] < 0.1
    worse = found["x_hat", "2 bits, affine"]["gradient_error"]
    assert worse > 4 * found["x_hat", "affine, groups of 128"]["gradient_error"]
    pair, whole = (found[name, "mean of each image"]["bits"] for name in (operands[2], "mesa4"))
    assert found["mesa4", "affine, groups of 128"]["bits"] < pair < whole
    last, mesa4 = (found[name, "affine, groups of 128"] for name in (operands[3], "mesa4"))
    assert last["bits"] > mesa4["bits"]
    assert last["gradient_error"] < 0.9 * mesa4["gradient_error"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"operands": "x_hat;w"}, "--operands has 'w'; choose from x_hat;"),
        ({"variants": "mean"}, "--variants has 'mean'"),
        ({"models": "deit"}, "--models: model 'deit' is not one of random,"),
    ],
)
def test_a_wrong_choice_is_named(tmp_path, arguments, named):
    defaults = {"data": "", "sentences": "", "models": "deit", "operands": "x_hat", "steps": 1}
    defaults |= {"variants": "rotation", "draws": 1, "weights": None, "out": tmp_path}
    with pytest.raises(SystemExit, match=named.replace(".", "[.]")):
        code_structure.main(**(defaults | arguments))


def test_trained_weights_are_kept(tmp_path, monkeypatch):
    """Steps change the weights, and a second run reads the kept ones."""
    import code_models

    recipe = code_models.Trained("tiny", "small_vit", {}, 8, 8, 4)
    monkeypatch.setitem(code_models.TRAINED, "small", recipe)
    first = subject("small", "digits", 2, tmp_path, "")
    again = subject("small", "digits", 2, tmp_path, "")
    untrained = subject("small", "digits", 0, tmp_path, "")
    assert [path.name for path in tmp_path.iterdir()] == ["small-2.pt"]
    assert "2 steps on digits" in first.name
    assert first.images == 4
    assert "random" in untrained.name
    assert torch.equal(first.loss(), again.loss())
    assert first.loss() != untrained.loss()


ROW = {
    "model": "a ViT", "operand": "mesa4", "variant": tables.AFFINE, "bits": 5.0, "draws": 2,
    "gradient_error": 0.04, "device": "a CPU", "device_type": "cpu", "threads": 1,
    "versions": {"torch": "2.15.0"}, "commit": "abc", "date": "2030-01-02T03:04:05+00:00",
}  # fmt: skip


def test_errors_at_equal_bytes_and_every_origin():
    newer = {"variant": "mean", "bits": 5.5, "gradient_error": 0.02, "commit": "def"}
    text = tables.code_structure.render(
        [{**ROW, **newer, "gradient_error": 1}, ROW, {**ROW, **newer}]
    )
    assert "| mean | 2.00%, 5.50, 2.83% |" in text
    assert f"| {tables.AFFINE} | 4.00%, 5.00, 4.00% |" in text
    assert "commit abc, 2030-01-02." in text
    assert "commit def, 2030-01-02." in text


def test_shares_of_the_layers():
    row = {**ROW, "operand": "x_hat", "of_images": [0.2, 0.9, 0.4], "of_batch": [0.1, 0.2, 0.3]}
    text = tables.mean_share.render([row])
    assert "| a ViT | x_hat | 20% to 90% | 40% | 20 90 40 | 10 20 30 |" in text
