"""A LightningModule with timm's ViT-S: the callback is the one line."""

import sys

import lightning
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

from mesa_train.integrations.lightning import MesaTrainCallback

folder, policy, images = sys.argv[1], sys.argv[2], int(sys.argv[3])


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = timm.create_model("vit_small_patch16_224", num_classes=10)
        self.seen: list[float] = []

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.seen.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-4)


torch.manual_seed(0)
data = TensorDataset(torch.randn(4 * images, 3, 224, 224), torch.arange(4 * images) % 10)
trainer = lightning.Trainer(
    default_root_dir=folder, max_epochs=1, accelerator="cpu", logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    callbacks=[] if policy == "plain" else [MesaTrainCallback(policy)],
)  # fmt: skip
classifier = Classifier()
trainer.fit(classifier, DataLoader(data, images))
print("losses", *classifier.seen)
