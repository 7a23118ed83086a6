"""Hugging Face's Trainer on a ViT-S: the callback is the one line."""

import sys

import torch
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from mesa_train.integrations.transformers import MesaTrainCallback

folder, policy, images = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.manual_seed(0)
config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=10)
data = [{"pixel_values": torch.randn(3, 224, 224), "labels": k % 10} for k in range(4 * images)]
arguments = TrainingArguments(
    folder, per_device_train_batch_size=images, num_train_epochs=1, use_cpu=True, report_to=[],
    logging_steps=1, save_strategy="no", learning_rate=1e-4, disable_tqdm=True,
)  # fmt: skip
callbacks = [] if policy == "plain" else [MesaTrainCallback(policy)]
trainer = Trainer(
    ViTForImageClassification(config), arguments, train_dataset=data, callbacks=callbacks
)
trainer.train()
print("losses", *[entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
