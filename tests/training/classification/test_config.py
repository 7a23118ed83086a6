"""A mistake in a configuration is one line that names the key, the value and the choices."""

import pytest

from mesa_train.training.classification.config import Config, check_files, load, of_dict
from mesa_train.training.config_schema import ConfigError


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
        (
            "augment.scale=[1, 0.5]",
            r"augment\.scale must be a range within 0 and 1, got \[1\.0, 0\.5\]",
        ),
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


TEXT = {
    "train.precision=no": "no",
    "train.out=2024": "2024",
    "train.out=runs/no": "runs/no",
    "train.out=2024-01-02": "2024-01-02",
    "data.path=010": "010",
    "data.path=1:30": "1:30",
    "data.path=1e3": "1e3",
    "data.train_split=on": "on",
    "data.val_split=1": "1",
    "data.label_key=y": "y",
    "data.image_key=n": "n",
    "augment.rand_augment=off": "off",
    "augment.rand_augment=": "",
    "model.weights=~": None,
    "model.weights=null": None,
    "model.weights=": None,
    "model.weights='null'": "null",
}


@pytest.mark.parametrize("where", ["file", "--set"])
@pytest.mark.parametrize("change", TEXT)
def test_in_a_text_field_the_text_counts_as_written(tmp_path, change, where):
    name, _, text = change.partition("=")
    section, _, key = name.partition(".")
    changes = [change] if where == "--set" else []
    written = f"{section}: {{{key}: {text}}}" if where == "file" else ""
    (tmp_path / "c.yaml").write_text(written)
    found = getattr(getattr(load(tmp_path / "c.yaml", changes), section), key)
    assert found == TEXT[change]


@pytest.mark.parametrize(
    "text", ["/data/x #1", "#1", "&a", "a & b", "x # y: z", " #", "no # off", "é #2"]
)
def test_a_command_line_has_no_comments_and_no_anchors(tmp_path, text):
    (tmp_path / "c.yaml").write_text("")
    assert load(tmp_path / "c.yaml", [f"data.path={text}"]).data.path == text.strip()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("optim.lr=1e-4", 1e-4),
        ("optim.lr=1E-4", 1e-4),
        ("optim.lr=.001", 1e-3),
        ("optim.lr=1", 1.0),
        ("optim.lr='1e-4'", 1e-4),
        ("train.seed=0x10", 16),
        ("train.seed=0o17", 15),
        ("train.global_batch=1_024", 1024),
        ("data.pin_memory=no", False),
        ("data.pin_memory=Off", False),
        ("data.pin_memory=TRUE", True),
        ("data.pin_memory=yes", True),
        ("data.train_images=", None),
    ],
)
def test_numbers_and_switches(tmp_path, change, expected):
    (tmp_path / "c.yaml").write_text("")
    name = change.partition("=")[0].split(".")
    found = getattr(getattr(load(tmp_path / "c.yaml", [change]), name[0]), name[1])
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # 8 in YAML 1.1, 10 in YAML 1.2.
        ("train.seed=010", r"train\.seed must be int, got '010'; a number has no leading zeros"),
        ("optim.lr=010", r"optim\.lr must be float, got '010'; a number has no leading zeros"),
        ("train.seed='5'", r"train\.seed must be int, got '5'; a number is written without quotes"),
        ("data.image_size=3:0", r"data\.image_size must be int, got '3:0'"),
        ("train.epochs=1e3", r"train\.epochs must be int, got 1e3"),
        ("train.epochs=2024-01-02", r"train\.epochs must be int, got '2024-01-02'"),
        ("optim.weight_decay=5%", r"optim\.weight_decay must be float, got '5%'"),
        ("optim.lr=null", r"optim\.lr must be float, got None"),
        ("train.epochs=", r"train\.epochs must be int, got None"),
        ("optim.lr=.nan", r"optim\.lr must be positive, got nan"),
        ("optim.lr=.inf", r"optim\.lr must be positive, got inf"),
        ("data.pin_memory=y", r"data\.pin_memory must be bool, got 'y'"),
        ("data.pin_memory=tRUE", r"data\.pin_memory must be bool, got 'tRUE'"),
        ("data.pin_memory='true'", r"data\.pin_memory must be bool, got 'true'"),
        ("model.name=null", r"model\.name must be str, got None; .* or the word in quotes"),
        ("optim.betas=0.9,0.95", r"optim\.betas must be a list of 2 numbers, got '0\.9,0\.95'"),
        ("optim.betas=[a, 0.95]", r"optim\.betas must be float, got 'a'"),
        ("train.policy=off", r"train\.policy must be one of plain, .*, got 'off'"),
        ("data.path=[a]", r"data\.path must be str, got \['a'\]"),
    ],
)
def test_values_of_another_type(tmp_path, change, message):
    (tmp_path / "c.yaml").write_text("")
    with pytest.raises(ConfigError, match=message) as error:
        load(tmp_path / "c.yaml", [change])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {epochs: 3, epochs: 4}", "is not YAML: the key 'epochs' is given twice"),
        ("train:\n  epochs: 3\ntrain:\n  seed: 1\n", "the key 'train' is given twice"),
        ("train:\n\tepochs: 3\n", "is not YAML: .*cannot start any token"),
        ("a: 1\n---\nb: 2\n", "is not YAML: expected a single document"),
        ("no: {epochs: 3}", r"unknown key no; keys: model"),
        ("2024: {epochs: 3}", r"unknown key 2024; keys: model"),
        ("train: off", "train must be a section of keys, got False"),
    ],
)
def test_mistakes_of_a_whole_file(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load(tmp_path / "c.yaml")
    assert "\n" not in str(error.value)


def test_files_that_are_no_text_or_empty(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"train: {out: \xff\xfe}")
    with pytest.raises(ConfigError, match=r"c\.yaml is not YAML: unacceptable character"):
        load(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("# nothing\n---\ntrain:\n")
    assert load(tmp_path / "c.yaml") == Config()


def test_merged_sections_are_yamls_own(tmp_path):
    text = "model: &m {name: litv2_s}\ntrain: {seed: 1}\n"
    (tmp_path / "c.yaml").write_text(text + "optim: &o {lr: 1e-3}\n")
    assert load(tmp_path / "c.yaml").optim.lr == 1e-3
    (tmp_path / "c.yaml").write_text("train: {<<: {seed: 1, out: no}, seed: 2}\n")
    train = load(tmp_path / "c.yaml").train
    assert (train.seed, train.out) == (2, "no")


def test_an_odd_batch_is_fine_where_no_images_are_mixed(tmp_path):
    (tmp_path / "c.yaml").write_text("train: {micro_batch: 7}\n")
    assert load(tmp_path / "c.yaml", ["augment.mixup=0", "augment.cutmix=0"]).train.micro_batch == 7
