"""The note of an out-of-memory error: what was saved where, and the preset that would have fitted."""

import re
import sys

import pytest
import timm
import torch
from torch import nn

import mesa_train
from mesa_train.measure.footprint import footprint
from mesa_train.measure.out_of_memory import is_out_of_memory, out_of_memory_notes
from mesa_train.measure.timeline import timeline
from mesa_train.utils.formatting import format_bytes

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="notes of errors: Python 3.11")


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=48, depth=4, num_heads=3
    )
    return model.train()


def fails(model, capacity, error):
    """The note of an error in a step of `model`."""
    images = torch.randn(32, 3, 64, 64)

    def stop(_):
        raise error

    def step():
        with out_of_memory_notes(model) as notes:
            notes._capacity = lambda: capacity
            output = model(images)
            output.register_hook(stop)
            output.sum().backward()

    with pytest.raises(type(error)) as raised:
        step()
    return "\n".join(getattr(raised.value, "__notes__", []))


def test_the_first_preset_that_fits_is_named(vit, monkeypatch):
    from mesa_train.measure import out_of_memory

    monkeypatch.setattr(out_of_memory, "_allocated", lambda _: 5 * 2**20)
    images = torch.randn(32, 3, 64, 64)
    mesa_train.wrap(vit, "mesa8")
    needs = {
        p: 5 * 2**20 + timeline(vit, images, policy=p).peak_bytes for p in out_of_memory.CANDIDATES
    }
    assert needs["mesa6-recompute"] < needs["mesa8-recompute"] < needs["mesa8"]
    note = fails(vit, needs["mesa8-recompute"] - 1, torch.OutOfMemoryError("CUDA out of memory."))
    saved = format_bytes(footprint(vit, images).saved_bytes)
    assert f"with mesa8, VisionTransformer saves {saved} for the backward of 32x3x64x64" in note
    assert re.search(r"by operator: \w+ [\d.]+ .iB, \w+", note)
    assert "blocks.*" in note
    assert f"a step needs about {format_bytes(needs['mesa8'])}" in note
    assert "mesa6-recompute would have fitted" in note
    assert "no preset fits" in fails(vit, 1000, torch.OutOfMemoryError("CUDA out of memory."))
    mesa_train.unwrap(vit)
    assert "mesa8 would have fitted" in fails(vit, needs["mesa8"], torch.OutOfMemoryError("CUDA"))


def test_other_errors_have_no_note_and_no_hook_stays(vit):
    assert fails(vit, 1, ValueError("another")) == ""
    assert not vit._forward_pre_hooks
    with (
        pytest.raises(TypeError, match=r"takes nn\.Modules, got str"),
        out_of_memory_notes("model"),
    ):
        pass


def test_the_errors_of_the_cpu_count():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60)
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert not is_out_of_memory(RuntimeError("another"))


def test_a_model_that_cannot_be_counted_says_so():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 10)

        def forward(self, x):
            x = self.layer(x.mean((2, 3)).repeat(1, 22)[:, :64])
            return x if x.sum().item() > -1e9 else x + 1

    assert "was not counted" in fails(Reads(), 1, torch.OutOfMemoryError("CUDA"))
