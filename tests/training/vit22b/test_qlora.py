"""A frozen model in 4 bits: bitsandbytes' own codes, read layer by layer, and adapters that learn."""

import pytest
import timm
import torch
from torch import nn

import mesa_train
import mesa_train.models
from mesa_train.models.vit22b.model import sigmoid_loss
from mesa_train.training.vit22b import qlora as nf4_lora
from mesa_train.training.vit22b.checkpoint import CheckpointError, export

# Every path here runs on a CPU in bitsandbytes 0.50; without the package there is nothing to test.
bitsandbytes = pytest.importorskip("bitsandbytes")


def on_meta(**options):
    with torch.device("meta"):
        return timm.create_model("vit_22b_tiny", num_classes=10, img_size=56, **options).train()


def trial(rank=4):
    torch.manual_seed(0)
    read = nf4_lora.random_weights(0, "cpu")
    return nf4_lora.quantised(on_meta(), read, "cpu", rank=rank)


def logits(model, images):
    with torch.autocast("cpu", torch.bfloat16):
        return model(images.bfloat16()).float()


def test_only_adapters_and_the_classifier_train():
    model = trial()
    names = [name for name, _ in nf4_lora.adapters(model)]
    assert {n.rpartition(".")[2] for n in names} == {"a", "b", "weight", "bias"}
    assert [n for n in names if not n.endswith((".a", ".b"))] == ["head.weight", "head.bias"]
    # Two of each block; q, kv, proj, fc1 and fc2 of the pooling head.
    assert len([n for n in names if n.endswith(".a")]) == 3 * 2 + 5
    assert not any(p.is_meta for p in model.parameters())


def test_without_a_step_it_is_the_model_at_its_decoded_weights():
    model = trial()
    read = nf4_lora.random_weights(0, "cpu")
    plain = on_meta().to_empty(device="cpu")
    coded = dict(model.named_modules())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            value = read(name, parameter.shape)
            holder = coded[name.rpartition(".")[0]]
            if name.endswith(".weight") and getattr(holder, "adapted", None) is not None:
                value = holder.adapted.merged()
            parameter.copy_(value)
    nn.init.normal_(plain.head.weight, std=0.1)
    with torch.no_grad():
        model.head.weight.copy_(plain.head.weight)
    images = torch.randn(2, 3, 56, 56)
    expected = logits(plain.bfloat16(), images)
    # Both compute in bfloat16, in another order.
    torch.testing.assert_close(logits(model, images), expected, rtol=0.05, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [None, "mesa8", "mesa4", "mesa8-recompute"])
def test_adapters_learn(policy):
    model = trial()
    if policy:
        mesa_train.wrap(model, policy)
    trained = [p for _, p in nf4_lora.adapters(model)]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    images, labels, losses = torch.randn(16, 3, 56, 56), torch.arange(16) % 10, []
    for _ in range(15):
        loss = sigmoid_loss(logits(model, images), labels)
        loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]


def test_the_frozen_matrices_are_half_a_byte_an_element():
    model = trial()
    coded = [m for m in model.modules() if isinstance(m, nf4_lora.Nf4Weight)]
    elements = sum(m.a.shape[1] * m.b.shape[0] for m in coded)
    # 4 bits, a byte for every 64, and a float for every 256 of those: 0.516 and a little.
    assert elements * 0.515 < sum(m.frozen_bytes for m in coded) < elements * 0.53


def test_inputs_of_frozen_matrices_are_not_kept():
    model, images = trial(), torch.randn(8, 3, 56, 56).bfloat16()
    policy = mesa_train.Policy(min_bytes=0)
    found = mesa_train.footprint(model, images, policy=policy, autocast=torch.bfloat16)
    block = sum(r.saved_bytes for r in found.rows if f"{r.module}.".startswith("blocks.1."))
    tokens, width, heads, rank = 8 * 16, 64, 4, 4
    codes = 9 * width + 4 * (2 + 2 * heads + 4 * heads)  # vit22b.py's count, groups of this size
    low_rank = 2 * (rank + 4)
    assert block <= tokens * (codes + 8 * heads + 4 + low_rank) + 4096


def test_weights_are_read_from_files_and_checked(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("vit_22b_tiny", num_classes=10, img_size=56)
    export(tmp_path / "weights", source)
    read = nf4_lora.reader(tmp_path / "weights")
    model = nf4_lora.quantised(on_meta(), read, "cpu", rank=2)
    weight = source.blocks[1].in_proj.weight
    merged = model.blocks[1].in_proj.adapted.merged()
    # NF4's own error on uniform weights.
    assert (merged - weight).norm() < 0.15 * weight.norm()
    assert torch.equal(model.head.bias, source.head.bias)
    with pytest.raises(CheckpointError, match=r"patch_embed.proj.weight is \(64, 3, 14, 14\), not"):
        nf4_lora.quantised(on_meta(in_chans=1), read, "cpu")
    with pytest.raises(CheckpointError, match=r"has no blocks\.3\.in_norm\.weight"):
        nf4_lora.quantised(on_meta(depth=4), read, "cpu")
    with pytest.raises(ValueError, match=r"under torch\.device\('meta'\)"):
        nf4_lora.quantised(source, read, "cpu")
