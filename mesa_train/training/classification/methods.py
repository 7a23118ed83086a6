"""Training methods of the efficient ViTs: their losses, parameter groups, beginnings and results.

A recipe names its method in the section `method`. `method.py` has the hooks, and the order in which
a run calls them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mesa_train.training.config_schema import ConfigError
from mesa_train.training.data.sources import keeping_random_state

from .config import Config
from .method import Method as Method
from .method import Weights
from .transfer import FineTuning, LinearEvaluation

ARCHITECTURE = "architecture.json"


class DynamicViTBackbone(Method):
    """The backbone of DynamicViT, which is the teacher later."""

    def options(self) -> dict[str, Any]:
        return {"predictors": ()}


class DynamicViT(Method):
    """DynamicViT's student. The class token and the positions are frozen, as in the authors' code."""

    teacher: nn.Module | None = None

    def options(self) -> dict[str, Any]:
        return {"keep_rate": self.method.keep_rate}

    def groups(self, model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        new = {id(p) for n, p in model.named_parameters() if "score_predictor" in n or "fast" in n}
        frozen = {id(p) for n, p in model.named_parameters() if n in ("cls_token", "pos_embed")}
        split: list[dict[str, Any]] = []
        for group in groups:
            members = [p for p in group["params"] if id(p) not in frozen]
            backbone = {**group, "name": f"backbone_{group['name']}"}
            backbone |= {"lr_scale": self.method.backbone_scale}
            split.append({**group, "params": [p for p in members if id(p) in new]})
            split.append({**backbone, "params": [p for p in members if id(p) not in new]})
        return [group for group in split if group["params"]]

    def rates(self, optimizer: Any, epoch: int) -> None:
        if epoch < self.method.frozen_epochs:
            for group in optimizer.param_groups:
                if group.get("name", "").startswith("backbone_"):
                    group["lr"] = 0.0

    def loss(self, run: Any, images: Tensor, targets: Tensor) -> Tensor:
        if self.teacher is None:
            # A resumed run builds the teacher in another step than a whole run.
            with keeping_random_state():
                self.teacher = self._teacher(run)
        with torch.no_grad(), run.accelerator.autocast():
            taught = self.teacher.teach(images)  # type: ignore[operator]
        output = run.model(images)
        return self._criterion(run.bare, output, self._soft(targets, run.classes), taught)

    def counted_loss(self, model: nn.Module, output: Any) -> Tensor:
        from mesa_train.models.dynamicvit.outputs import TeacherOutput

        taught = TeacherOutput(output.logits.detach(), output.tokens.detach())
        return self._criterion(model, output, torch.ones_like(output.logits), taught)

    def _criterion(self, student: Any, output: Any, targets: Tensor, taught: Any) -> Tensor:
        """The sum of the four losses. `targets`: probabilities (B, classes)."""
        from mesa_train.models.dynamicvit.losses import DynamicViTLoss

        token_loss = "kl" if getattr(student, "lv_vit", False) else "mse"
        method = self.method
        criterion = DynamicViTLoss(
            student.keep_rates,
            method.ratio_weight,
            method.class_weight,
            method.token_weight,
            token_loss,
        )
        total: Tensor = criterion(_float(output), targets.float(), _float(taught)).total
        return total

    def _soft(self, targets: Tensor, classes: int) -> Tensor:
        """Soft targets (B, classes) of class numbers (B,), smoothed, or of mixed targets."""
        if targets.dim() == 2:
            return targets.float()
        smoothing = self.config.augment.label_smoothing
        return nn.functional.one_hot(targets, classes) * (1 - smoothing) + smoothing / classes

    def teacher_bytes(self, classes: int) -> int:
        with torch.device("meta"):
            teacher = self._build_teacher(classes)
        return sum(t.nbytes for t in (*teacher.parameters(), *teacher.buffers()))

    def _build_teacher(self, classes: int) -> nn.Module:
        """The network of the teacher with random weights."""
        import timm

        teacher: nn.Module = timm.create_model(
            self.config.model.name,
            num_classes=classes,
            img_size=self.config.data.image_size,
            predictors=(),
        )
        return teacher

    def _teacher(self, run: Any) -> nn.Module:
        """The frozen teacher with its weights. ConfigError if there are none."""
        from mesa_train.models.lit.official import load_official

        path = self.method.teacher or self.config.model.weights
        if path is None:
            raise ConfigError("method.teacher: a distillation needs the weights of a teacher")
        teacher = self._build_teacher(run.classes)
        try:
            if Path(path).suffix == ".safetensors":
                from safetensors.torch import load_file

                teacher.load_state_dict(load_file(path))
            else:
                load_official(teacher, path, allow_config=self.config.model.allow_config)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(f"method.teacher: {' '.join(str(error).split())[:200]}") from None
        return teacher.to(run.accelerator.device).eval().requires_grad_(False)


class EcoFormer(Method):
    """EcoFormer, or its stage before with softmax attention."""

    def options(self) -> dict[str, Any]:
        return {"attention": self.method.attention}

    def begin(self, run: Any) -> None:
        from mesa_train.models.ecoformer import fit_hashes, hashes_fitted

        if self.method.attention == "msa" or hashes_fitted(run.bare):
            return
        images, count = [], 0
        for batch, _, _ in run.batches():
            images.append(batch)
            count += len(batch)
            if count >= self.method.hash_images:
                break
        batch = torch.cat(images)[: self.method.hash_images].to(run.accelerator.device)
        try:
            fit_hashes(run.bare, batch, seed=self.config.train.seed)
        except ValueError as error:
            raise ConfigError(f"method.name=ecoformer: {error}") from None


class SPViTSearch(Method):
    """SPViT's search. After each epoch it writes the architecture that the gates stand for."""

    def options(self) -> dict[str, Any]:
        return {"search": True}

    def groups(self, model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        gates: Any = model.gate_parameters()  # type: ignore[operator]
        of_gates = {id(p) for p in gates}
        others = [
            {**g, "params": [p for p in g["params"] if id(p) not in of_gates]} for g in groups
        ]
        scale = self.method.gate_lr / groups[0]["lr"]
        gate = {"name": "gates", "lr": groups[0]["lr"], "lr_scale": scale, "weight_decay": 0.0}
        return [g for g in others if g["params"]] + [{**gate, "params": list(gates)}]

    def loss(self, run: Any, images: Tensor, targets: Tensor) -> Tensor:
        loss = super().loss(run, images, targets)
        budget = run.bare.budget_loss(self.method.target, self.method.budget_weight)
        return loss + budget.to(loss.dtype)

    def finish_epoch(self, run: Any) -> None:
        if not run.accelerator.is_main_process:
            return
        found, cost = run.bare.architecture(), run.bare.cost()
        names = [n for n, m in run.bare.named_modules() if hasattr(m, "mlp")]
        masks = {n: [int(on) for on in m] for n, m in zip(names, found.masks, strict=True)}
        values = {"flops": int(cost.total), "msa": found.msa, "ffn_keep": found.ffn_keep}
        run.out.mkdir(parents=True, exist_ok=True)
        (run.out / ARCHITECTURE).write_text(json.dumps({**values, "masks": masks}))


class SPViT(Method):
    """The network that a search found. It starts from the pretrained weights, pruned by its masks."""

    def options(self) -> dict[str, Any]:
        found = self._found()
        return {} if found is None else {key: found[key] for key in ("msa", "ffn_keep")}

    def weights(self, found: Weights) -> Weights:
        from mesa_train.models.spvit.network import pruned_weights

        architecture = self._found()
        if architecture is None:
            return found
        masks = {name: torch.tensor(mask) for name, mask in architecture["masks"].items()}
        try:
            return pruned_weights(found, masks)
        except ValueError as error:
            raise ConfigError(f"method.architecture: {self.method.architecture}: {error}") from None

    def _found(self) -> dict[str, Any] | None:
        """The architecture of the file, or None. ConfigError if it cannot be read."""
        path = self.method.architecture
        if path is None:
            return None
        try:
            found = json.loads(Path(path).read_text())
            return {key: found[key] for key in ("msa", "ffn_keep", "masks")}
        except (OSError, ValueError, KeyError) as error:
            reason = getattr(error, "strerror", None) or f"no architecture of a search ({error})"
            raise ConfigError(f"method.architecture: {path}: {reason}") from None


_CLASSES: dict[str, type[Method]] = {
    "none": Method,
    "dynamicvit": DynamicViT,
    "dynamicvit_backbone": DynamicViTBackbone,
    "ecoformer": EcoFormer,
    "spvit_search": SPViTSearch,
    "spvit": SPViT,
    "linear": LinearEvaluation,
    "finetune": FineTuning,
}


def method_of(config: Config) -> Method:
    """The method of a configuration."""
    if config.method.name == "distill":
        from mesa_train.training.distill.method import Distillation

        return Distillation(config)
    return _CLASSES[config.method.name](config)


def _float(output: Any) -> Any:
    """A named tuple whose logits and tokens are float32."""
    return output._replace(logits=output.logits.float(), tokens=output.tokens.float())
