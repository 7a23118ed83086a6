"""Configuration of the training methods, the section `method` of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from mesa_train.training.config_schema import NOT_NEGATIVE, POSITIVE, OneOf

METHODS = (
    "none", "dynamicvit", "dynamicvit_backbone", "ecoformer", "spvit_search", "spvit", "distill",
    "linear", "finetune",
)  # fmt: skip


@dataclass(frozen=True)
class MethodConfig:
    """The part of a recipe beside classification. The defaults are the authors' values for DeiT-S.

    Attributes:
        name: "none" (default). "dynamicvit": student with predictors, distilled by its backbone.
            "dynamicvit_backbone": the backbone alone. "ecoformer": the model's `attention`, and one
            fit of the hashes. "spvit_search": gates and budget loss. "spvit": the network that a
            search found. "distill": the section `distill`. "linear": a new classifier on a frozen
            encoder of MoCo v3. "finetune": all weights, from such an encoder.
        keep_rate: dynamicvit: default 0.7; above 0 and at most 1.
        ratio_weight: dynamicvit: weight of the share of kept tokens; default 2.
        class_weight: dynamicvit: weight of the distillation of logits; default 0.5.
        token_weight: dynamicvit: weight of the distillation of tokens; default 0.5.
        teacher: dynamicvit: a file with the teacher's weights; default: `model.weights`.
        backbone_scale: dynamicvit: factor on the backbone's learning rate; default 0.01.
        frozen_epochs: dynamicvit: epochs in which the backbone's rate is 0; default 5.
        attention: ecoformer: "ecoformer" (default), or "msa" for the stage before it.
        hash_images: ecoformer: images of the fit; default 32.
        target: spvit_search: multiply-adds in units of 1e9; default 1.0.
        budget_weight: spvit_search: weight of the budget loss; default 20.
        gate_lr: spvit_search: learning rate of the gates, not scaled; default 1e-3.
        architecture: spvit: the search's `architecture.json`; default: the published network.
    """

    name: Annotated[str, OneOf(METHODS)] = "none"
    keep_rate: Annotated[float, POSITIVE] = 0.7
    ratio_weight: Annotated[float, NOT_NEGATIVE] = 2.0
    class_weight: Annotated[float, NOT_NEGATIVE] = 0.5
    token_weight: Annotated[float, NOT_NEGATIVE] = 0.5
    teacher: str | None = None
    backbone_scale: Annotated[float, NOT_NEGATIVE] = 0.01
    frozen_epochs: Annotated[int, NOT_NEGATIVE] = 5
    attention: Annotated[str, OneOf(("ecoformer", "msa"))] = "ecoformer"
    hash_images: Annotated[int, POSITIVE] = 32
    target: Annotated[float, POSITIVE] = 1.0
    budget_weight: Annotated[float, NOT_NEGATIVE] = 20.0
    gate_lr: Annotated[float, POSITIVE] = 1e-3
    architecture: str | None = None
