"""Configuration section `distill` of a classification recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from mesa_train.training.config_schema import NOT_NEGATIVE, POSITIVE, OneOf

BITS = ("16", "8", "4")


@dataclass(frozen=True)
class DistillConfig:
    """The teacher, its outputs and the loss. It serves `method.name=distill`.

    Attributes:
        teacher: a timm model, this project's included, or a folder with a transformers
            `config.json`; default: none.
        weights: of a timm teacher: a safetensors file, an official checkpoint or "pretrained".
        image_size: the teacher gets the student's view resized to this, in pixels; default: the
            student's size.
        bits: of the teacher's Linear weights: "16" (default) keeps them in the model's dtype; "8"
            and "4" (NF4) code them by bitsandbytes.
        loss: "softmax" (default), or "sigmoid" for a teacher that was trained with one sigmoid for
            each class.
        temperature: divides the logits of both; default 1. The loss is multiplied by its square.
        draws: stored draws of each image. 0 (default): the teacher runs beside the student. K: the
            teacher labels K augmented views of each image once, and epoch e uses draw e modulo K.
        top: stored probabilities of an image: the best ones, and the sum of the others; default 16;
            0 stores all logits.
        store: folder of the stored outputs; default: `teacher` in the folder of the run. Students
            share it if data, seed, size and augmentation are the same.
    """

    teacher: str | None = None
    weights: str | None = None
    image_size: Annotated[int | None, POSITIVE] = None
    bits: Annotated[str, OneOf(BITS)] = "16"
    loss: Annotated[str, OneOf(("softmax", "sigmoid"))] = "softmax"
    temperature: Annotated[float, POSITIVE] = 1.0
    draws: Annotated[int, NOT_NEGATIVE] = 0
    top: Annotated[int, NOT_NEGATIVE] = 16
    store: str | None = None
