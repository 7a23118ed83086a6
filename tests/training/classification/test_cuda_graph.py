"""`train.cuda_graph`: the same run through captured steps, and one line where it cannot be."""

import pytest
import torch
from graph_recorder import capturable_on_cpu, record  # noqa: F401  fixtures
from test_run import SMALL, configured
from torch import nn

from mesa_train import CaptureError
from mesa_train.training.classification import dry_run as plan
from mesa_train.training.classification import fit as recipe
from mesa_train.training.classification import optimizers
from mesa_train.training.classification.config import OptimConfig
from mesa_train.training.config_schema import ConfigError
from mesa_train.training.mistakes import MISTAKES


def steps(run, count):
    batches = run.loader.training(0, 0)
    return [tuple(value.item() for value in run.step(batches)) for _ in range(count)]


@pytest.mark.usefixtures("capturable_on_cpu")
@pytest.mark.parametrize("mixup", [0.0, 0.8], ids=["labels", "mixup"])
def test_a_run_of_captured_steps(tmp_path, monkeypatch, record, mixup):  # noqa: F811
    """Two micro-batches a step, warm-up of the rate, clipping: as the same run without graphs."""
    changes = {"model": SMALL, "augment": {"mixup": mixup, "cutmix": 0}}
    monkeypatch.setattr(plan, "check_machine", lambda config: None)
    recorder = record(None)
    runs = []
    for graphs in (False, True):
        optim = {"warmup_epochs": 0.5, "clip": 0.5}
        train = {"policy": "mesa8", "cuda_graph": graphs}
        runs.append(recipe.prepare(configured(tmp_path, **changes, optim=optim, train=train)))
    plain, captured = runs
    start = nn.utils.parameters_to_vector(plain.bare.parameters()).clone()
    recorder.model, recorder.optimizer = captured.model, captured.optimizer.optimizer
    expected, found = steps(plain, 6), steps(captured, 6)
    # A rate in a graph is a float32 tensor, and Adam's corrections are computed with it.
    # After six steps the difference of the norm is up to 2e-4, depending on the processor.
    assert found == [pytest.approx(row, rel=1e-3) for row in expected]
    # Adam's steps are as long for a gradient of pure rounding, such as that of the bias of k.
    ends = [nn.utils.parameters_to_vector(r.bare.parameters()) for r in runs]
    assert (ends[1] - ends[0]).norm() < 0.01 * (ends[0] - start).norm()
    assert captured.captured.graphs == 1
    assert recorder.log.count("capture") == 2, "forward and backward, and the optimizer"


def test_what_it_needs(tmp_path, monkeypatch):
    config = configured(tmp_path, model=SMALL, train={"cuda_graph": True})
    with pytest.raises(ConfigError, match=r"train\.cuda_graph=true needs a GPU"):
        recipe.prepare(config)
    with pytest.raises(ConfigError, match=r"cuda_graph=true needs one process, got 4 processes"):
        plan.shared(config, 4)
    with pytest.raises(ConfigError, match=r"cannot capture train\.policy=paper"):
        configured(tmp_path, train={"cuda_graph": True, "policy": "paper"})
    with pytest.raises(ConfigError, match=r"cannot capture train\.policy=mesa8\+offload"):
        configured(tmp_path, train={"cuda_graph": True, "policy": "mesa8+offload"})
    monkeypatch.setattr(plan, "check_machine", lambda config: None)
    if not torch.cuda.is_available():
        with pytest.raises(
            ConfigError, match=r"train\.cuda_graph=true: capture_step: PyTorch sees"
        ):
            recipe.prepare(config)
    assert CaptureError in MISTAKES


def test_a_checkpoint_does_not_change_what_an_optimizer_can():
    """A run that continues with the other choice of cuda_graph."""
    for saved in (True, False):
        one, two = [
            optimizers.build(OptimConfig(), [{"params": [torch.zeros(2)], "lr": 1.0}], capturable)
            for capturable in (saved, not saved)
        ]
        state = one.state_dict()
        two.load_state_dict(state)
        assert [group["capturable"] for group in two.param_groups] == [not saved]
        assert state["param_groups"][0]["capturable"] is saved
