"""A mistake in a configuration is one line that names the key, the value and the choices."""

import pytest

from mesa_train.training.config import Config, ConfigError, check_files, load, of_dict


def test_defaults_are_the_official_recipe():
    config = Config()
    assert (config.train.global_batch, config.train.epochs, config.optim.warmup_epochs) == (
        1024,
        300,
        20,
    )
    assert (config.augment.mixup, config.augment.cutmix, config.augment.erase) == (0.8, 1.0, 0.25)
    assert of_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.epoch=3", r"unknown key train\.epoch; did you mean train\.epochs|epochs\?"),
        ("trian.epochs=3", r"unknown key trian; did you mean train\?"),
        ("train.epochs=many", r"train\.epochs must be int, got 'many'"),
        ("train.epochs=2.5", r"train\.epochs must be int, got 2\.5"),
        ("train.epochs=true", r"train\.epochs must be int, got True"),
        ("data.streaming=1", r"data\.streaming must be bool, got 1"),
        ("optim.betas=[0.9]", r"optim\.betas must be a list of 2 numbers"),
        ("optim.lr=-1", r"optim\.lr must be positive"),
        ("train.policy=mesa9", r"train\.policy must be one of .* got 'mesa9' \(did you mean mesa"),
        ("optim.name=adam", r"optim\.name must be one of adamw.*did you mean adamw"),
        ("train.tracker=mlflow", r"train\.tracker must be one of tensorboard, wandb, none"),
        ("train.device=gpu", r"train\.device must be one of auto, cpu"),
        ("optim.offset_floor=low", r"optim\.offset_floor must be one of shared, scaled"),
        ("train.precision=fp8", r"train\.precision must be one of no, bf16, fp16"),
        ("augment.erase=1.5", r"augment\.erase must lie in \[0, 1\), got 1\.5"),
        ("optim.warmup_epochs=300", r"warmup_epochs=300 must be fewer than train\.epochs=300"),
        ("train.micro_batch=7", r"micro_batch=7 must be even for mixup"),
        ("data.source=imagefolder", r"data\.path is missing: imagefolder needs a folder"),
        ("data.streaming=true", r"data\.train_images is missing"),
        ("data.workers=-1", r"data\.workers must not be negative"),
        ("optim.weight_decay=-0.1", r"optim\.weight_decay must not be negative, got -0\.1"),
        ("optim.min_lr=.nan", r"optim\.min_lr must not be negative, got nan"),
        ("augment.mixup=-1", r"augment\.mixup must not be negative"),
        ("augment.scale=[1, 0.5]", r"augment\.scale must be a range within 0 and 1\.0, got"),
        ("augment.ratio=[0, 2]", r"augment\.ratio must be a range"),
        ("augment.hflip=1.1", r"augment\.hflip must lie in \[0, 1\]"),
        ("optim.betas=[0.9, 1]", r"optim\.betas must lie in \[0, 1\), got \[0\.9, 1\.0\]"),
        ("train", r"--set takes section\.key=value, got 'train'"),
        ("train=3", r"--set takes section\.key=value"),
        ("train.epochs=[", r"'\[' is not a YAML value"),
    ],
)
def test_mistakes(tmp_path, change, message):
    (tmp_path / "c.yaml").write_text("model: {name: litv2_tiny}\n")
    with pytest.raises(ConfigError, match=message) as error:
        load(tmp_path / "c.yaml", [change])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("- 1", "must hold sections, got list"),
        ("train: 3", "train must be a section of keys, got 3"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "c.yaml")


def test_numbers_in_yamls_odd_notation_and_lists(tmp_path):
    (tmp_path / "c.yaml").write_text("optim: {lr: 5e-4, betas: [0.9, 0.95]}\n")
    config = load(tmp_path / "c.yaml", ["augment.scale=[0.5, 1]", "train.ema=0.99"])
    assert config.optim.lr == 5e-4
    assert config.optim.betas == (0.9, 0.95)
    assert config.augment.scale == (0.5, 1.0)


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [
        ("data", "path", "data.path: no such folder or file"),
        ("model", "weights", "model.weights: no such file"),
    ],
)
def test_missing_files(section, key, message):
    with pytest.raises(ConfigError, match=message):
        check_files(of_dict({section: {key: "nowhere/at/all"}}))
    with pytest.raises(ConfigError, match=r"no configuration file nowhere\.yaml"):
        load("nowhere.yaml")


def test_an_output_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"train\.out: .*/file is a file, not a folder"):
        check_files(of_dict({"train": {"out": str(tmp_path / "file/run")}}))
    check_files(of_dict({"train": {"out": str(tmp_path / "new/run")}}))
