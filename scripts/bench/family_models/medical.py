"""Models of MONAI on volumes, with the losses of segmentation."""

from __future__ import annotations

from typing import Any

import torch
from monai.losses import DiceCELoss
from monai.networks import nets
from torch import Tensor, nn

from . import case

MEDICAL = "medical volumes"


class Segmented(nn.Module):
    """A network with the Dice and cross-entropy loss of its segmentation."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.criterion = net, DiceCELoss(to_onehot_y=True, softmax=True)

    def forward(self, volume: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The logits and the loss."""
        logits = self.net(volume)
        return {"logits": logits, "loss": self.criterion(logits, labels)}


def volumes(size: int = 32, batch: int = 1, classes: int = 3) -> tuple[Tensor, Tensor]:
    """A batch of volumes with one channel, and the class of each voxel."""
    shape = (batch, 1, size, size, size)
    return torch.randn(shape), torch.randint(classes, shape)


@case("SwinUNETR", MEDICAL)
def swin_unetr() -> tuple[nn.Module, Any]:
    """SwinUNETR: 3-D windows, instance norms."""
    net = nets.SwinUNETR(
        in_channels=1, out_channels=3, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)
    )
    return Segmented(net), volumes(64)


@case("UNETR", MEDICAL)
def unetr() -> tuple[nn.Module, Any]:
    """UNETR: a ViT encoder with a convolutional decoder."""
    net = nets.UNETR(
        in_channels=1, out_channels=3, img_size=(32, 32, 32), feature_size=8, hidden_size=48,
        mlp_dim=192, num_heads=4,
    )  # fmt: skip
    return Segmented(net), volumes()


@case("DynUNet (nnU-Net)", MEDICAL)
def nnunet() -> tuple[nn.Module, Any]:
    """The network of nnU-Net: convolutions, instance norms, leaky ReLU."""
    net = nets.DynUNet(
        spatial_dims=3, in_channels=1, out_channels=3, kernel_size=[3, 3, 3], strides=[1, 2, 2],
        upsample_kernel_size=[2, 2], filters=[8, 16, 32],
    )  # fmt: skip
    return Segmented(net), volumes()


@case("SegResNet", MEDICAL)
def segresnet() -> tuple[nn.Module, Any]:
    """SegResNet: residual blocks with group norm."""
    net = nets.SegResNet(spatial_dims=3, init_filters=8, in_channels=1, out_channels=3)
    return Segmented(net), volumes()


@case("ViT autoencoder 3-D", MEDICAL)
def vit_autoencoder() -> tuple[nn.Module, Any]:
    """MONAI's ViT autoencoder on volumes."""
    net = nets.ViTAutoEnc(
        in_channels=1, img_size=(32, 32, 32), patch_size=(4, 4, 4), hidden_size=96, mlp_dim=384,
        num_layers=3, num_heads=4, out_channels=1,
    )  # fmt: skip
    return net, volumes(batch=2)[0]
