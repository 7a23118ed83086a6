"""The parts of timm's train.py with a Swin-T: `mesa-train run` is the one line, and the program is untouched."""

import sys

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, NativeScaler

images = int(sys.argv[3])
torch.manual_seed(0)
model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10)
optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-4, layer_decay=0.9)
average, scaler, losses = ModelEmaV3(model, decay=0.9), NativeScaler("cpu"), []
for _ in range(4):
    x = torch.randn(images, 3, 224, 224)
    loss = torch.nn.functional.cross_entropy(model(x), torch.arange(images) % 10)
    scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
    optimizer.zero_grad()
    average.update(model)
    losses.append(loss.item())
print("losses", *losses)
