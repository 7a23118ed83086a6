"""A small ViT of transformers, trained on packaged digits by transformers' Trainer under mesa_train.

    python recipes/evaluate/train_transformers.py
    python recipes/evaluate/run.py --model OUT --weights pretrained --train mnist5k

It takes minutes on one core. The folder OUT has the model and its image processor, as
`from_pretrained` reads them.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.utils.data import Dataset

from mesa_train.training.config_schema import POLICY
from mesa_train.training.data import packaged
from mesa_train.training.mistakes import in_one_line


class Digits(Dataset[dict[str, Tensor]]):
    """Images of a split as the Trainer takes them: three channels, from -1 to 1."""

    def __init__(self, split: packaged.Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        pixels = self.split.images[index].float() / 127.5 - 1
        return {"pixel_values": pixels.expand(3, -1, -1), "labels": self.split.labels[index]}


def main(
    data: Annotated[str, typer.Option(help="mnist5k or digits.")] = "mnist5k",
    epochs: Annotated[int, typer.Option(min=1)] = 4,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    policy: Annotated[str, typer.Option(help="A preset of mesa_train.")] = "mesa8",
    seed: int = 0,
    cpu: Annotated[bool, typer.Option("--cpu", help="Use no GPU.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the model.")] = Path("runs/transformers_vit"),
) -> None:
    """Train a ViT of 4 layers, with patches of 7 pixels."""
    from transformers import (
        Trainer,
        TrainingArguments,
        ViTConfig,
        ViTForImageClassification,
        ViTImageProcessor,
    )

    from mesa_train.integrations.transformers import MesaTrainCallback

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    with in_one_line("train_transformers"):
        POLICY("--policy", policy)
        found = packaged.load(data)
        torch.manual_seed(seed)
        size = found.image_size
        model = ViTForImageClassification(
            ViTConfig(
                hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
                image_size=size, patch_size=7 if size % 7 == 0 else 2, num_labels=found.num_classes,
            )
        )  # fmt: skip
        arguments = TrainingArguments(
            output_dir=str(out), num_train_epochs=epochs, per_device_train_batch_size=batch_size,
            learning_rate=lr, weight_decay=0.05, lr_scheduler_type="cosine",
            warmup_steps=found.steps_per_epoch(batch_size),
            save_strategy="no", logging_steps=10_000, report_to=[], seed=seed, use_cpu=cpu,
            disable_tqdm=True, dataloader_pin_memory=torch.cuda.is_available() and not cpu,
        )  # fmt: skip
        callbacks: list[Any] = [] if policy == "plain" else [MesaTrainCallback(policy)]
        trainer = Trainer(model, arguments, train_dataset=Digits(found.train), callbacks=callbacks)
        trainer.train()
        model.save_pretrained(out)
        half = [0.5, 0.5, 0.5]
        ViTImageProcessor(
            size={"height": size, "width": size}, image_mean=half, image_std=half
        ).save_pretrained(out)
        right = trainer.predict(Digits(found.held_out)).predictions.argmax(1) == (
            found.held_out.labels.numpy()
        )
        print(f"{right.mean():.1%} of {len(right)} held-out images; the model is in {out}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
