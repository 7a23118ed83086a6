"""The model and the images that the scripts draw pictures of."""

import pictures
import pytest
import timm
import torch

import mesa_train.models  # noqa: F401  registers them with timm
from mesa_train.training import checkpoints
from mesa_train.training.config_schema import ConfigError

NAME = "test_vit"


def test_a_model_by_name_has_the_weights_of_the_file(tmp_path):
    trained = timm.create_model(NAME, img_size=64).eval()
    path = tmp_path / "best.safetensors"
    checkpoints.save_weights(path, trained.state_dict(), {})
    settings, network = pictures.built(None, NAME, path, 64)
    assert settings.data.image_size == 64
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(network(images), trained(images))


def test_a_run_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        pictures.built(tmp_path, NAME, None, None)


def test_a_picture_is_one_image_of_the_models_size(tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (90, 80), (10, 200, 30)).save(tmp_path / "green.png")
    settings, _ = pictures.built(None, NAME, None, 64)
    (picture,) = pictures.load_images(settings, tmp_path / "green.png", 4)
    assert picture.shape == (3, 64, 64)
    # One colour, so that nothing but the normalisation is left.
    assert torch.equal(picture, picture[:, :1, :1].expand(3, 64, 64))
    assert picture[1, 0, 0] > picture[0, 0, 0]
    with pytest.raises(ConfigError, match=r"--image: no such file .*red\.png"):
        pictures.load_images(settings, tmp_path / "red.png", 4)
    (tmp_path / "red.png").write_text("no picture")
    with pytest.raises(ConfigError, match=r"red\.png cannot be decoded"):
        pictures.load_images(settings, tmp_path / "red.png", 4)
