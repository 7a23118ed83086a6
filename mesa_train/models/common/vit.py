"""Parts of plain ViTs: the patch embedding as tokens, and the resampling of its positions."""

from __future__ import annotations

from timm.layers import resample_abs_pos_embed, to_2tuple
from torch import Tensor, nn


class TokenEmbed(nn.Module):
    """Embed images (B, in_chans, H, W) as tokens (B, H * W / patch_size ** 2, dim), row by row.

    Args:
        img_size: in pixels.
        patch_size: in pixels; must divide both sides.
        in_chans: of the images.
        dim: width.
    Raises:
        ValueError: `patch_size` does not divide the image.
    """

    def __init__(
        self, img_size: int | tuple[int, int], patch_size: int, in_chans: int, dim: int
    ) -> None:
        super().__init__()
        self.grid_size = patch_grid(img_size, patch_size)
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


def patch_grid(img_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """The patches (rows, columns) of an image. ValueError if `patch_size` does not divide it."""
    height, width = to_2tuple(img_size)
    if height % patch_size or width % patch_size or min(height, width) < patch_size:
        raise ValueError(
            f"img_size must be a multiple of the patch size {patch_size}, got {height}x{width}"
        )
    return height // patch_size, width // patch_size


def resized_positions(positions: Tensor, grid: tuple[int, int], prefix_tokens: int) -> Tensor:
    """Position embeddings (1, prefix_tokens + N, C) of a square grid, resampled to `grid`."""
    if positions.shape[1] == grid[0] * grid[1] + prefix_tokens:
        return positions
    return resample_abs_pos_embed(positions, grid, num_prefix_tokens=prefix_tokens)
