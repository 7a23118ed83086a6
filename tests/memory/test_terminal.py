"""Tables of made-up numbers: widths, folding, and what is left out."""

import io

import pytest
from rich.console import Console

from mesa_train.memory.compare import Row
from mesa_train.memory.footprint import Footprint
from mesa_train.memory.recorder import Kept
from mesa_train.memory.terminal import by_module, by_operator, comparison, notes_of, tree
from mesa_train.memory.text import format_bytes, format_ratio, format_table


def rendered(table, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def made(*rows):
    kept = tuple(Kept(operator, module, "float32", (1,), size) for operator, module, size in rows)
    return Footprint(sum(row.saved_bytes for row in kept), 2**20, 0, kept)


def vit(scale):
    blocks = [
        (operator, f"blocks.{i}.{module}", scale * 2**20)
        for i in range(12)
        for operator, module in (("layer_norm", "norm"), ("linear", "attn.qkv"))
    ]
    return made(("conv2d", "patch_embed.proj", scale * 2**20), *blocks, ("linear", "head", 7))


@pytest.mark.parametrize("width", [80, 120])
def test_comparison_fits(width):
    rows = [
        Row("mesa8-recompute", 987_654_321_000, 123.45, 0.12345, 123456.7, 1.234),
        Row("checkpoint", None, notes=("no blocks",)),
    ]
    text = rendered(comparison(rows), width)
    assert "…" not in text
    assert "919.8 GiB" in text
    assert "12.35%" in text
    assert "123,457 ms" in text
    assert max(map(len, text.splitlines())) <= width


def test_columns_that_nobody_asked_for():
    text = rendered(comparison([Row("plain", 2**20, 1.0)]), 80)
    assert "gradient" not in text
    assert "time" not in text


def test_notes_name_their_methods():
    rows = [Row("a", 1, notes=("both", "one")), Row("b", 1, notes=("both",))]
    assert notes_of(rows) == ["both", "a: one"]


def test_tree_folds_equal_blocks():
    root = tree(vit(4), vit(1))
    patch, blocks, head = root.children
    assert (patch.label, patch.plain, patch.other) == ("patch_embed.proj", 4 * 2**20, 2**20)
    assert (blocks.label, blocks.plain) == ("blocks", 12 * 8 * 2**20)
    (folded,) = blocks.children
    assert (folded.label, folded.count, folded.plain) == ("0-11", 12, 8 * 2**20)
    assert [child.label for child in folded.children] == ["norm", "attn.qkv"]
    assert head.plain == 7


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
        by_module(plain, plain, "mesa4-recompute"),
        by_operator(plain, plain, "mesa4-recompute"),
    ):
        text = rendered(table, width)
        assert max(map(len, text.splitlines())) <= width
        assert "4096.0 MiB" in text
        assert "80.0%" in text


def test_modules_of_no_weight_and_depth():
    text = rendered(by_module(vit(4), vit(1), "mesa8"), 80)
    assert "head" not in text
    assert "0-11  x12" in text
    assert "4.00x" in text
    assert "0-11" not in rendered(by_module(vit(4), vit(1), "mesa8", depth=1), 80)


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


def test_format_table_aligns():
    text = format_table(["name", "n"], [["a", "1"], ["long", "100"]], rule_before=1)
    assert text.splitlines() == [
        "name    n",
        "---------",
        "a       1",
        "---------",
        "long  100",
    ]
