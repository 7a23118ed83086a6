"""`auto` is what the device computes in by itself; an emulated precision is told."""

import platform

import pytest
import torch

from mesa_train.utils import precision
from mesa_train.utils.precision import Arithmetic, choose

ZEN_3 = {"avx2": True, "fma3": True, "cpu_name": "AMD EPYC", "architecture": "x86_64"}
SKYLAKE = ZEN_3 | {"avx512_f": True, "avx512_bw": True, "avx512_vl": True, "avx512_dq": True}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (ZEN_3, "no"),
        # AVX-512 alone converts bfloat16 and multiplies float32.
        (SKYLAKE, "no"),
        (SKYLAKE | {"avx512_vnni": True, "amx_int8": True}, "no"),
        (SKYLAKE | {"avx512_fp16": True}, "no"),
        (SKYLAKE | {"amx_tile": True, "amx_int8": True}, "no"),
        (SKYLAKE | {"avx512_bf16": True}, "bf16"),
        (SKYLAKE | {"amx_tile": True, "amx_bf16": True}, "bf16"),
        ({"neon": True, "architecture": "aarch64"}, "no"),
        ({"neon": True, "bf16": True, "architecture": "aarch64"}, "bf16"),
        ({}, "no"),
    ],
)
def test_processors(flags, expected):
    choice = choose("auto", precision.of_processor(flags))
    assert (choice.name, choice.emulated, choice.scaler) == (expected, False, False)
    assert "\n" not in choice.line


OLD, NEW = (
    Arithmetic("cuda", name, bf16, fp16=True) for name, bf16 in (("a T4", False), ("an A100", True))
)


def test_graphics_cards():
    assert choose("auto", NEW).dtype is torch.bfloat16
    old = choose("auto", OLD)
    assert (old.name, old.dtype, old.scaler) == ("fp16", torch.float16, True)
    assert old.line == (
        "precision auto: float16 with loss scaling, because a T4 does not compute in bfloat16"
    )
    # A training without a scaler.
    assert choose("auto", OLD, fp16=False).dtype is None


def test_an_emulated_precision_is_told_with_the_better_one():
    cpu = precision.of_processor(ZEN_3)
    for requested, device, better in (
        ("bf16", cpu, "float32"), ("fp16", cpu, "float32"), ("bf16", OLD, "float16"),
    ):  # fmt: skip
        choice = choose(requested, device)
        assert (choice.name, choice.emulated) == (requested, True)
        assert choice.line.endswith(f"many times slower than {better}; auto takes {better}")
    for requested, device in (("no", cpu), ("bf16", NEW), ("fp16", OLD)):
        assert not choose(requested, device).emulated
        assert "emulates" not in choose(requested, device).line
    with pytest.raises(ValueError, match="one of auto, no, bf16, fp16, got 'fp8'"):
        choose("fp8", cpu)


def test_cuda_is_asked_for_bfloat16_without_emulation(monkeypatch):
    requested = []

    def supported(including_emulation=True):
        requested.append(including_emulation)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert precision.probe("cuda:0") == Arithmetic("cuda", "Tesla V100", False, True)
    assert requested == [False]


def test_a_card_that_is_not_here_is_taken_for_a_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose("auto", "cuda").name == "bf16"


@pytest.mark.parametrize(
    ("version", "name"), [((13, 6), "fp16"), ((14, 0), "bf16"), ((15, 1), "bf16")]
)
def test_apples_gpu_has_bfloat16_from_macos_14_on(version, name, monkeypatch):
    monkeypatch.setattr(
        torch.backends.mps, "is_macos_or_newer", lambda major, minor: version >= (major, minor)
    )
    assert choose("auto", "mps").name == name


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc/cpuinfo")
def test_this_processor_as_the_system_describes_it():
    with open("/proc/cpuinfo") as file:  # noqa: PTH123
        flags = set(file.read().split())
    native = bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    assert choose("auto", "cpu").name == ("bf16" if native else "no")


def test_the_recipes_take_it_by_default():
    from mesa_train.training.classification import config
    from mesa_train.training.classification import dry_run as plan
    from mesa_train.training.vit22b import config as sharded_config

    expected = choose("auto", "cuda" if torch.cuda.is_available() else "cpu")
    assert plan.precision(config.Config()) == expected
    assert plan.autocast_dtype(config.Config()) is expected.dtype
    sharded = sharded_config.precision_of(sharded_config.Config())
    assert sharded.name == ("bf16" if expected.name == "bf16" else "no")
