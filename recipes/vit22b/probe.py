"""Linear probe, nearest neighbours and robustness of a frozen model.

    python recipes/vit22b/probe.py                                   # random weights, digits
    python recipes/vit22b/probe.py --model vit_22b --weights W --train DIR --held-out DIR
    --image-size 224
    ... --set-folder IMAGENET_R --mapping labels.yaml --set-crop 0.875

An image folder holds one folder for each class. `datasets` caches the features under OUT, so a
second call takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from PIL import Image
from torch import Tensor

import mesa_train.models  # noqa: F401  registers them with timm
from mesa_train.models.vit22b.init import initialise
from mesa_train.models.vit22b.model import SIZES
from mesa_train.training.config_schema import OneOf
from mesa_train.training.data import folder
from mesa_train.training.data import packaged as data
from mesa_train.training.data.config import DataConfig
from mesa_train.training.data.decode import decode
from mesa_train.training.data.sources import keeping_random_state, seed_cpu
from mesa_train.training.evaluation import linear_probe as features
from mesa_train.training.evaluation import robustness
from mesa_train.training.progress import Every
from mesa_train.training.vit22b import estimates
from mesa_train.training.vit22b.checkpoint import CheckpointError, load_export
from mesa_train.training.vit22b.config import CropConfig
from mesa_train.training.vit22b.data import transforms
from mesa_train.utils.formatting import format_bytes


def main(
    model: Annotated[
        str, typer.Option(help="A model of mesa_train.models.vit22b.")
    ] = "vit_22b_tiny",
    weights: Annotated[Path | None, typer.Option(help="Safetensors file or folder.")] = None,
    train: Annotated[str, typer.Option(help="Folder, or digits or mnist5k.")] = "digits",
    held_out: Annotated[Path | None, typer.Option(help="Folder, for a folder.")] = None,
    image_size: Annotated[int, typer.Option(help="Pixels.")] = 56,
    views: Annotated[
        int, typer.Option(min=1, help="Views of each training image; the first is not augmented.")
    ] = 2,
    flip: Annotated[
        float | None,
        typer.Option(help="Share of views that are mirrored; default: 0.5, 0 for digits."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 64,
    set_folder: Annotated[Path | None, typer.Option(help="An out-of-distribution set.")] = None,
    mapping: Annotated[Path | None, typer.Option(help="Training label: the set's label.")] = None,
    set_crop: Annotated[float, typer.Option(help="Central crop of the set; 0.75 for A.")] = 0.875,
    out: Annotated[Path, typer.Option(help="Cache and results.")] = Path("runs/vit22b/probe"),
) -> None:
    """Print accuracies and write them to a file."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        sets = training_images(train, held_out, image_size, flip)
        net = build(model, weights, image_size, device)
        predicted = estimates.one_card(model, "probe", image_size, batch_size, "plain")
        parts = estimates.components(predicted)
        print("expected:", ", ".join(f"{k} {format_bytes(v)}" for k, v in parts.items() if v))
        # The time of the last change is part of the cache key: rewritten weights give other
        # features.
        stamp = max((f.stat().st_mtime_ns for f in files_in(weights)), default=0)
        identity = f"{model} {weights} {stamp} {image_size} {train}"

        def found(split: str, view: int) -> tuple[Tensor, Tensor]:
            def make() -> Iterator[tuple[Tensor, Tensor]]:
                yield from features.extract(net, sets.batches(split, view, batch_size), device)

            return features.cached(out / "features", f"{identity} {split} {view} {flip}", make)

        known = [found("train", view) for view in range(views)]
        test = found("held_out", 0)
        probe = features.linear_probe(known, test)
        row: dict[str, Any] = {
            "model": model,
            "images": len(known[0][1]),
            "linear_probe": probe.accuracy,
            "lr": probe.lr,
            "nearest_neighbours": features.nearest_neighbours(known[0], test),
            "calibration_error": robustness.evaluate(
                probe.logits(test[0]), test[1]
            ).calibration_error,
        }
        if set_folder is not None:
            theirs = images_of_set(set_folder, image_size, set_crop)
            table = None
            if mapping is not None:
                table = robustness.LabelMap.read(mapping, sets.labels, theirs.labels)
            batches = theirs.batches("held_out", 0, batch_size)
            values, labels = map(
                torch.cat, zip(*features.extract(net, batches, device), strict=True)
            )
            score = robustness.evaluate(probe.logits(values), labels, table)
            row[set_folder.name] = vars(score)
    except (ValueError, CheckpointError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").write_text(json.dumps(row, indent=1))
    print(json.dumps(row, indent=1))


def files_in(weights: Path | None) -> list[Path]:
    """The files that hold the weights."""
    if weights is None:
        return []
    return list(weights.glob("*.safetensors")) if weights.is_dir() else [weights]


def build(name: str, weights: Path | None, size: int, device: str) -> Any:
    """Build the frozen model, from weights or drawn from seed 0.

    Raises:
        ValueError: the name or the size is wrong.
    """
    OneOf(SIZES)("--model", name)
    if size % SIZES[name][0]:
        raise ValueError(f"--image-size must be a multiple of {SIZES[name][0]}, got {size}")
    with torch.device("meta"):
        net: Any = timm.create_model(name, img_size=size, num_classes=0)
    net.to_empty(device=device)
    if weights is None:
        initialise(net, 0)
    else:
        load_export(weights, net, fresh_head=True)
    return net.requires_grad_(False).eval()


class Images:
    """Images as batches.

    Args:
        splits: images and labels, by the split's name.
        labels: names of the classes.
        augment: transform of a training view.
        test: transform for evaluation.
    """

    def __init__(self, splits: dict[str, Any], labels: list[str], augment: Any, test: Any) -> None:
        self.splits, self.labels, self.augment, self.test = splits, labels, augment, test

    def batches(self, split: str, view: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels in order.

        View 0 uses the transform for evaluation. Other views are augmented, each batch with its own
        seed.
        """
        found = self.splits[split]
        transform = self.augment if view else self.test
        said = Every()
        for start in range(0, len(found), batch):
            said(f"{split}, view {view}: {start} of {len(found)} images")
            rows = [picture(found, i) for i in range(start, min(start + batch, len(found)))]
            with keeping_random_state():
                seed_cpu(view, start)
                pixels = torch.stack([transform(image) for image, _ in rows])
            yield pixels, torch.tensor([label for _, label in rows])


def training_images(train: str, held_out: Path | None, size: int, flip: float | None) -> Images:
    """Training and held-out images of a built-in set or of two folders.

    Raises:
        ValueError: `train` is no built-in set, and `held_out` is missing.
    """
    builtin = train in data.BUILTIN
    # A mirrored digit is no digit.
    share = flip if flip is not None else 0.0 if builtin else 0.5
    crops = CropConfig(scale=(0.7, 1.0), hflip=share)
    # The built-in digits fill their frame, so the evaluation crops nothing.
    cut = transforms(DataConfig(image_size=size), crops, 1.0 if builtin else 0.875)
    if builtin:
        found = data.load(train)
        splits = {
            key: [(Image.fromarray(x.squeeze().numpy()), int(y)) for x, y in pairs(split)]
            for key, split in (("train", found.train), ("held_out", found.held_out))
        }
        return Images(splits, [str(i) for i in range(found.num_classes)], *cut)
    if held_out is None:
        raise ValueError(
            f"--train must be a folder with a --held-out folder beside it, or one of "
            f"{', '.join(data.BUILTIN)}; got {train} and {held_out}"
        )
    known, test, labels = folder.load(train, str(held_out), ("--train", "--held-out"))
    return Images({"train": known, "held_out": test}, labels, *cut)


def images_of_set(path: Path, size: int, crop: float) -> Images:
    """The images of another set's folder, all held out."""
    rows, labels = folder.load_one(str(path), "--set-folder")
    cut = transforms(DataConfig(image_size=size), CropConfig(), crop)
    return Images({"held_out": rows}, labels, *cut)


def pairs(split: data.Split) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of a built-in split."""
    return zip(split.images, split.labels, strict=True)


def picture(found: Any, index: int) -> tuple[Any, int]:
    """(RGB image, label) of a split. ValueError, with the file's name, if it cannot be decoded."""
    if not isinstance(found, folder.Rows):
        image, label = found[index]
        return image.convert("RGB"), label
    path = found.paths[index]
    try:
        return decode(path), found.labels[index]
    except Exception as error:  # Pillow's plugins raise errors of many types
        raise ValueError(f"{folder.shown(path)} cannot be decoded ({error})") from None


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
