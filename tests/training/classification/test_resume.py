"""A run's metrics: rows of steps that are done again are dropped, and those of a run without a checkpoint."""

import types

import pytest

from mesa_train.training import checkpoints, disk
from mesa_train.training.checkpoints import CheckpointError
from mesa_train.training.classification import fit as recipe
from mesa_train.training.classification.config import of_dict
from mesa_train.utils import records


@pytest.fixture
def run(tmp_path):
    """A run that trained for 7 steps; its checkpoint, if there is one, is of step 5."""
    rows = [{"kind": "step", "step": step} for step in range(1, 8)]
    records.append(tmp_path / "metrics.jsonl", *rows)
    made = types.SimpleNamespace(
        config=of_dict({"data": {"source": "digits"}, "train": {"out": str(tmp_path)}}),
        out=tmp_path,
        accelerator=types.SimpleNamespace(is_main_process=True),
        position=types.SimpleNamespace(step=0),
    )
    made.resume = lambda path, state: setattr(made.position, "step", state["step"])
    return made


def steps(run):
    return [row["step"] for row in records.read(run.out / "metrics.jsonl")]


@pytest.fixture
def checkpoint(run):
    written = checkpoints.partial(run.out / "checkpoints", 5)
    checkpoints.clear(written)
    return checkpoints.commit(written, {"step": 5}, 1)


def test_rows_after_the_checkpoint_are_dropped(run, checkpoint):
    assert recipe.resume(run, "auto")
    assert steps(run) == [1, 2, 3, 4, 5]


def test_rows_of_a_run_without_a_checkpoint_are_dropped(run):
    assert not recipe.resume(run, "auto")
    assert not (run.out / "metrics.jsonl").exists()


def test_a_run_without_rows_goes_on(run, checkpoint):
    (run.out / "metrics.jsonl").unlink()
    assert recipe.resume(run, "auto")
    assert [path.name for path in run.out.iterdir()] == ["checkpoints"]


def test_the_first_process_alone_drops_rows(run, checkpoint):
    run.accelerator.is_main_process = False
    assert recipe.resume(run, "auto")
    assert steps(run) == [1, 2, 3, 4, 5, 6, 7]


def test_a_folder_that_was_removed_is_not_made_again(run, tmp_path):
    """It may be a disk that is no longer mounted: the checkpoints would fill the one below."""
    run.out = tmp_path / "unmounted"
    run.last_good = lambda: "no checkpoint is there yet"
    removed = pytest.raises(CheckpointError, match="unmounted: the run's folder was removed; no ch")
    with removed, recipe._written(run):
        disk.append(run.out / "metrics.jsonl", {"kind": "step", "step": 8})
    assert not run.out.exists()
