"""The loop that the recipes share: the order of its events, its means, its clock, and where it continues."""

import pytest
import torch

from mesa_train.training import loop
from mesa_train.training.loop import Cadence, TrainingRun, speed, train, train_epoch


class Clock:
    """A clock that is set by hand, in seconds."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(loop, "time", made)
    return made


class Counting(TrainingRun):
    """Step n has the loss n; a batch takes 2 s, the rest of a step 3 s, a checkpoint 50 s."""

    def __init__(self, clock, done=0, **cadence):
        self.cadence = Cadence(**cadence)
        self.clock, self.events, self.count = clock, [], done

    @property
    def done(self):
        return self.count

    @property
    def lr(self):
        return self.count / 10

    def batches(self):
        self.events.append(f"batches from {self.done} of epoch {self.epoch}")
        while True:
            self.clock.now += 2
            yield self.done + 1

    def step(self, batches):
        number = next(batches)
        self.clock.now += 3
        self.count += 1
        assert number == self.count
        return torch.tensor(float(number)), float(10 * number)

    def accept(self, result):
        self.events.append(f"accept {result.step}")

    def save(self):
        self.events.append(f"save {self.done}")
        self.clock.now += 50


def events_of(run, **options):
    def report(result):
        run.events.append(f"report {result.step}")

    def end(epoch, step_ms):
        run.events.append(f"end {epoch}")

    train(run, report, end_of_epoch=end, **options)
    return run.events


def test_order_of_events(clock):
    """Checkpoints come after their report, and none at the end of an epoch, which its callback saves."""
    run = Counting(clock, steps=8, epoch=4, log_every=3, save_every=2)
    assert events_of(run) == [
        "batches from 0 of epoch 0",
        *("accept 2", "report 2", "save 2"),
        *("accept 3", "report 3"),
        *("accept 4", "report 4", "end 1"),
        "batches from 4 of epoch 1",
        *("accept 6", "report 6", "save 6"),
        *("accept 8", "report 8", "end 2"),
    ]


def test_a_run_continues_in_the_middle_of_an_epoch(clock):
    run = Counting(clock, done=5, steps=8, epoch=4, log_every=10)
    assert events_of(run) == ["batches from 5 of epoch 1", "accept 8", "report 8", "end 2"]
    assert events_of(run)[4:] == []


def test_a_run_may_end_within_an_epoch(clock):
    run = Counting(clock, steps=6, epoch=4, log_every=10)
    assert events_of(run)[-3:] == ["accept 6", "report 6", "end 2"]


def test_one_epoch_alone(clock):
    run, results = Counting(clock, steps=8, epoch=4), []
    train_epoch(run, results.append)
    assert [result.step for result in results] == [1, 2, 3, 4]


def test_means_and_times_since_the_last_report(clock):
    run = Counting(clock, steps=5, epoch=5, log_every=2)
    results, epochs = [], []
    train(run, results.append, end_of_epoch=lambda *given: epochs.append(given))
    assert [(r.step, r.loss, r.grad_norm, r.lr, r.steps) for r in results] == [
        (2, 1.5, 15.0, 0.2, 2),
        (4, 3.5, 35.0, 0.4, 2),
        (5, 5.0, 50.0, 0.5, 1),
    ]
    assert [(r.step_ms, r.wait_ms) for r in results] == [(5e3, 2e3)] * 3
    assert epochs == [(1, 5e3)]


def test_checkpoints_and_reports_count_for_the_epoch_and_not_for_steps(clock):
    run = Counting(clock, steps=8, epoch=4, save_every=2)
    results, epochs = [], []

    def report(result):
        results.append(result)
        clock.now += 7

    train(run, report, end_of_epoch=lambda *given: epochs.append(given))
    assert [result.step_ms for result in results] == [5e3] * 8
    each = (4 * 5 + 4 * 7 + 50) / 4 * 1e3
    assert epochs == [(1, each), (2, each)]


def test_ticks_count_from_the_last_report(clock):
    run, ticks = Counting(clock, steps=5, epoch=5, log_every=2), []
    train(run, lambda result: None, tick=ticks.append)
    assert ticks == [1, 2, 1, 2, 1]


def test_the_loss_is_the_mean_over_processes(clock):
    run, results = Counting(clock, steps=4, epoch=4, log_every=2), []
    run.mean = lambda loss: loss / 2
    train(run, results.append)
    assert [result.loss for result in results] == [0.75, 1.75]


def test_a_run_that_diverged_is_neither_reported_nor_saved(clock):
    run, results = Counting(clock, steps=4, epoch=4, save_every=2), []

    def refuse(result):
        if result.step == 2:
            raise FloatingPointError

    run.accept = refuse
    with pytest.raises(FloatingPointError):
        train(run, results.append)
    assert [result.step for result in results] == [1]
    assert "save 2" not in run.events


def test_a_run_without_checkpoints_refuses_to_save(clock):
    class Unsaved(Counting):
        save = TrainingRun.save

    with pytest.raises(TypeError, match="Unsaved has no checkpoints; save_every must be 0"):
        train(Unsaved(clock, steps=4, epoch=4, save_every=2), lambda result: None)


def test_speed_of_a_step():
    assert speed(64, 500.0, torch.device("cpu")) == {"images_per_s": 128.0}
