"""Which tokens attend to which, equal layers by other means, and refusals."""

import pytest
import torch
import torch.nn.functional as F

from mesa_train.models.attention import ATTENTION_LAYERS, create_attention

DIM, HEADS = 48, 6


def build(name, height=14, width=14, **options):
    torch.manual_seed(0)
    return create_attention(name, DIM, HEADS, height, width, **options).double()


def maps(height=14, width=14, batch=1):
    return torch.randn(batch, height, width, DIM, dtype=torch.float64)


def seen(layer, row, column, height, width):
    """(H, W) of bool: the tokens that the output of one token depends on."""
    x = maps(height, width).requires_grad_()
    layer(x)[0, row, column].sum().backward()
    # A masked weight is exp(-100).
    return x.grad[0].abs().sum(-1) > 1e-30


def area(height, width, *parts):
    expected = torch.zeros(height, width, dtype=torch.bool)
    for rows, columns in parts:
        expected[slice(*rows), slice(*columns)] = True
    return expected


@pytest.mark.parametrize(
    ("name", "size", "token", "parts"),
    [
        ("window", (14, 21), (8, 3), [((7, 14), (0, 7))]),
        ("twins_local", (14, 21), (8, 3), [((7, 14), (0, 7))]),
        ("shifted_window", (14, 21), (5, 5), [((3, 10), (3, 10))]),
        ("shifted_window", (14, 21), (0, 0), [((0, 3), (0, 3))]),  # the mask holds
        ("shifted_window", (14, 21), (12, 1), [((10, 14), (0, 3))]),
        ("shifted_window", (7, 14), (0, 0), [((0, 7), (0, 7))]),  # one row: no shift
        ("cross_window", (14, 21), (8, 3), [((0, 14), (0, 7)), ((7, 14), (0, 21))]),
        ("focal", (28, 28), (8, 9), [((0, 21), (0, 21))]),
        ("focal", (28, 28), (0, 0), [((0, 14), (0, 14)), ((0, 10), (25, 28)),
                                     ((25, 28), (0, 10)), ((25, 28), (25, 28))]),
        ("van", (30, 30), (15, 15), [((4, 27), (4, 27))]),
        ("hornet", (14, 21), (7, 9), [((4, 11), (6, 13))]),
    ],
)  # fmt: skip
def test_a_token_sees_these_tokens(name, size, token, parts):
    assert torch.equal(seen(build(name, *size), *token, *size), area(*size, *parts))


def test_focals_fine_keys_are_the_window_and_three_tokens_around():
    layer = build("focal", 28, 28)
    layer.pool.weight.data.zero_()
    assert torch.equal(seen(layer, 8, 9, 28, 28), area(28, 28, ((4, 17), (4, 17))))
    assert layer.keys == 49 + 132 + 9


def test_focals_windows_beyond_the_border_have_no_weight():
    layer = build("focal", 28, 28)
    # All real values are 1, so an output below 1 has weight on padding.
    layer.qkv.weight.data[2 * DIM :] = 0
    layer.qkv.bias.data[2 * DIM :] = 1
    layer.proj = torch.nn.Identity()
    x = maps(28, 28)
    torch.testing.assert_close(layer(x), torch.ones_like(x))


def test_focals_biases_are_of_the_distance_to_a_pooled_window():
    layer = build("focal", 28, 28)
    side = 7 + 3 - 1
    table = torch.arange(side * side, dtype=torch.float64).expand(HEADS, -1)
    layer.pooled_bias.data = table.clone()
    biases = layer._biases(4, 4).view(16, HEADS, 7, 7, -1)[..., -9:].unflatten(-1, (3, 3))
    # Window 5 has all neighbours. Its token (6, 1) and the window above it on the right, (0, 2).
    assert biases[5, 0, 6, 1, 0, 2] == (6 - 0 + 2) * side + 1 - 2 + 2
    assert (biases[0, :, :, :, 0] < biases[5, :, :, :, 0] - 99).all()  # nothing is above window 0


def attention(layer, x):
    """Full attention by the formula, with the weights of `layer.qkv` and `layer.proj`."""
    q, k, v = (layer.split_heads(t) for t in layer.qkv(x).chunk(3, dim=-1))
    weights = (q @ k.transpose(-2, -1) / layer.head_dim**0.5).softmax(-1)
    return layer.proj((weights @ v).transpose(1, 2).reshape(x.shape))


def test_one_window_is_full_attention():
    layer, x = build("window", 6, 6, window=6), maps(6, 6)
    torch.testing.assert_close(layer(x), attention(layer, x))


def test_linformer_with_identities_is_full_attention():
    layer, x = build("linformer", 5, 6, keys=30), maps(5, 6, batch=2)
    layer.project_k.data = layer.project_v.data = torch.eye(30, dtype=torch.float64)
    torch.testing.assert_close(layer(x), attention(layer, x))


def test_performer_approximates_softmax():
    layer, x = build("performer", 6, 6, features=2**15), 0.5 * maps(6, 6)
    expected = attention(layer, x)
    scale = expected.std(dim=(1, 2)).norm()
    assert (layer(x) - expected).std(dim=(1, 2)).norm() < 0.03 * scale
    rows = layer.directions[: layer.head_dim]
    products = rows @ rows.t()
    assert products.fill_diagonal_(0).abs().max() < 1e-5  # drawn in float32
    # Large queries neither overflow nor lose their sum in half precision.
    half = layer.bfloat16()
    assert half(30 * x.bfloat16()).isfinite().all()


def test_deformable_samples_at_moved_centres():
    layer = build("dat", 6, 8)
    layer.offset_proj.weight.data.zero_()
    positions = layer.positions(maps(6, 8))
    rows = (torch.arange(6, dtype=torch.float64) + 0.5) / 3 - 1
    torch.testing.assert_close(positions[0, :, 0, 0], rows)
    # In a map that rises with the row, a sample is the position in rows, of corners -1 and 1.
    layer.k = layer.v = layer.proj = layer.q = torch.nn.Identity()
    layer.bias_table.data.zero_()
    rising = torch.arange(6, dtype=torch.float64)[None, :, None, None].expand(1, 6, 8, DIM)
    samples = (rows + 1) / 2 * 5
    weights = (torch.outer(rising[0, :, 0, 0], samples) * layer.head_dim**0.5).softmax(-1)
    torch.testing.assert_close(layer(rising)[0, :, 0, 0], weights @ samples)


def test_deformable_offsets_stay_within_reach_and_depend_on_the_query():
    layer = build("dat", 6, 8)
    layer.offset_proj.weight.data.mul_(1e6)
    centres = build("dat", 6, 8)._centres(maps(6, 8))
    moved = (layer.positions(maps(6, 8)) - centres).abs().amax((0, 1, 2))
    torch.testing.assert_close(moved, torch.tensor([2 / 6, 2 / 8], dtype=torch.float64))


def test_deformable_biases_are_of_half_distances():
    layer = build("dat", 4, 4)
    layer.offset_proj.weight.data.zero_()
    table = torch.arange(7.0, dtype=torch.float64)[None, :, None].expand(HEADS, 7, 7)
    layer.bias_table.data = table.clone()  # the row of the table
    biases = layer.biases(layer.positions(maps(4, 4))).view(HEADS, 4, 4, 4, 4)
    # Rows i and j are 2 (i - j) / 4 apart. Half of it is (i - j) / 4, of a table from -1 to 1.
    expected = 3 + 3 * (torch.arange(4.0)[:, None] - torch.arange(4.0)) / 4
    torch.testing.assert_close(biases[0, :, 1, :, 2], expected.double())


def test_quadtree_by_loops():
    """The definition, with one loop over queries and one over chosen keys."""
    layer, x = build("quadtree", 4, 6, top=2), maps(4, 6)
    q, k, v = layer.q(x)[0], layer.k(x)[0], layer.v(x)[0]
    coarse_v = layer.down(v.permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    pooled_q, pooled_k = (
        F.avg_pool2d(t.permute(2, 0, 1)[None], 2)[0].permute(1, 2, 0) for t in (q, k)
    )
    depth, out = layer.head_dim, torch.zeros(4, 6, DIM, dtype=torch.float64)
    shares = layer.levels.softmax(0)
    lepe = [
        conv(t.permute(2, 0, 1)[None])[0].permute(1, 2, 0)
        for conv, t in zip(layer.positions, (coarse_v, v), strict=True)
    ]
    for y in range(4):
        for column in range(6):
            for head in range(HEADS):
                c = slice(head * depth, (head + 1) * depth)
                query = pooled_q[y // 2, column // 2, c]
                weights = (pooled_k[..., c].reshape(-1, depth) @ query / depth**0.5).softmax(0)
                coarse = weights @ coarse_v[..., c].reshape(-1, depth)
                fine = torch.zeros(depth, dtype=torch.float64)
                for chosen in weights.argsort(descending=True)[:2].tolist():
                    top, left = 2 * (chosen // 3), 2 * (chosen % 3)
                    cell = (slice(top, top + 2), slice(left, left + 2), c)
                    scores = k[cell].reshape(4, depth) @ q[y, column, c] / depth**0.5
                    fine = fine + scores.softmax(0) @ v[cell].reshape(4, depth)
                coarse = coarse + lepe[0][y // 2, column // 2, c]
                out[y, column, c] = shares[0] * coarse + shares[1] * (fine + lepe[1][y, column, c])
    torch.testing.assert_close(layer(x)[0], layer.proj(out))


@pytest.mark.parametrize("name", ATTENTION_LAYERS)
def test_maps_keep_their_shape(name):
    x = torch.randn(2, 14, 28, DIM)
    assert build(name, 14, 28).float()(x).shape == x.shape


@pytest.mark.parametrize("name", ATTENTION_LAYERS)
def test_mistakes_of_all_layers_are_named(name):
    with pytest.raises(ValueError, match="dim=50 must be a multiple of num_heads=6"):
        create_attention(name, 50, 6, 14, 14)
    with pytest.raises(ValueError, match="num_heads must be at least 1, got 0"):
        create_attention(name, 48, 0, 14, 14)
    with pytest.raises(ValueError, match="height must be at least 1, got 0"):
        create_attention(name, 48, 6, 0, 14)
    layer = build(name).float()
    with pytest.raises(ValueError, match=r"must be a map \(B, H, W, 48\), got \(1, 196, 48\)"):
        layer(torch.randn(1, 196, 48))
    with pytest.raises(ValueError, match=r"got \(1, 14, 14, 47\)"):
        layer(torch.randn(1, 14, 14, 47))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cross_window", {"height": 13}, "height=13 must be a multiple of stripe=7"),
        ("focal", {"width": 15}, "width=15 must be a multiple of window=7"),
        ("focal", {"window": 1}, "window must be at least 2, got 1"),
        ("quadtree", {"width": 13}, "sides must be even, got 14x13"),
        ("quadtree", {"height": 4, "width": 4}, "have 4 coarse keys, fewer than top=8"),
        ("quadtree", {"top": 0}, "top must be at least 1, got 0"),
        ("sra", {"height": 1}, r"at least 2x2 \(ratio\), got 1x14"),
        ("twins_global", {"ratio": 15}, "at least 15x15"),
        ("twins_local", {"window": 1}, "window must be at least 2, got 1"),
        ("window", {"window": 0}, "window must be at least 1, got 0"),
        ("linformer", {"keys": 0}, "keys must be at least 1, got 0"),
        ("performer", {"features": 0}, "features must be at least 1, got 0"),
        ("dat", {"groups": 4}, "num_heads=6 must be a multiple of groups=4"),
        ("dat", {"kernel": 4}, "kernel must be odd, got 4"),
        ("hornet", {"order": 6}, r"dim=48 must be a multiple of 2\^\(order - 1\)=32"),
        ("hilo", {"alpha": 2}, "alpha must be from 0 to 1, got 2"),
        ("ecoformer", {"kernel": "fast"}, "kernel must be one of official, consistent"),
    ],
)
def test_mistakes_of_one_layer_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_attention(name, DIM, HEADS, **{"height": 14, "width": 14} | options)


def test_cross_windows_need_an_even_number_of_heads():
    with pytest.raises(ValueError, match="num_heads=3 must be a multiple of halves=2"):
        create_attention("cross_window", 48, 3, 14, 14)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("linformer", (7, 28), "built for maps of 14x14, got 7x28"),
        ("dat", (14, 15), "built for maps of 14x14, got 14x15"),
        ("cross_window", (14, 15), "width=15 must be a multiple of stripe=7"),
        ("focal", (13, 14), "height=13 must be a multiple of window=7"),
        ("quadtree", (14, 15), "sides must be even, got 14x15"),
        ("sra", (1, 14), "at least 2x2"),
    ],
)
def test_an_input_of_a_wrong_size_is_named(name, size, message):
    with pytest.raises(ValueError, match=message):
        build(name).float()(torch.randn(1, *size, DIM))


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(ValueError, match=r"hilo, msa, .*, hornet, got 'yoso'"):
        create_attention("yoso", 48, 6, 14, 14)
