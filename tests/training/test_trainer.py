"""The training loop: its schedule, its determinism, and runs that do not disturb each other."""

import copy
import dataclasses
import math
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mesa_train.training.trainer
from mesa_train.training.data.packaged import load
from mesa_train.training.trainer import TrainConfig, Trainer, fit

CONFIG = TrainConfig(epochs=2, batch_size=256, lr=1e-2, autocast=None)


class Net(nn.Module):
    """Small, with dropout, so that the global random stream matters."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 10)
        )

    def forward(self, images):
        return self.layers(images)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def trainer(config, data, seed=0):
    torch.manual_seed(seed)
    return Trainer(Net(), config, data.steps_per_epoch(config.batch_size))


def outcomes(results):
    """What must repeat: everything but times."""
    return [dataclasses.replace(result, step_ms=0.0) for result in results]


def test_rate_rises_to_its_peak_and_falls_to_a_hundredth(digits):
    config = dataclasses.replace(CONFIG, epochs=4, warmup=0.25)
    run = trainer(config, digits)
    steps = 4 * digits.steps_per_epoch(config.batch_size)
    images = digits.normalise(digits.train.images[:256].float() / 255)
    rates = [run.lr]
    for _ in range(steps):
        run.step(images, digits.train.labels[:256])
        rates.append(run.lr)
    peak = steps // 4
    assert rates[0] == pytest.approx(config.lr / 100)
    assert max(rates) == pytest.approx(rates[peak])
    # timm counts the cosine from step 0, so that after the warm-up it is a little below the peak.
    assert rates[peak] == pytest.approx(config.lr * (1 + math.cos(math.pi / 4)) / 2, rel=0.01)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(config.lr / 100)


def test_a_step_by_hand(digits):
    """Smoothed labels, clipped gradients, AdamW without decay of biases: one step, written out."""
    config = dataclasses.replace(CONFIG, label_smoothing=0.3, clip_norm=0.2)
    run = trainer(config, digits)
    images = digits.normalise(digits.train.images[:64].float() / 255)
    labels = digits.train.labels[:64]
    model = copy.deepcopy(run.model)
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": biases, "weight_decay": 0.0}, {"params": weights, "weight_decay": 0.05}],
        lr=run.lr,
    )
    torch.manual_seed(0)  # seed * 1_000_003 + step, of which both are 0
    loss = F.cross_entropy(model(images), labels, label_smoothing=0.3)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.2)
    assert norm > 0.2
    optimizer.step()
    assert run.step(images, labels) == loss.item()
    for own, expected in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(own, expected)


def test_a_run_repeats_and_learns(digits):
    first = outcomes(fit({"a": trainer(CONFIG, digits)}, digits, CONFIG))
    torch.manual_seed(99)
    again = outcomes(fit({"a": trainer(CONFIG, digits)}, digits, CONFIG))
    assert first == again
    assert [result.epoch for result in first] == [1, 2]
    assert first[1].train_loss < first[0].train_loss
    assert first[1].val_accuracy > 0.5


def test_side_by_side_equals_alone(digits):
    alone = outcomes(fit({"a": trainer(CONFIG, digits)}, digits, CONFIG))
    together = {"a": trainer(CONFIG, digits), "b": trainer(CONFIG, digits, seed=1)}
    results = outcomes(fit(together, digits, CONFIG))
    assert [result for result in results if result.name == "a"] == alone
    assert [result for result in results if result.name == "b"] != alone


def test_another_seed_is_another_run(digits):
    other = dataclasses.replace(CONFIG, seed=1)
    first = outcomes(fit({"a": trainer(CONFIG, digits)}, digits, CONFIG))
    second = outcomes(fit({"a": trainer(other, digits)}, digits, other))
    assert first[0].train_loss != second[0].train_loss


def test_turns_alternate(digits):
    config = dataclasses.replace(CONFIG, epochs=1)
    events = []
    runs = {name: trainer(config, digits) for name in "ab"}
    list(fit(runs, digits, config, watch=events.append))
    assert "".join(event.name for event in events) == "baabbaabba"
    assert [event.step for event in events if event.name == "a"] == [1, 2, 3, 4, 5]


def test_an_epochs_row_has_its_median_step_its_mean_loss_and_its_last_rate(digits, monkeypatch):
    """Against a clock that is set by hand: five steps of 1, 7, 2, 9 and 4 s."""
    config = dataclasses.replace(CONFIG, epochs=1)
    ticks = iter([tick for seconds in (1, 7, 2, 9, 4) for tick in (50.0, 50.0 + seconds)])
    clock = types.SimpleNamespace(perf_counter=lambda: next(ticks))
    monkeypatch.setattr(mesa_train.training.trainer, "time", clock)
    run, events = trainer(config, digits), []
    (row,) = fit({"a": run}, digits, config, watch=events.append)
    assert [event.time_ms for event in events] == [1e3, 7e3, 2e3, 9e3, 4e3]
    assert row.step_ms == 4e3
    assert row.train_loss == pytest.approx(sum(event.loss for event in events) / 5)
    assert row.lr == run.lr
    assert (row.name, row.epoch) == ("a", 1)


def test_label_smoothing_is_for_training_only(digits):
    run = trainer(CONFIG, digits)
    run.model.eval()
    images = digits.normalise(digits.held_out.images.float() / 255)
    loss = run.loss(images, digits.held_out.labels).item()
    val_loss, _ = run.evaluate(digits)
    assert val_loss == pytest.approx(loss, rel=1e-5)
    smoothed = run.loss(images, digits.held_out.labels, label_smoothing=0.5).item()
    assert smoothed != pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0), ("batch_size", 0), ("lr", -1.0), ("clip_norm", 0.0),
        ("warmup", 1.0), ("warmup", -0.1), ("label_smoothing", 1.0),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"^{field} must .*, got {value}$"):
        TrainConfig(**{field: value})


def test_settings_at_their_bounds_are_taken():
    config = TrainConfig(warmup=0.0, label_smoothing=0.0, epochs=1, batch_size=1)
    assert (config.warmup, config.label_smoothing) == (0.0, 0.0)
