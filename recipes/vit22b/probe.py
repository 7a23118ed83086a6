"""Linear probe, nearest neighbours and robustness of a frozen model.

    python recipes/vit22b/probe.py                                   # random weights, digits
    python recipes/vit22b/probe.py --model vit_22b --weights W --train DIR --held-out DIR --image-size 224
    ... --set-folder IMAGENET_R --mapping labels.yaml --set-crop 0.875

Folders hold one folder a class. Features are cached under OUT by `datasets`, so that a second call
is a matter of seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from timm.data import create_transform
from torch import Tensor

import mesa_train.models  # noqa: F401  registers them with timm
from mesa_train.models.vit22b_init import initialise
from mesa_train.training import data, features, robustness
from mesa_train.training.sharded_checkpoint import CheckpointError, load_export


def main(
    model: Annotated[
        str, typer.Option(help="A model of mesa_train.models.vit22b.")
    ] = "vit_22b_tiny",
    weights: Annotated[Path | None, typer.Option(help="Safetensors file or folder.")] = None,
    train: Annotated[str, typer.Option(help="Folder, or digits or mnist5k.")] = "digits",
    held_out: Annotated[Path | None, typer.Option(help="Folder, for a folder.")] = None,
    image_size: Annotated[int, typer.Option(help="Pixels.")] = 56,
    views: Annotated[int, typer.Option(help="Augmented views of each training image.")] = 2,
    flip: Annotated[float, typer.Option(help="Share of views that are mirrored.")] = 0.0,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 64,
    set_folder: Annotated[Path | None, typer.Option(help="An out-of-distribution set.")] = None,
    mapping: Annotated[Path | None, typer.Option(help="Training label: the set's label.")] = None,
    set_crop: Annotated[float, typer.Option(help="Central crop of the set; 0.75 for A.")] = 0.875,
    out: Annotated[Path, typer.Option(help="Cache and results.")] = Path("runs/vit22b/probe"),
) -> None:
    """Print and write accuracies."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        sets = Images(train, held_out, image_size, flip)
        net = build(model, weights, image_size, sets.channels, device)
        identity = f"{model} {weights} {image_size} {train}"

        def found(split: str, view: int) -> tuple[Tensor, Tensor]:
            def make() -> Iterator[tuple[Tensor, Tensor]]:
                yield from features.extract(net, sets.batches(split, view, batch_size), device)

            return features.cached(out / "features", f"{identity} {split} {view} {flip}", make)

        known = [found("train", view) for view in range(views)]
        test = found("held_out", -1)
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
            theirs = Images(str(set_folder), set_folder, image_size, 0.0, set_crop)
            table = None
            if mapping is not None:
                table = robustness.LabelMap.read(mapping, sets.labels, theirs.labels)
            batches = theirs.batches("held_out", -1, batch_size)
            values, labels = map(
                torch.cat, zip(*features.extract(net, batches, device), strict=True)
            )
            score = robustness.evaluate(probe.logits(values), labels, table)
            row[set_folder.name] = vars(score)
    except (ValueError, CheckpointError) as error:
        raise SystemExit(f"error: {error}") from None
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").write_text(json.dumps(row, indent=1))
    print(json.dumps(row, indent=1))


def build(name: str, weights: Path | None, size: int, channels: int, device: str) -> Any:
    """The frozen model, from weights or drawn from seed 0."""
    with torch.device("meta"):
        net: Any = timm.create_model(name, img_size=size, in_chans=channels, num_classes=0)
    net.to_empty(device=device)
    if weights is None:
        initialise(net, 0)
    else:
        load_export(weights, net, fresh_head=True)
    return net.requires_grad_(False).eval()


class Images:
    """Training and held-out images of a built-in set or of folders, as batches."""

    def __init__(
        self, train: str, held_out: Path | None, size: int, flip: float, crop: float = 0.875
    ) -> None:
        self.size, self.builtin = size, train in data.BUILTIN
        if self.builtin:
            found = data.load(train)
            self.splits: dict[str, Any] = {"train": found.train, "held_out": found.held_out}
            self.labels = [str(i) for i in range(found.num_classes)]
            self.channels, self.normalise = found.channels, found.normalise
            return
        if held_out is None or not held_out.is_dir() or not Path(train).is_dir():
            raise ValueError(f"--train {train} and --held-out {held_out} must be folders")
        from datasets import load_dataset

        self.splits = {
            key: load_dataset("imagefolder", data_dir=str(folder), split="train")
            for key, folder in (("train", train), ("held_out", held_out))
        }
        self.labels, self.channels = self.splits["train"].features["label"].names, 3
        shape = (3, size, size)
        norm = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
        self.augment = create_transform(shape, is_training=True, scale=(0.7, 1.0), hflip=flip,
                                        auto_augment=None, color_jitter=None, **norm)  # fmt: skip
        self.test = create_transform(shape, crop_pct=crop, **norm)

    def batches(self, split: str, view: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels in order; view -1 is not augmented, others by their own streams."""
        found = self.splits[split]
        if self.builtin:
            shift = data.light_augmentation()
            resized = found.resized(self.size)
            for images, labels in zip(
                resized.images.split(batch), resized.labels.split(batch), strict=True
            ):
                pixels = images.float() / 255
                if view >= 0:
                    with torch.random.fork_rng(devices=[]):
                        torch.manual_seed(view)
                        pixels = torch.stack([shift(image) for image in pixels])
                yield self.normalise(pixels), labels
            return
        transform = self.test if view < 0 else self.augment
        for start in range(0, len(found), batch):
            rows = found[start : start + batch]
            torch.manual_seed(view + 1 + start)
            pixels = torch.stack([transform(image.convert("RGB")) for image in rows["image"]])
            yield pixels, torch.tensor(rows["label"])


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
