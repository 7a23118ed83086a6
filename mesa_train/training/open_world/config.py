"""Configuration of the open-world recipe. The defaults are ORE's schedule on LITv2-S."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from mesa_train.models.open_world.energy import MODES, OUTSIDE, SAMPLES
from mesa_train.models.open_world.rules import PRESETS as RULES
from mesa_train.models.open_world.rules import OpenWorldRules
from mesa_train.training.config_schema import (
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    SHARE,
    ConfigError,
    Configuration,
    OneOf,
)
from mesa_train.training.dense.config import AugmentConfig
from mesa_train.training.recipe_config import RunConfig, check_out

FORMATS = ("benchmark", "coco", "voc", "digits")


@dataclass(frozen=True)
class ModelConfig:
    """The detector and its initial weights.

    Attributes:
        backbone: a timm model with maps, LITv2's included, or a plain ViT; default "litv2_s".
        window: of LITv2's stage 3, or of a plain ViT's blocks; default 0: 2 for LITv2, 14 for a
            plain ViT.
        global_blocks: blocks of a plain ViT that attend over the whole map; default 4.
        drop_path: highest drop path rate of the backbone; default 0.2; in [0, 1).
        weights: safetensors file of a backbone or of a run's `model.safetensors`; default: none.
        pretrained: download timm's weights of the backbone; default false.
        grad_checkpointing: of the backbone's blocks; default false.
        frozen_stages: number of the backbone's first stages that are not trained; 1 is the stem, 2
            the stem and the stage of stride 4; default 0.
        freeze_batch_norm: the backbone's batch norms keep their statistics and weights; default
            false.
        box_dim: width of the box head, whose output is clustered; default 1024.
        channels: of the pyramid's maps; default 256.
        regions: sampled proposals of an image in training; default 512.
        proposals: of an image after NMS; default 1000.
    """

    backbone: str = "litv2_s"
    window: Annotated[int, NOT_NEGATIVE] = 0
    global_blocks: Annotated[int, NOT_NEGATIVE] = 4
    drop_path: Annotated[float, SHARE] = 0.2
    weights: str | None = None
    pretrained: bool = False
    grad_checkpointing: bool = False
    frozen_stages: Annotated[int, NOT_NEGATIVE] = 0
    freeze_batch_norm: bool = False
    box_dim: Annotated[int, POSITIVE] = 1024
    channels: Annotated[int, POSITIVE] = 256
    regions: Annotated[int, POSITIVE] = 512
    proposals: Annotated[int, POSITIVE] = 1000


@dataclass(frozen=True)
class DataConfig:
    """Pictures, tasks, and their loader.

    Attributes:
        format: "benchmark" (default): VOC and COCO with the lists of `make_splits.py`; "coco" or
            "voc": a folder in that format; "digits": composed pictures, written to `path` if it is
            missing.
        tasks: "owod" (default), "sowodb", or class names such as "cat, dog; horse": `;` ends a task.
            Classes of the data that no task names are always unknown.
        path: the folder of "coco", "voc" and "digits". COCO: PATH/SPLIT/*.jpg and
            PATH/annotations/instances_SPLIT.json.
        train, val: names of its splits; default "train" and "val".
        voc2007, voc2012, coco: folders of the benchmark.
        lists: folder of the benchmark's lists.
        test: list of the test pictures; default "test"; "test_official" repeats pictures.
        fit: split, or list of the benchmark, whose pictures energies are fitted on. Default: held
            out from the training pictures; of "digits", further composed pictures.
        fit_trained: train on the pictures of `fit` too, as the official lists do; default false.
        train_pictures, val_pictures: of "digits"; default 600 and 100.
        side: height and width of the pictures of "digits"; default 96.
        crowd: COCO's crowd regions are objects, as in the official lists; default false.
        short_side: of a scaled picture in pixels; default 800.
        long_side: largest long side of a scaled picture in pixels; default 1333.
        workers: loader processes; default 2.
        pin_memory: of the loader; default true.
    """

    format: Annotated[str, OneOf(FORMATS)] = "benchmark"
    tasks: str = "owod"
    path: str | None = None
    train: str = "train"
    val: str = "val"
    voc2007: str | None = None
    voc2012: str | None = None
    coco: str | None = None
    lists: str | None = None
    test: str = "test"
    fit: str | None = None
    fit_trained: bool = False
    train_pictures: Annotated[int, POSITIVE] = 600
    val_pictures: Annotated[int, POSITIVE] = 100
    side: Annotated[int, POSITIVE] = 96
    crowd: bool = False
    short_side: Annotated[int, POSITIVE] = 800
    long_side: Annotated[int, POSITIVE] = 1333
    workers: Annotated[int, NOT_NEGATIVE] = 2
    pin_memory: bool = True


@dataclass(frozen=True)
class MethodConfig:
    """Open-world detection. A value of null takes the one of `rules`.

    Attributes:
        rules: "default", "paper" or "official_code"; see `models.open_world.OpenWorldRules`.
        unknowns_per_image, cluster_weight, feature_scale, queue_size, start, update_every, margin:
            change a value of `rules`; default null.
        energy: "off" (default), "known_tail" or "two_fits"; see `EnergyIdentifier.set`.
        tail: of "known_tail"; default 0.05.
        outside: of "two_fits", "keep" (default) or "unknown".
        temperature: of the energies in the fit; default 1.
        samples: energies of "detections" (default) or of "proposals" (the official code) are
            fitted; see `OpenWorldRCNN.energies`.
        fit_pictures: pictures for the fit, drawn by the seed; default 500. Unless `energy` is "off",
            no stage trains on them.
        transductive: fit unknown energies on annotated unknown objects, as ORE's authors do, which
            an open-world detector does not have; default false.
        exemplars: objects of each class in a replay set; default 50.
    """

    rules: Annotated[str, OneOf(RULES)] = "default"
    unknowns_per_image: Annotated[int | None, NOT_NEGATIVE] = None
    cluster_weight: Annotated[float | None, NOT_NEGATIVE] = None
    feature_scale: str | None = None
    queue_size: Annotated[int | None, POSITIVE] = None
    start: Annotated[int | None, NOT_NEGATIVE] = None
    update_every: Annotated[int | None, POSITIVE] = None
    margin: Annotated[float | None, POSITIVE] = None
    energy: Annotated[str, OneOf(MODES)] = "off"
    tail: Annotated[float, PROBABILITY] = 0.05
    outside: Annotated[str, OneOf(OUTSIDE)] = "keep"
    temperature: Annotated[float, POSITIVE] = 1.0
    samples: Annotated[str, OneOf(SAMPLES)] = "detections"
    fit_pictures: Annotated[int, POSITIVE] = 500
    transductive: bool = False
    exemplars: Annotated[int, POSITIVE] = 50

    def open_world_rules(self) -> OpenWorldRules:
        """The rules with the changed values. ConfigError if a value is none of its choices."""
        names = (
            *("unknowns_per_image", "cluster_weight", "feature_scale", "queue_size"),
            *("start", "update_every", "margin"),
        )
        changes = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        try:
            return RULES[self.rules](**changes)
        except ValueError as error:
            raise ConfigError(f"method.{error}") from None


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, and the steps and rates of each stage. A list has one entry a task.

    Attributes:
        name: "sgd" (default; momentum 0.9) or "adamw".
        lr: rate of a task's training; default 0.01, for 8 images a step.
        finetune_lr: constant rate of a fine-tuning; default 1e-4.
        weight_decay: default 1e-4.
        clip: largest norm of the gradient; default 0: none.
        warmup_steps: linear warm-up of each task's training; default 100.
        steps: optimizer steps of each task's training.
        finetune_steps: optimizer steps of each task's fine-tuning on the replay set; 0: none.
        milestones: steps of each task's training after which the rate is multiplied by 0.1; `;` ends
            a task.
    """

    name: Annotated[str, OneOf(("sgd", "adamw"))] = "sgd"
    lr: Annotated[float, POSITIVE] = 0.01
    finetune_lr: Annotated[float, POSITIVE] = 1e-4
    weight_decay: Annotated[float, NOT_NEGATIVE] = 1e-4
    clip: Annotated[float, NOT_NEGATIVE] = 0.0
    warmup_steps: Annotated[int, NOT_NEGATIVE] = 100
    steps: str = "18000, 52000, 40000, 41000"
    finetune_steps: str = "0, 4000, 2500, 3000"
    milestones: str = "12000, 16000; 32000, 42000; 36000, 38000; 39000, 40000"


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """One run over all tasks. The defaults of the other fields are those of `RunConfig`.

    Attributes:
        global_batch: pictures in an optimizer step over all processes; default 8.
        micro_batch: most pictures in a process at once; default 1.
        log_every: optimizer steps between log lines; default 50.
        save_every: optimizer steps between checkpoints; default 0: at the end of each stage.
        pictures: test pictures drawn with detections after each stage; default 8.
        out: folder of the run; default "runs/open_world".
    """

    global_batch: Annotated[int, POSITIVE] = 8
    micro_batch: Annotated[int, POSITIVE] = 1
    log_every: Annotated[int, POSITIVE] = 50
    pictures: Annotated[int, NOT_NEGATIVE] = 8
    out: str = "runs/open_world"


@dataclass(frozen=True)
class TestConfig:
    """The detections of every evaluation. All tasks have the same values.

    Attributes:
        score: smallest score; default 0.05.
        nms: IoU of the suppression within a class; default 0.5.
        detections: most per picture; default 100. A-OSE grows with it.
    """

    score: Annotated[float, PROBABILITY] = 0.05
    nms: Annotated[float, PROBABILITY] = 0.5
    detections: Annotated[int, POSITIVE] = 100


@dataclass(frozen=True)
class Config(Configuration):
    """Configuration of the recipe, one section for each topic."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    test: TestConfig = field(default_factory=TestConfig)

    def check(self) -> None:
        """Raise ConfigError for values of several sections that do not fit together."""
        data, method, train = self.data, self.method, self.train
        if data.format == "benchmark" and data.tasks not in ("owod", "sowodb"):
            raise ConfigError(
                f"data.tasks must be one of owod, sowodb with format=benchmark, got {data.tasks!r}"
            )
        if data.format == "digits" and (data.train, data.val) != ("train", "val"):
            raise ConfigError(
                "data.train and data.val must be train and val with data.format=digits, got "
                f"{data.train} and {data.val}"
            )
        self._check_fit()
        if data.short_side > data.long_side:
            raise ConfigError(
                f"data.short_side={data.short_side} must be at most data.long_side={data.long_side}"
            )
        if train.global_batch % train.micro_batch:
            raise ConfigError(
                f"train.global_batch={train.global_batch} must be a multiple of "
                f"train.micro_batch={train.micro_batch}"
            )
        if method.transductive and method.energy != "two_fits":
            raise ConfigError("method.transductive=true needs method.energy=two_fits")
        if not 0 < method.tail < 1:
            raise ConfigError(f"method.tail must lie in (0, 1), got {method.tail:g}")
        method.open_world_rules()

    def _check_fit(self) -> None:
        data = self.data
        if data.format == "digits" and data.fit is not None:
            raise ConfigError(f"data.fit={data.fit}: digits have a split of their own for the fit")
        tested = data.test if data.format == "benchmark" else data.val
        if data.fit == tested:
            raise ConfigError(f"data.fit={data.fit} has the test pictures; name another")
        if data.fit_trained and data.fit is None:
            raise ConfigError("data.fit_trained=true needs data.fit")

    def check_files(self) -> None:
        """Raise ConfigError if data or weights are missing, or `train.out` cannot be written."""
        data = self.data
        needed = ["path"] if data.format != "benchmark" else ["lists", "coco"]
        if data.format == "benchmark" and data.tasks == "owod":
            needed += ["voc2007", "voc2012"]
        for name in needed:
            value = getattr(data, name)
            if not value:
                raise ConfigError(f"data.{name} is missing: data.format={data.format} needs it")
            if data.format != "digits" and not Path(value).is_dir():
                raise ConfigError(f"data.{name}: no such folder {value}")
        if self.model.weights and not Path(self.model.weights).is_file():
            raise ConfigError(f"model.weights: no such file {self.model.weights}")
        check_out(self.train.out)
        if data.format == "digits" and not Path(str(data.path)).is_dir():
            check_out(str(data.path), "data.path")


@dataclass(frozen=True)
class Stage:
    """A part of a run: the training of a task, or its fine-tuning on the replay set.

    Attributes:
        task: from 1.
        finetune: true for a fine-tuning.
        first, last: optimizer steps of the run, [first, last).
        milestones: steps of the stage after which the rate falls.
    """

    task: int
    finetune: bool
    first: int
    last: int
    milestones: tuple[int, ...]

    @property
    def name(self) -> str:
        """`t2_train` or `t2_ft`, as the benchmark's lists."""
        return f"t{self.task}_{'ft' if self.finetune else 'train'}"

    def rate(self, optim: OptimConfig, step: int) -> float:
        """The learning rate of an optimizer step of the run."""
        own = step - self.first
        if self.finetune:
            return optim.finetune_lr
        value = optim.lr * 0.1 ** sum(own >= milestone for milestone in self.milestones)
        return value * min(1.0, (own + 1) / max(1, optim.warmup_steps))


def stages_of(optim: OptimConfig, tasks: int) -> list[Stage]:
    """The stages of a run.

    Raises:
        ConfigError: a list of `optim` does not have an entry for each task.
    """
    steps = _numbers("steps", optim.steps, tasks)
    finetune = _numbers("finetune_steps", optim.finetune_steps, tasks)
    parts = optim.milestones.split(";") if optim.milestones.strip() else [""] * tasks
    if len(parts) != tasks:
        raise ConfigError(
            f"optim.milestones must have {tasks} parts, one a task, got {optim.milestones!r}"
        )
    stages: list[Stage] = []
    done = 0
    for task in range(1, tasks + 1):
        milestones = tuple(_numbers("milestones", parts[task - 1], None))
        if not steps[task - 1]:
            raise ConfigError(f"optim.steps must be positive in each task, got {optim.steps!r}")
        for is_finetune, count in ((False, steps[task - 1]), (True, finetune[task - 1])):
            if count:
                own = () if is_finetune else milestones
                stages.append(Stage(task, is_finetune, done, done + count, own))
                done += count
    return stages


def _numbers(name: str, text: str, count: int | None) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() for part in parts) or (count is not None and len(parts) != count):
        many = "" if count is None else f", one for each of {count} task(s)"
        raise ConfigError(f"optim.{name} must be whole numbers with commas{many}, got {text!r}")
    return [int(part) for part in parts]


load, of_dict = Config.load, Config.of_dict
