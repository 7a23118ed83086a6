"""Tables of made-up numbers: widths, folding, and what is left out."""

import io

import pytest
from rich.console import Console

from mesa_train.estimate.estimator import POLICIES, SETUPS, Estimate
from mesa_train.estimate.model_states import Cluster, Parameters, states
from mesa_train.measure.footprint import Footprint
from mesa_train.measure.module_tree import forward_order, grow
from mesa_train.measure.saved_tensors import SavedStorage
from mesa_train.report.columns import with_ratios
from mesa_train.report.terminal import by_module, by_operator, comparison, estimates, notes_of
from mesa_train.utils.formatting import (
    describe,
    format_bytes,
    format_gib,
    format_ratio,
    format_shapes,
    format_table,
    parse_bytes,
)


def rendered(table, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def made(*rows):
    saved = tuple(
        SavedStorage(operator, module, "float32", (1,), size) for operator, module, size in rows
    )
    return Footprint(sum(row.saved_bytes for row in saved), 2**20, 0, saved)


def tree(*footprints):
    return grow([forward_order(footprint) for footprint in footprints])


def vit(scale):
    blocks = [
        (operator, f"blocks.{i}.{module}", scale * 2**20)
        for i in range(12)
        for operator, module in (("layer_norm", "norm"), ("linear", "attn.qkv"))
    ]
    return made(("conv2d", "patch_embed.proj", scale * 2**20), *blocks, ("linear", "head", 7))


WIDE = {
    "method": "mesa8-recompute",
    "saved_bytes": 987_654_321_000,
    "peak_bytes": 1_987_654_321_000,
    "resident_bytes": 2_987_654_321_000,
    "gradient_error": 0.12345,
    "gradient_cosine": 0.98765432,
    "step_ms": 123456.7,
    "step_ms_quartiles": [122222.2, 124444.4],
    "images_per_s": 12345.6,
    "largest_batch": 123456,
}


@pytest.mark.parametrize("width", [80, 120, 200])
def test_comparison_fits(width):
    rows = [WIDE, {"method": "checkpoint", "note": "no blocks"}]
    text = rendered(comparison(rows, width), width)
    assert "…" not in text
    for message in ("919.8 GiB", "12.35%", "123,457", "123,456"):
        assert message in text
    assert max(map(len, text.splitlines())) <= width
    assert ("0.98765" in text) == ("124,444" in text) == (width >= 180)


def test_columns_that_no_row_has():
    text = rendered(comparison([{"method": "plain", "saved_bytes": 2**20}]), 80)
    for message in ("gradient", "step", "largest"):
        assert message not in text


def test_ratios_to_plain():
    rows = with_ratios(
        [{"method": "plain", "saved_bytes": 6, "step_ms": 2.0}, {**WIDE, "saved_bytes": 3}]
    )
    assert [row["saved_ratio"] for row in rows] == [1, 2]
    assert rows[1]["step_ratio"] == WIDE["step_ms"] / 2


def test_notes_name_their_methods():
    assert notes_of([{"method": "a"}, {"method": "b", "note": "why"}]) == ["b: why"]


def test_tree_folds_equal_blocks():
    root = tree(vit(4), vit(1))
    patch, blocks, head = root.children
    assert (patch.label, patch.sizes) == ("patch_embed.proj", [4 * 2**20, 2**20])
    assert (blocks.label, blocks.sizes[0]) == ("blocks", 12 * 8 * 2**20)
    (folded,) = blocks.children
    assert (folded.label, folded.count, folded.sizes[0]) == ("0-11", 12, 8 * 2**20)
    assert [child.label for child in folded.children] == ["norm", "attn.qkv"]
    assert head.sizes == [7, 7]


def test_tree_keeps_different_blocks_apart():
    model = made(("linear", "blocks.0", 8), ("linear", "blocks.1", 8), ("linear", "blocks.2", 4))
    assert [(n.label, n.count) for n in tree(model, model).children[0].children] == [
        ("0-1", 2),
        ("2", 1),
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_profile_fits(width):
    deep = "encoder." * 12 + "layer"
    plain = made(("scaled_dot_product_attention", deep, 4 * 2**30), ("linear", "a", 2**30))
    for table in (
        by_module(plain, plain, ("plain", "mesa4-recompute")),
        by_operator(plain, plain, ("plain", "mesa4-recompute")),
    ):
        text = rendered(table, width)
        assert max(map(len, text.splitlines())) <= width
        assert "4096.0 MiB" in text
        assert "80.0%" in text


def test_modules_of_no_weight_and_depth():
    text = rendered(by_module(vit(4), vit(1), ("plain", "mesa8")), 80)
    assert "head" not in text
    assert "0-11  x12" in text
    assert "4.00x" in text
    assert "0-11" not in rendered(by_module(vit(4), vit(1), ("plain", "mesa8"), depth=1), 80)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0"),
        (16, "16 B"),
        (4096, "4.0 KiB"),
        (2**20, "1.0 MiB"),
        (9 * 2**30, "9216.0 MiB"),
        (2**40, "1,024.0 GiB"),
    ],
)
def test_format_bytes(size, text):
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [(0, 1, "-"), (1, 0, "-"), (3, 1, "3.00x"), (30, 1, "30.0x"), (18913, 1, "18,913x")],
)
def test_format_ratio(before, after, text):
    assert format_ratio(before, after) == text


def test_estimates_of_all_setups_fit_80_columns():
    """With the names of all setups and policies whole."""
    counts = Parameters(3 * 10**8, 0, 4 * 10**6, 12 * 10**6, 0, 24 * 10**8)
    cluster = Cluster(8, 24 << 30, 256 << 30)
    rows = [
        Estimate(
            setup, offload, policy, "adamw", 0, False, states(setup, offload, counts, cluster),
            (60 - number) << 27, 32, 30 * 10**min(number, 5), 5, number > 0,
        )
        for setup, offload in SETUPS
        for number, policy in enumerate(POLICIES)
    ]  # fmt: skip
    text = "\n".join(rendered(table, 80) for table in estimates(rows))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    last = next(line.split() for line in reversed(text.splitlines()) if "CPU states" in line)
    assert last[:9] == ["zero3", "CPU", "states", "(30)", "300", "3,000", "30k", "300k", "3M"]
    assert "10 others" not in text
    assert "all" in text


def test_format_shapes():
    assert format_shapes([[8, 3, 64, 64], []]) == "8x3x64x64, scalar"
    assert format_shapes([[3, i] for i in range(9)]) == "3x0, 3x1, 3x2 and 6 more tensors"


@pytest.mark.parametrize(("size", "text"), [(0, "-"), (1 << 20, "<0.01"), (3 << 29, "1.50")])
def test_format_gib(size, text):
    assert format_gib(size) == text


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({}, "m, 2x3, bf16 autocast, EPYC, 2 threads"),
        ({"dtype": "float32"}, "m, 2x3, float32, EPYC, 2 threads"),
        ({"dtype": "float32", "weights": "float16"}, "m, 2x3, float16, EPYC, 2 threads"),
        ({"threads": 1}, "m, 2x3, bf16 autocast, EPYC, 1 thread"),
        ({"weights": "bfloat16"}, "m, 2x3, bf16 autocast, bfloat16 weights, EPYC, 2 threads"),
        ({"device": "cuda", "device_name": "H100"}, "m, 2x3, bf16 autocast, H100"),
    ],
)
def test_describe(changed, text):
    setting = {"model": "m", "shapes": [[2, 3]], "dtype": "bf16", "device": "cpu"}
    assert describe({**setting, "device_name": "EPYC", "threads": 2, **changed}) == text


def test_format_table_aligns():
    text = format_table(["name", "n"], [["a", "1"], ["long", "100"]], rule_before=1)
    assert text.splitlines() == [
        "name    n",
        "---------",
        "a       1",
        "---------",
        "long  100",
    ]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 << 30),
        ("1.5 TiB", 3 << 39),
        ("800MB", 800_000_000),
        ("8g", 8 << 30),
        ("4096", 4096),
        ("7B", 7),
    ],
)
def test_parse_bytes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-3GiB", "0", "3 apples", "1e9"])
def test_parse_bytes_refuses(text):
    with pytest.raises(
        ValueError, match=r"^a size must be a number with a unit .*KiB, MiB, GiB, TiB"
    ):
        parse_bytes(text)


def test_parse_bytes_of_an_option():
    assert parse_bytes("8000000", "--memory") == 8_000_000
    with pytest.raises(ValueError, match=r"--memory: a size needs a unit, such as 24GiB, got '24'"):
        parse_bytes("24", "--memory")
    with pytest.raises(ValueError, match=r"^--memory: a size must be a number"):
        parse_bytes("24 gigs", "--memory")
