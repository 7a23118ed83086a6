"""What cannot be captured is one line with the reason and the remedy, before anything changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mesa_train
from mesa_train import CaptureError, Policy


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 4))


def refused(match, model, *arguments, **options):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CaptureError, match=match) as caught:
        mesa_train.capture_step(model, *arguments, **options)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu():
    refused("capture_step: PyTorch sees no CUDA device; CUDA graphs need an NVIDIA GPU", network())


def test_a_model_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    refused(r"the model is on cpu; move it with model.to\('cuda'\)", network())


def test_devices_that_differ(record):
    model = network()
    model[1].running_var = model[1].running_var.to("meta")
    with pytest.raises(CaptureError, match=r"0\.weight on cpu, 1\.running_var on meta"):
        mesa_train.capture_step(model, F.cross_entropy)
    with pytest.raises(CaptureError, match="the model has no parameters"):
        mesa_train.capture_step(nn.GELU())


@pytest.mark.parametrize(
    ("policy", "match"),
    [
        ("paper", "ranges='running'.*choose another preset"),
        (Policy(overrides={"0": {"ranges": "running"}}), "ranges='running'"),
        ("mesa8+offload", "offload=True, whose copies.*choose a preset without"),
        (Policy(overrides={"3": {"offload": True}}), "offload=True for 3"),
    ],
    ids=str,
)
def test_policies(record, policy, match):
    model = mesa_train.wrap(network(), policy)
    record(model)
    refused(match, model, F.cross_entropy)
    refused(match, nn.Sequential(model), F.cross_entropy)


@pytest.mark.parametrize("preset", ["mesa8", "mesa4", "mesa8-recompute", "lossless"])
def test_other_presets_are_accepted(record, preset):
    model = mesa_train.wrap(network(), preset)
    record(model)
    mesa_train.capture_step(model, F.cross_entropy)


def test_a_frozen_model(record):
    model = network().requires_grad_(False)
    record(model)
    refused("no parameter of the model needs a gradient", model)


def test_optimizers_in_a_graph(record):
    model = network()
    record(model)
    refused("optimizer_in_graph=True, but there is no optimizer", model, optimizer_in_graph=True)
    plain = torch.optim.AdamW(model.parameters(), fused=True)
    refused("AdamW is not capturable; make it with capturable=True", model, None, plain,
            optimizer_in_graph=True)  # fmt: skip
    able = torch.optim.AdamW(model.parameters(), capturable=True)
    scaler = torch.amp.GradScaler("cpu")
    refused("a GradScaler decides in Python", model, None, able, scaler=scaler,
            optimizer_in_graph=True)  # fmt: skip
    for made, options, expected in (
        (plain, {}, False),
        (able, {}, True),
        (able, {"scaler": scaler}, False),
        (able, {"scaler": torch.amp.GradScaler("cpu", enabled=False)}, True),
        (able, {"optimizer_in_graph": False}, False),
    ):
        step = mesa_train.capture_step(model, None, made, **options)
        assert step._update.in_graph is expected


class FakeGroup:
    """A process group by its backend's name."""

    def __init__(self, name):
        self.name = name


def parallel(monkeypatch, backend="nccl", unused=False):
    """A DDP module that has not met the other processes."""
    model = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(model)
    model.module = network()
    model.find_unused_parameters, model.process_group = unused, FakeGroup(backend)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda group: group.name)
    return model


def test_parallel_models(record, monkeypatch):
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    model = parallel(monkeypatch)
    record(model)
    assert mesa_train.capture_step(model)._warmup == 11
    assert mesa_train.capture_step(model, warmup=20)._warmup == 20
    refused("DDP is captured with accumulate=1 only", model, accumulate=2)
    refused("find_unused_parameters=True", parallel(monkeypatch, unused=True))
    refused("DDP runs over gloo", parallel(monkeypatch, "gloo"))
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING")
    refused("TORCH_NCCL_ASYNC_ERROR_HANDLING=0 before the process group", model)
    refused("DataParallel copies the model", nn.DataParallel(network()))
    sharded = network()
    sharded[0].weight._local_tensor = torch.zeros(1)  # a DTensor has this attribute
    refused(r"sharded \(FSDP, ZeRO-3, DTensor\)", sharded)


BATCHES = {
    "none": ((), {}, "a step needs a batch"),
    "a list": (([torch.ones(2, 6)],), {}, "argument 0 of the batch is a list"),
    "a number": ((torch.ones(2, 6), 3), {}, "argument 1 of the batch is a int"),
    "by name": ((), {"x": None}, "x= of the batch is a NoneType"),
    "trained": ((torch.ones(2, 6, requires_grad=True),), {}, "argument 0 .* needs a gradient"),
    "sparse": ((torch.ones(2, 6).to_sparse(),), {}, "argument 0 .* sparse or nested"),
}


@pytest.mark.parametrize("given", BATCHES)
def test_batches(record, given):
    batch, named, match = BATCHES[given]
    model = network()
    recorder = record(model)
    step = mesa_train.capture_step(model)
    with pytest.raises(CaptureError, match=match):
        step(*batch, **named)
    assert recorder.log == []


def test_contexts_around_a_step(record):
    model = network()
    recorder = record(model)
    step = mesa_train.capture_step(model, F.cross_entropy)
    x, y = torch.randn(4, 6), torch.zeros(4, dtype=torch.long)
    with torch.no_grad(), pytest.raises(CaptureError, match=r"leave torch\.no_grad"):
        step(x, y)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(CaptureError, match=r"pass autocast=torch\.bfloat16 to capture_step"),
    ):
        step(x, y)
    assert recorder.log == []


def test_arguments(record):
    model = network()
    record(model)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(TypeError, match=r"takes an nn\.Module, got str"):
        mesa_train.capture_step("vit")
    with pytest.raises(TypeError, match="loss must be callable or None, got int"):
        mesa_train.capture_step(model, 3)
    for name in ("accumulate", "warmup", "max_graphs"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
            mesa_train.capture_step(model, None, optimizer, **{name: 0})
    with pytest.raises(ValueError, match=r"clip_norm must be above 0, got 0\.0"):
        mesa_train.capture_step(model, clip_norm=0.0)
    with pytest.raises(ValueError, match="clip_norm with a scaler needs the optimizer"):
        mesa_train.capture_step(model, clip_norm=1.0, scaler=torch.amp.GradScaler("cpu"))
    step = mesa_train.capture_step(model, lambda out, y: out, optimizer)
    with pytest.raises(TypeError, match=r"the loss must be a scalar tensor, got shape \(4, 4\)"):
        step(torch.randn(4, 6), torch.zeros(4, dtype=torch.long))
