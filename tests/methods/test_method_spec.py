"""Names of `compare --methods` that need a GPU: the row has the reason, and the remarks are their own."""

import pytest

from mesa_train.methods import variants
from mesa_train.methods.spec import DEFAULT, MethodSpec


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("checkpoint+offload", "in CPU memory already"),
        ("float8", "compute capability 8.9"),
        ("checkpoint+offload+adamw8bit", "in CPU memory already"),
    ],
)
def test_methods_for_gpus_say_so_on_a_cpu(name, reason, monkeypatch):
    spec = MethodSpec.of(name)
    assert reason in spec.why_not("cpu")
    assert not spec.countable
    assert not any("stashes" in remark for remark in spec.caveats)
    assert spec.eight_bit == ("adamw8bit" in name)
    monkeypatch.setattr("mesa_train.methods.spec.float8_products", lambda: True)
    assert spec.why_not("cuda") is None


def test_they_are_among_the_defaults_and_plain_needs_nothing():
    assert {"checkpoint+offload", "float8", "plain+adamw8bit"} <= set(DEFAULT)
    assert MethodSpec.of("plain").why_not("cpu") is None
    assert not variants.float8_products() or variants.torch.cuda.is_available()
