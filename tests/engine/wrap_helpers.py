"""What the tests of `wrap` share: a small model, its gradients, and what its graph keeps."""

import timm
import torch
import torch.nn.functional as F
from seeding import seed_torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mesa_train import Policy

EIGHT = Policy(min_bytes=0)
LOSSLESS = Policy(bits=32, min_bytes=0)


class Block(nn.Module):
    """One with a signature, attributes and a property."""

    def __init__(self, width=32):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.register_buffer("offset", torch.ones(width))
        self.width = width

    def forward(
        self, x: torch.Tensor, *, scale: float = 1.0, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What it does."""
        return x + scale * self.mlp(self.norm(x)) + self.offset

    @property
    def double_width(self):
        return 2 * self.width


def net():
    seed_torch(0)
    return nn.Sequential(Block(), Block(), nn.Linear(32, 5))


def batch(rows=16, seed=1):
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed))


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(found, expected):
    return all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def close(found, expected, bound):
    assert [f is None for f in found] == [e is None for e in expected]
    pairs = [(f, e) for f, e in zip(found, expected, strict=True) if e is not None]
    difference = sum((f - e).square().sum() for f, e in pairs)
    return difference.sqrt() <= bound * sum(e.square().sum() for _, e in pairs).sqrt()


def saved_bytes(function):
    """Bytes the graph keeps, each storage once, and what the function returned."""
    storages = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = function()
    return sum(s.nbytes() for s in storages.values()), output


class Checkpointed(nn.Module):
    """A small ViT of timm with every block in a checkpoint of a kind; `part` of it: blocks, or what is in them."""

    def __init__(self, kind, part="block"):
        super().__init__()
        seed_torch(0)
        self.vit = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            embed_dim=48,
            depth=3,
            num_heads=3,
            num_classes=5,
        )
        self.kind, self.part = kind, part

    def again(self, function, x):
        if self.kind is None:
            return function(x)
        return checkpoint(function, x, use_reentrant=self.kind == "reentrant")

    def forward(self, images):
        vit = self.vit
        x = vit.patch_embed(images)
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(x)))
        for block in vit.blocks:
            if self.part == "block":
                x = self.again(block, x)
            elif self.part == "mlp":
                x = x + block.attn(block.norm1(x))
                # The tensor that enters the checkpoint is a norm's output, which outside has a lineage.
                x = x + self.again(block.mlp, block.norm2(x))
            else:
                x = x + self.again(lambda t, block=block: block.attn(block.norm1(t)), x)
                x = x + self.again(
                    lambda t, block=block: (
                        F.gelu(block.mlp.fc1(block.norm2(t))) @ block.mlp.fc2.weight.t()
                    ),
                    x,
                )
        return vit.head(vit.norm(x)[:, 0])


def images(seed=0):
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
