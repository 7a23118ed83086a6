"""open_clip's ViT-S-32-alt and its contrastive loss: `mesa-train run` is the one line, and the program is untouched."""

import sys

import open_clip
import torch

images = int(sys.argv[3])
torch.manual_seed(0)
model = open_clip.create_model("ViT-S-32-alt")
optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
criterion, losses = open_clip.ClipLoss(), []
for _ in range(4):
    pictures, texts = (
        torch.randn(4 * images, 3, 224, 224),
        torch.randint(1, 49000, (4 * images, 77)),
    )
    optimizer.zero_grad()
    loss = criterion(*model(pictures, texts))
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print("losses", *losses)
