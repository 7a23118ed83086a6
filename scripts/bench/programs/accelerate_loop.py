"""A loop of Accelerate with torchvision's ViT-B of 6 blocks: `wrap` is the one line."""

import sys

import torch
import torchvision
from accelerate import Accelerator

import mesa_train

policy, images = sys.argv[2], int(sys.argv[3])
torch.manual_seed(0)
model = torchvision.models.VisionTransformer(224, 16, 6, 12, 768, 3072, num_classes=10)
if policy != "plain":
    mesa_train.wrap(model, policy)
accelerator = Accelerator(cpu=True)
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-4))
losses = []
for _ in range(4):
    loss = torch.nn.functional.cross_entropy(
        model(torch.randn(images, 3, 224, 224)), torch.arange(images) % 10
    )
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print("losses", *losses)
