"""The pictures of LITv2: where merging samples, and what frequencies the branches hold."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from mesa_train.models.lit.deformable_merging import DeformConv

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts/bench"


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (80, 90, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_without_offsets_the_points_are_the_patches_of_the_token():
    model = timm.create_model("litv2_tiny", img_size=96).eval()
    shifted, regular = script("plot_dtm").sampled_points(model, torch.randn(2, 3, 96, 96))
    for image in range(2):
        assert [len(level) for level in shifted[image]] == [4, 16, 64]
        for level, grid in zip(shifted[image], regular[image], strict=True):
            torch.testing.assert_close(level, grid)
        # The middle one of 3x3 tokens covers pixels 32 to 63; its finest points are 4 px apart.
        finest = regular[image][-1]
        assert finest.min().item() == 33.5
        assert finest.max().item() == 61.5
        assert len({tuple(p) for p in finest.tolist()}) == 64


def test_offsets_move_the_points_down_and_right():
    model = timm.create_model("litv2_tiny", img_size=96).eval()
    for module in model.modules():
        if isinstance(module, DeformConv):
            # Tap 3, lower right: 0.25 down, 0.5 left.
            module.conv_offset.bias.data[6:] = torch.tensor([0.25, -0.5])
    shifted, regular = script("plot_dtm").sampled_points(model, torch.randn(1, 3, 96, 96))
    shift = (shifted[0][0] - regular[0][0]) / 16
    torch.testing.assert_close(shift[:3], torch.zeros(3, 2))
    torch.testing.assert_close(shift[3], torch.tensor([0.25, -0.5]))


def test_spectra_tell_high_from_low():
    plot = script("plot_hilo")
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    smooth, checkered = torch.cos(2 * torch.pi * x / 16), (-1.0) ** (x + y)
    shares = [
        plot.high_share(plot._log_magnitude(m.view(1, 16, 16, 1))) for m in (smooth, checkered)
    ]
    assert shares[0] < 0.01
    assert shares[1] > 0.99
    model = timm.create_model("litv2_tiny", img_size=128).eval()
    by_layer = plot.spectra(model, torch.randn(2, 3, 128, 128))
    assert list(by_layer) == ["layers.2.blocks.0.attn", "layers.2.blocks.1.attn"]
    assert all(s.shape == (8, 8) for both in by_layer.values() for s in both)


@pytest.mark.parametrize("name", ["plot_dtm", "plot_hilo"])
def test_pictures_of_a_photo(name, photo, tmp_path):
    options = {"model": "litv2_tiny", "weights": None, "run": None, "images": 1, "image_size": 128}
    script(name).main(**options, image=photo, out=tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width > 400
    with pytest.raises(SystemExit, match="no such file"):
        script(name).main(**options, image=Path("nowhere.png"), out=tmp_path / "p.png")
    assert sys.modules.get(name) is None
