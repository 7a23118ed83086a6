"""Parameters and multiply-adds of the attention layers are the published ones, and are counted again."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mesa_train.models.attention import ATTENTION_LAYERS, create_attention

DIM, HEADS, SIDE = 768, 12, 14
TOKENS = SIDE * SIDE
NORM = 5 * 49 * DIM  # the norm of 49 keys, at 5 multiply-adds an element

# (parameters, multiply-adds). The published benchmark has no linear SRA and no Twins. PVTv2's own
# count of linear SRA leaves the norm out.
PUBLISHED = {
    "hilo": (2_198_528, 298_296_320),
    "msa": (2_362_368, 521_428_992),
    "window": (2_362_368, 477_173_760),
    "shifted_window": (2_362_368, 477_173_760),
    "cross_window": (2_370_048, 493_280_256),
    "sra": (4_723_968, 419_559_168),
    "linear_sra": (2_954_496, 332_666_880 + NORM),
    "twins_local": (2_362_368, 477_173_760),
    "twins_global": (4_723_968, 419_559_168),
    "linformer": (2_462_720, 616_562_688),
    "performer": (2_362_368, 617_240_064),
    "xca": (2_362_380, 481_689_600),
    "focal": (2_443_034, 526_851_072),
    "quadtree": (5_331_458, 613_251_072),
    "dat": (2_378_796, 528_691_968),
    "van": (1_830_144, 357_955_584),
    "hornet": (2_232_192, 436_512_384),
    # Not published: three projections, then products with 16 codes of each of 12 heads.
    "ecoformer": (
        3 * (DIM * DIM + DIM),
        TOKENS * (3 * DIM**2 + 25 * DIM + 12 * 25 * 16 + 16 * DIM + 16 * (DIM + 12)),
    ),
}
# Counted by rule, but no product of matrices and no convolution. Negative: not counted by rule.
OTHER_WORK = {
    "sra": NORM,
    "linear_sra": NORM,
    "twins_global": NORM,
    "performer": TOKENS * DIM // 2,
    "quadtree": 5 * (TOKENS + 49) * DIM - 2 * TOKENS * 32 * DIM,
    "dat": (5 + 4) * TOKENS * DIM + 4 * HEADS * TOKENS**2,
}


def counted(layer, height, width):
    """Multiply-adds of matmuls and convolutions that run in a forward of one map."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(torch.empty(1, height, width, DIM, device="meta"))
    return counter.get_total_flops() // 2


def test_every_layer_has_published_numbers():
    assert set(PUBLISHED) == set(ATTENTION_LAYERS)


@pytest.mark.parametrize("name", ATTENTION_LAYERS)
def test_parameters_and_work_are_the_published_ones(name):
    with torch.device("meta"):
        layer = create_attention(name, DIM, HEADS, SIDE, SIDE)
    parameters, work = PUBLISHED[name]
    assert sum(p.numel() for p in layer.parameters()) == parameters
    assert layer.flops(SIDE, SIDE) == work
    assert counted(layer, SIDE, SIDE) == work - OTHER_WORK.get(name, 0)


@pytest.mark.parametrize(
    ("name", "options", "work"),
    [
        ("linformer", {"keys": 128}, 539_492_352),
        ("linformer", {"keys": 64}, None),
        ("hornet", {"order": 2}, None),
        ("cross_window", {"stripe": 2}, None),
        ("focal", {"window": 2}, None),
    ],
)
def test_options_change_the_count(name, options, work):
    with torch.device("meta"):
        layer = create_attention(name, DIM, HEADS, 14, 28 if work is None else 14, **options)
    height, width = layer.size
    assert counted(layer, height, width) == layer.flops(height, width)
    assert work is None or layer.flops(height, width) == work


@pytest.mark.parametrize("name", ["window", "shifted_window", "twins_local"])
def test_padded_maps_count_their_padding(name):
    with torch.device("meta"):
        layer = create_attention(name, DIM, HEADS, 9, 15)
    assert counted(layer, 9, 15) == layer.flops(9, 15)
