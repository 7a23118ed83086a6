"""LITv2 word by word from its description, slow and in float64, sharing nothing with the library.

Tokens are (B, N, C); every window, tap and neighbour is taken by itself; nothing of torch.nn is used.
"""

import math

import torch


def litv2(weights, images, *, heads, windows=(0, 0, 2, 1), alpha=0.9, dense=False):
    """Logits, or for `dense` the four stages' maps (B, C, H, W), each after its own norm."""
    w = {key: value.double() for key, value in weights.items()}
    x = images.double()
    batch, channels, height, width = x.shape
    rows, columns = math.ceil(height / 4), math.ceil(width / 4)
    padded = x.new_zeros(batch, channels, 4 * rows, 4 * columns)
    padded[:, :, :height, :width] = x
    patches = [padded[:, :, i::4, j::4] for i in range(4) for j in range(4)]  # taps in C order
    kernel = w["patch_embed.proj.weight"]
    x = sum(
        torch.einsum("bchw,oc->bhwo", patch, kernel[:, :, tap // 4, tap % 4])
        for tap, patch in enumerate(patches)
    )
    x = (x + w["patch_embed.proj.bias"]).reshape(batch, rows * columns, -1)
    x = layer_norm(x, w, "patch_embed.norm")
    maps = []
    for stage in range(4):
        block = 0
        while f"layers.{stage}.blocks.{block}.norm2.weight" in w:
            name = f"layers.{stage}.blocks.{block}"
            if windows[stage]:
                normed = layer_norm(x, w, f"{name}.norm1")
                x = x + hilo(
                    normed, w, f"{name}.attn.", rows, columns, heads[stage], windows[stage], alpha
                )
            x = x + conv_ffn(layer_norm(x, w, f"{name}.norm2"), w, f"{name}.mlp", rows, columns)
            block += 1
        if dense:
            normed = layer_norm(x, w, f"norm{stage}")
            maps.append(normed.transpose(1, 2).reshape(batch, -1, rows, columns))
        if stage < 3:
            x = merging(x, w, f"layers.{stage}.downsample", rows, columns)
            rows, columns = rows // 2, columns // 2
    if dense:
        return maps
    return linear(layer_norm(x, w, "norm").mean(1), w, "head")


def linear(x, w, name):
    out = x @ w[f"{name}.weight"].T
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def layer_norm(x, w, name):
    centred = x - x.mean(-1, keepdim=True)
    spread = (centred**2).mean(-1, keepdim=True) + 1e-5
    return centred / spread.sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def attention(q, k, v):
    """(..., tokens, d), softmax over keys."""
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).exp()
    return scores / scores.sum(-1, keepdim=True) @ v


def hilo(x, w, prefix, rows, columns, heads, s, alpha):
    """(B, rows * columns, c) to the same."""
    batch, _, c = x.shape
    d = c // heads
    lo = heads if s == 1 else int(heads * alpha)
    high, wide = math.ceil(rows / s), math.ceil(columns / s)
    grid = x.new_zeros(batch, high * s, wide * s, c)
    grid[:, :rows, :columns] = x.reshape(batch, rows, columns, c)
    outs = []
    if lo < heads:
        fine = x.new_zeros(batch, high * s, wide * s, (heads - lo) * d)
        for i in range(high):
            for j in range(wide):
                area = (slice(None), slice(i * s, i * s + s), slice(j * s, j * s + s))
                window = linear(grid[area].reshape(batch, s * s, c), w, f"{prefix}h_qkv")
                q, k, v = window.split((heads - lo) * d, dim=-1)
                head_slices = [slice(h * d, h * d + d) for h in range(heads - lo)]
                outputs = [attention(q[..., h], k[..., h], v[..., h]) for h in head_slices]
                fine[area] = torch.cat(outputs, -1).reshape(batch, s, s, -1)
        fine = fine[:, :rows, :columns].reshape(batch, rows * columns, -1)
        outs.append(linear(fine, w, f"{prefix}h_proj"))
    if lo:
        corners = [grid[:, i::s, j::s] for i in range(s) for j in range(s)]
        coarse = (sum(corners) / (s * s)).reshape(batch, high * wide, c)
        q = linear(x, w, f"{prefix}l_q")
        k, v = linear(coarse, w, f"{prefix}l_kv").split(lo * d, dim=-1)
        head_slices = [slice(h * d, h * d + d) for h in range(lo)]
        outputs = [attention(q[..., h], k[..., h], v[..., h]) for h in head_slices]
        outs.append(linear(torch.cat(outputs, -1), w, f"{prefix}l_proj"))
    return torch.cat(outs, -1)


def conv_ffn(x, w, name, rows, columns):
    batch, tokens, _ = x.shape
    hidden = linear(x, w, f"{name}.fc1").reshape(batch, rows, columns, -1)
    bordered = hidden.new_zeros(batch, rows + 2, columns + 2, hidden.shape[-1])
    bordered[:, 1:-1, 1:-1] = hidden
    kernel = w[f"{name}.dwconv.dwconv.weight"]
    mixed = sum(
        bordered[:, i : i + rows, j : j + columns] * kernel[:, 0, i, j]
        for i in range(3)
        for j in range(3)
    )
    mixed = mixed + w[f"{name}.dwconv.dwconv.bias"]
    return linear(gelu(mixed).reshape(batch, tokens, -1), w, f"{name}.fc2")


def merging(x, w, name, rows, columns):
    """Deformable 2x2 convolution of stride 2, batch norm with running statistics, GELU."""
    batch, _, c = x.shape
    grid = x.reshape(batch, rows, columns, c)
    high, wide = rows // 2, columns // 2
    down, across = torch.meshgrid(torch.arange(high), torch.arange(wide), indexing="ij")
    taps = [(0, 0), (0, 1), (1, 0), (1, 1)]

    def plain(ky, kx):
        return grid[:, ky : 2 * high : 2, kx : 2 * wide : 2]

    kernel = w[f"{name}.dconv.conv_offset.weight"]
    offsets = w[f"{name}.dconv.conv_offset.bias"] + sum(
        plain(ky, kx) @ kernel[:, :, ky, kx].T for ky, kx in taps
    )
    kernel, out = w[f"{name}.dconv.weight"], w[f"{name}.dconv.bias"]
    for tap, (ky, kx) in enumerate(taps):
        y = 2 * down + ky + offsets[..., 2 * tap]
        across_x = 2 * across + kx + offsets[..., 2 * tap + 1]
        out = out + bilinear(grid, y, across_x) @ kernel[:, :, ky, kx].T
    norm = f"{name}.norm_layer"
    scale = (w[f"{norm}.running_var"] + 1e-5).sqrt()
    out = (out - w[f"{norm}.running_mean"]) / scale * w[f"{norm}.weight"] + w[f"{norm}.bias"]
    return gelu(out).reshape(batch, high * wide, -1)


def bilinear(grid, y, x):
    """Values (B, h, w, C) of maps (B, H, W, C) at points (B, h, w); outside of them is zero."""
    batch, height, width, _ = grid.shape
    images = torch.arange(batch)[:, None, None]
    total = 0
    for dy in (0, 1):
        for dx in (0, 1):
            row, column = y.floor() + dy, x.floor() + dx
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            share = (1 - (y - row).abs()) * (1 - (x - column).abs()) * inside
            row, column = row.long().clamp(0, height - 1), column.long().clamp(0, width - 1)
            total = total + share[..., None] * grid[images, row, column]
    return total
