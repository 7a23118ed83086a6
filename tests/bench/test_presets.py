"""The search for allocations: predictions, budgets, the best for several models, rows and table."""

import itertools

import allocations
import presets
import pytest
import timm
import torch
from allocations import CODES, Code, Measured, best, codes_of
from tables import codes as tables

from mesa_train import PRESETS, Policy


def measured(**scales):
    """Operands with errors scale * 2^-bits, and a byte for each bit."""
    keys = list(itertools.product(scales, CODES))
    return Measured(
        {(name, code): code.bits - 8 for name, code in keys},
        {(name, code): scales[name] * 2.0**-code.bits for name, code in keys},
    )


def test_codes_of_a_preset():
    codes = codes_of(PRESETS["mesa4-recompute"], allocations.OPERANDS)
    assert codes["x_hat"] == Code(5, 96)
    assert codes["last norm"] == Code(8, 96)
    assert codes["q, k"] == Code(5)
    assert codes["batch norm"] == Code(6)
    assert codes["out"] == Code(4, 192)


@pytest.mark.parametrize("preset", presets.BUDGETS)
def test_each_code_of_a_preset_is_measured(preset):
    for operand, code in codes_of(PRESETS[preset], allocations.OPERANDS).items():
        assert code in allocations.codes_for(operand), operand


def test_the_best_allocation_is_the_smallest_of_all_within_the_budget():
    found = measured(x_hat=3.0, out=1.0, conv=0.2)
    (codes,) = best([found], [24], [14], 1)

    def error(bits):
        return sum((scale * 2.0**-b) ** 2 for scale, b in zip((3.0, 1.0, 0.2), bits, strict=True))

    tried = [b for b in itertools.product((8, 6, 5, 4, 3, 2), repeat=3) if sum(b) <= 14]
    assert tuple(code.bits for code in codes.values()) == min(tried, key=error)
    assert best([found], [24], [5], 1) == []


def test_all_models_share_one_allocation_with_the_smallest_largest_error():
    first, second = measured(x_hat=1.0, out=0.1), measured(x_hat=0.1, out=1.0)
    (alone,) = best([first], [16], [10], 1)
    assert [code.bits for code in alone.values()] == [6, 4]
    (joint,) = best([first, second], [16, 16], [10, 10], 1)
    assert [code.bits for code in joint.values()] == [5, 5]


@pytest.fixture(scope="module")
def rows():
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "num_heads": 2, "depth": 1}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=5, **options)
    x, y = torch.randn(16, 3, 32, 32), torch.randint(0, 5, (16,))
    return [row for _, row in presets.rows([presets.Subject(network, x, y, "a ViT")], 1)]


def test_predictions_of_a_small_model(rows):
    whole = [row for row in rows if row["kind"] == "allocation"]
    assert {row["budget"] for row in whole} == set(presets.BUDGETS)
    for row in whole:
        assert row["saved_bytes"] <= row["budget_bytes"]
        assert row["predicted_error"] == pytest.approx(row["gradient_error"], rel=0.25)
        assert sum(row["variance_shares"].values()) == pytest.approx(1)
        assert "batch norm" not in row["codes"]
        assert "last norm" in row["codes"]
    by_budget = {row["budget"]: row for row in whole if row["best_for"] == "the preset"}
    assert by_budget["mesa4-recompute"]["codes"]["x_hat"] == "5 in groups of 96"
    assert "activation" not in by_budget["mesa4-recompute"]["codes"]
    assert by_budget["mesa4"]["codes"]["activation"] == "5 in groups of 192"


def test_operands_of_a_small_model(rows):
    alone = {
        (row["recompute"], row["operand"], row["bits"], row["group_size"]): row
        for row in rows
        if row["kind"] == "operand"
    }
    four, eight = (alone["cheap", "activation", bits, 128] for bits in (4, 8))
    assert eight["bytes_less"] == 0 < four["bytes_less"]
    assert eight["gradient_error"] < four["gradient_error"] / 8
    # Three more operands are computed from x_hat.
    stored, recomputed = (alone[mode, "x_hat", 4, 128] for mode in ("cheap", "linear"))
    assert recomputed["gradient_error"] > stored["gradient_error"]
    assert ("linear", "x_hat", 5, 96) in alone


def test_nothing_to_store_is_no_operand():
    assert allocations.stored_bytes(lambda policy: 7, "cheap") == {}
    by_bits = allocations.stored_bytes(
        lambda policy: 100 * policy.overrides.get("conv", {}).get("bits", 8), "cheap"
    )
    assert by_bits == {("conv", code): 100 * (code.bits - 8) for code in CODES}
    assert isinstance(allocations.policy_of({"conv": Code(4)}, "linear"), Policy)


def test_a_wrong_model_is_named(tmp_path):
    with pytest.raises(SystemExit, match="--models must be of random, trained, got 'deit'"):
        presets.main("deit", "", 1, 1, 1, tmp_path / "rows.jsonl")


ROW = {
    "model": "a ViT", "images": 8, "kind": "allocation", "budget": "mesa4", "best_for": "the preset",
    "codes": {"x_hat": "5 in groups of 80", "out": "4"}, "saved_bytes": 2**20,
    "predicted_error": 0.05, "gradient_error": 0.06,
    "variance_shares": {"x_hat": 0.9, "out": 0.1, "conv": 0.001}, "device": "a CPU",
    "device_type": "cpu", "threads": 1, "versions": {"torch": "2.15.0"}, "commit": "abc",
    "date": "2030-01-02T03:04:05+00:00",
}  # fmt: skip


def test_the_table_has_predictions_shares_batches_and_origins():
    other = {**ROW, "model": "a CNN", "images": 64, "commit": "def"}
    text = tables.presets.render([{**ROW, "commit": "old"}, ROW, other])
    line = "| mesa4 | the preset | x_hat 5 in groups of 80, out 4 | 1.0 MiB | 5.00% | 6.00% |"
    assert f"| a ViT {line} x_hat 90%, out 10% |" in text
    assert "a ViT: 8 images; a CNN: 64 images." in text
    assert "commit abc" in text
    assert "commit def" in text
    assert "old" not in text


def test_a_row_without_prediction_gets_one_from_its_operands():
    bare = {k: v for k, v in ROW.items() if k not in ("best_for", "codes", "variance_shares")}
    bare |= {"bits": None, "predicted_error": None}
    alone = {**ROW, "kind": "operand", "bits": 5, "operand": "x_hat", "gradient_error": 0.03}
    others = [
        alone,
        {**alone, "operand": "out", "bits": 4, "gradient_error": 0.04},
        {**alone, "operand": "out", "bits": 3, "gradient_error": 0.5},
        {**alone, "commit": "old", "gradient_error": 0.9},
    ]
    text = tables.presets.render([bare], others)
    line = "| a ViT | mesa4 | the preset | x_hat 5, out 4 | 1.0 MiB | 5.00% | 6.00% |"
    assert f"{line} x_hat 36%, out 64% |" in text
