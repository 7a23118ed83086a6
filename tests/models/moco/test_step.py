"""One step of MoCo v3: the official numbers, and the same numbers in less memory."""

import copy

import moco_cases as cases
import pytest
import timm
import torch
from torch import nn

import mesa_train
import mesa_train.models
from mesa_train.models.moco import MoCo, adamw, backward_by_view, moco_loss
from mesa_train.models.moco.batch_norm import CrossRankBatchNorm, synchronise

GOLDEN = cases.arrays("step")
M = 0.9


def joint(model, x1, x2, m=M):
    loss = model(x1, x2, m)
    loss.backward()
    return loss.detach()


def buffers(model):
    return {n: b.clone() for n, b in model.named_buffers()}


def test_keys_and_trained_parameters():
    model = cases.tiny()
    found = [f"{k} {tuple(v.shape)}" for k, v in model.state_dict().items()]
    assert found == list(GOLDEN["all_keys"])
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == list(GOLDEN["trainable"])


def test_outputs():
    model = cases.tiny()
    x1, x2 = cases.views()
    seen = []
    model.projector(model.base_encoder).register_forward_hook(
        lambda module, args, out: seen.append(out.detach())
    )
    found = {"q1": model.query(x1), "q2": model.query(x2)}
    model.update_momentum(M)
    found |= {"k1": model.key(x1), "k2": model.key(x2), "z1": seen[0], "z2": seen[1]}
    for name, value in found.items():
        assert value.detach().numpy() == pytest.approx(GOLDEN[name], abs=1e-12)


@pytest.mark.parametrize("step", [joint, backward_by_view])
def test_the_whole_step(step):
    model = cases.tiny()
    optimizer = adamw(model, lr=1e-3, weight_decay=0.1)
    loss = step(model, *cases.views(), M)
    assert loss.item() == pytest.approx(float(GOLDEN["loss"]), abs=1e-12)
    found = cases.gradients(model)
    assert list(found) == list(GOLDEN["grad_keys"])
    assert [g.norm().item() for g in found.values()] == pytest.approx(
        GOLDEN["grad_l2"], rel=1e-9, abs=1e-9
    )
    assert [g.sum().item() for g in found.values()] == pytest.approx(
        GOLDEN["grad_sum"], rel=1e-9, abs=1e-9
    )
    state = model.state_dict()

    def check(prefix):
        for key, size, total in zip(
            GOLDEN[f"{prefix}_keys"], GOLDEN[f"{prefix}_l2"], GOLDEN[f"{prefix}_sum"], strict=True
        ):
            value = state[key].double()
            assert value.norm().item() == pytest.approx(size, rel=1e-9, abs=1e-9), key
            assert value.sum().item() == pytest.approx(total, rel=1e-7, abs=1e-9), key

    check("momentum")
    check("bn")
    optimizer.step()
    check("adamw")


def as_taught():
    model = cases.tiny()
    joint(model, *cases.views())
    return cases.gradients(model), buffers(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_view_at_a_time_is_bit_identical(dtype):
    x1, x2 = cases.views(dtype=dtype)
    one, two = cases.tiny(dtype), cases.tiny(dtype)
    assert torch.equal(joint(one, x1, x2), backward_by_view(two, x1, x2, M))
    for n, g in cases.gradients(one).items():
        assert torch.equal(g, two.get_parameter(n).grad), n
    for n, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[n]), n


def test_one_view_at_a_time_saves_half():
    x1, x2 = cases.views()
    model = cases.tiny()
    alive, most = [0], [0]

    class Held:
        def __init__(self, x):
            self.x, self.size = x, x.numel() * x.element_size()
            alive[0] += self.size
            most[0] = max(most[0], alive[0])

        def __del__(self):
            alive[0] -= self.size

    peaks = []
    for step in (joint, backward_by_view):
        alive[0] = most[0] = 0
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.x):
            step(model, x1, x2, M)
        peaks.append(most[0])
    assert peaks[1] / peaks[0] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_chunks_of_the_trunk_are_exact(chunk):
    wanted, statistics = as_taught()
    model = cases.tiny()
    loss = backward_by_view(model, *cases.views(), M, chunk=chunk)
    assert loss.item() == pytest.approx(float(GOLDEN["loss"]), abs=1e-12)
    assert cases.distance(cases.gradients(model), wanted) < 1e-13
    for name, value in buffers(model).items():
        assert value.numpy() == pytest.approx(statistics[name].numpy(), abs=1e-12), name


def test_chunks_repeat_their_dropout():
    x1, x2 = cases.views()
    one, two = (cases.tiny(pos_drop_rate=0.3) for _ in range(2))
    torch.manual_seed(5)
    backward_by_view(one, x1, x2, M, chunk=8)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    # Both forwards of one chunk draw the same, so one chunk of all is the step without chunks.
    backward_by_view(two, x1, x2, M)
    assert cases.distance(cases.gradients(one), cases.gradients(two)) < 1e-13
    assert torch.equal(after, torch.get_rng_state())


def test_gradient_accumulation_is_wrong():
    wanted, _ = as_taught()
    model = cases.tiny()
    for x1, x2 in zip(*(x.split(4) for x in cases.views()), strict=True):
        (model(x1, x2, M) / 2).backward()
    assert cases.distance(cases.gradients(model), wanted) > 0.5


def test_caching_at_the_queries_is_wrong():
    """Chunks through the heads: their batch norms see a chunk's statistics."""
    wanted, _ = as_taught()
    model, (x1, x2) = cases.tiny(), cases.views()
    model.update_momentum(M)
    k1, k2 = model.key(x1), model.key(x2)
    for x, k in ((x1, k2), (x2, k1)):
        with torch.no_grad():
            q = torch.cat([model.query(part) for part in x.split(4)])
        q.requires_grad_()
        moco_loss(q, k).backward()
        for part, grad in zip(x.split(4), q.grad.split(4), strict=True):
            model.query(part).backward(grad)
    assert cases.distance(cases.gradients(model), wanted) > 0.5


def mistaken(name):
    model = cases.tiny()
    x1, x2 = cases.views()
    if name == "momentum after the keys":
        q1, q2, k1, k2 = model.query(x1), model.query(x2), model.key(x1), model.key(x2)
    elif name == "both views in one batch":
        q1, q2 = model.query(torch.cat([x1, x2])).chunk(2)
        model.update_momentum(M)
        k1, k2 = model.key(torch.cat([x1, x2])).chunk(2)
    else:
        if name == "predictor without its last norm":
            model.predictor = model.predictor[:-1]
        q1, q2 = model.query(x1), model.query(x2)
        model.update_momentum(M)
        if name == "momentum encoder in eval mode":
            model.momentum_encoder.eval()
        k1, k2 = model.key(x1), model.key(x2)
        if name == "keys of the own view":
            k1, k2 = k2, k1
    loss = moco_loss(q1, k2) + moco_loss(q2, k1)
    loss.backward()
    return loss.item() - float(GOLDEN["loss"]), cases.gradients(model)


MISTAKES = {
    "momentum after the keys": (-0.023, 0.70),
    "keys of the own view": (-0.73, 1.5),
    "momentum encoder in eval mode": (-0.30, 0.87),
    "both views in one batch": (-0.14, 1.2),
    "predictor without its last norm": (-0.045, 0.61),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_usual_mistakes_change_loss_and_gradient(name):
    """By as much as is known of them: the golden step tells each from the right step."""
    wanted, _ = as_taught()
    difference, found = mistaken(name)
    assert difference == pytest.approx(MISTAKES[name][0], rel=0.1)
    assert cases.distance(found, wanted) == pytest.approx(MISTAKES[name][1], rel=0.1)


def test_the_momentum_keeps_its_tensors_and_statistics():
    model = cases.tiny()
    before = {n: p.data_ptr() for n, p in model.momentum_encoder.named_parameters()}
    statistics = buffers(model.momentum_encoder)
    model.update_momentum(0.5)
    assert before == {n: p.data_ptr() for n, p in model.momentum_encoder.named_parameters()}
    for name, value in buffers(model.momentum_encoder).items():
        assert torch.equal(value, statistics[name])
    assert not any(p.requires_grad for p in model.momentum_encoder.parameters())


def test_the_copy_starts_equal():
    model = MoCo(timm.create_model("moco_vit_tiny"), dim=8, hidden=16)
    for one, two in zip(
        model.base_encoder.parameters(), model.momentum_encoder.parameters(), strict=True
    ):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("name", "options", "classifier"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32}, "head"),
        ("swin_tiny_patch4_window7_224", {"img_size": 56, "window_size": 7, "depths": (1, 1, 1, 1)},
         "head.fc"),
        ("resnet10t", {}, "fc"),
    ],
)  # fmt: skip
def test_any_timm_encoder(name, options, classifier):
    model = MoCo(timm.create_model(name, **options), dim=8, hidden=16)
    assert model.classifier == classifier
    size = options.get("img_size", 32)
    x1, x2 = torch.randn(2, 4, 3, size, size)
    loss = backward_by_view(model, x1, x2, 0.99)
    assert loss.item() > 0
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_chunks_of_a_trunk_with_batch_norms_are_refused():
    stem = timm.create_model("moco_vit_conv_small", img_size=32, depth=1)
    model = MoCo(stem, dim=8, hidden=16)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="the trunk has batch norms"):
        backward_by_view(model, *torch.randn(2, 4, 3, 32, 32), 0.99, chunk=2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    backward_by_view(model, *torch.randn(2, 4, 3, 32, 32), 0.99)


def test_under_mesa8_the_loss_is_the_same_and_the_gradient_close():
    # Heads of 16 units and batches of 8 amplify errors; a wider trunk is as in training.
    x1, x2 = cases.views(dtype=torch.float32)
    plain, ours = cases.tiny(torch.float32), mesa_train.wrap(cases.tiny(torch.float32), "mesa8")
    assert torch.equal(backward_by_view(plain, x1, x2, M), backward_by_view(ours, x1, x2, M))
    error = cases.distance(cases.gradients(ours), cases.gradients(plain))
    assert 0 < error < 0.05
    third = mesa_train.wrap(cases.tiny(torch.float32), "mesa8")
    backward_by_view(third, x1, x2, M, chunk=4)
    assert cases.distance(cases.gradients(third), cases.gradients(plain)) < 0.05


def test_scaling_scales_the_gradients_and_not_the_loss():
    wanted, _ = as_taught()
    for chunk in (None, 4):
        model = cases.tiny()
        loss = backward_by_view(
            model, *cases.views(), M, chunk=chunk, scale=lambda value: value * 8
        )
        assert loss.item() == pytest.approx(float(GOLDEN["loss"]), abs=1e-12)
        eighth = {n: g / 8 for n, g in cases.gradients(model).items()}
        assert cases.distance(eighth, wanted) < 1e-13


def test_bad_input_is_named():
    model, (x1, x2) = cases.tiny(), cases.views()
    for call, message in (
        (lambda: model.update_momentum(1.5), r"momentum must lie in \[0, 1\], got 1.5"),
        (lambda: backward_by_view(model, x1, x2, M, chunk=0), "chunk must be at least 1"),
        (lambda: moco_loss(torch.ones(2, 3), torch.ones(3, 3)), r"\(2, 3\) and \(3, 3\)"),
        (lambda: moco_loss(torch.ones(2, 3), torch.ones(2, 3), 0.0), "temperature must be"),
        (lambda: MoCo(nn.Linear(3, 3)), "it has no forward_features"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_batch_norm_over_ranks_is_that_of_one_process_without_a_group():
    norm = nn.BatchNorm1d(5)
    synced = synchronise(nn.Sequential(copy.deepcopy(norm)), torch.device("cpu"))
    assert type(synced[0]) is CrossRankBatchNorm
    x = torch.randn(6, 5)
    assert torch.equal(synced(x), norm(x))
    assert torch.equal(synced.eval()(x), norm.eval()(x))
    assert list(synced[0].state_dict()) == list(norm.state_dict())
