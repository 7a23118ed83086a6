"""A checkpoint is whole or not there, and what is damaged is named and passed over."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from mesa_train.training import checkpoints
from mesa_train.training.checkpoints import CheckpointError


def written(folder, step, keep=2):
    place = checkpoints.partial(folder, step)
    checkpoints.clear(place)
    (place / "weights.bin").write_bytes(bytes(range(100)))
    return checkpoints.commit(place, {"step": step}, keep)


def test_the_newest_is_found_and_old_ones_go(tmp_path):
    for step in (1, 2, 10):
        final = written(tmp_path, step)
    assert [c.name for c in checkpoints.complete(tmp_path)] == ["step-00000002", "step-00000010"]
    assert (tmp_path / "last").resolve() == final.resolve()
    assert checkpoints.newest(tmp_path) == (final, {"step": 10})


def test_every_file_reaches_the_disk_before_the_checkpoint_gets_its_name(tmp_path, monkeypatch):
    """Else a loss of power may leave a checkpoint with its name and without its contents."""
    synced, named, rename = set(), [], Path.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))

    def renamed(path, target):
        named.append({p.name for p in path.iterdir() if p.stat().st_ino in synced})
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renamed)
    written(tmp_path, 1)
    assert named == [{"weights.bin", "state.json", "manifest.json"}]
    # The folder too, which holds the names.
    assert tmp_path.stat().st_ino in synced


def test_one_that_was_cut_short_is_not_used(tmp_path, caplog):
    first = written(tmp_path, 1)
    checkpoints.clear(checkpoints.partial(tmp_path, 2))
    assert checkpoints.newest(tmp_path) == (first, {"step": 1})
    assert "cut short" in caplog.text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.write_bytes(bytes(99)), "weights.bin is truncated: 99 bytes of 100"),
        (lambda f: f.write_bytes(bytes(101)), "weights.bin has changed: 101 bytes instead of 100"),
        (lambda f: f.write_bytes(bytes(100)), "weights.bin has changed since it was written"),
        (lambda f: f.unlink(), "weights.bin is missing"),
        (lambda f: (f.parent / "manifest.json").write_text("["), "is damaged"),
        (lambda f: (f.parent / "manifest.json").unlink(), "it has no manifest.json"),
    ],
)
def test_damage_is_named_and_the_one_before_taken(tmp_path, damage, message, caplog):
    first, second = written(tmp_path, 1), written(tmp_path, 2)
    damage(second / "weights.bin")
    with pytest.raises(CheckpointError, match=message):
        checkpoints.verify(second)
    assert checkpoints.newest(tmp_path) == (first, {"step": 1})
    assert "trying the one before" in caplog.text


def test_weights_go_there_and_back(tmp_path):
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    checkpoints.save_weights(tmp_path / "w.safetensors", model.state_dict(), {"top1": "0.5"})
    checkpoints.load_weights(other, tmp_path / "w.safetensors")
    assert torch.equal(other.weight, model.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_weights_of_another_model_or_no_weights(tmp_path):
    checkpoints.save_weights(tmp_path / "w.safetensors", nn.Linear(3, 2).state_dict(), {})
    with pytest.raises(
        CheckpointError,
        match=r"another model; of another shape: weight \(2, 3\) instead of \(2, 4\)$",
    ):
        checkpoints.load_weights(nn.Linear(4, 2), tmp_path / "w.safetensors")
    with pytest.raises(
        CheckpointError, match=r"missing: 0\.weight, 0\.bias; unexpected: bias, weight"
    ):
        checkpoints.load_weights(nn.Sequential(nn.Linear(3, 2)), tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(b"123")
    with pytest.raises(CheckpointError, match="truncated or no safetensors file"):
        checkpoints.load_weights(nn.Linear(3, 2), tmp_path / "w.safetensors")


def test_the_manifest_lists_everything(tmp_path):
    final = written(tmp_path, 3)
    files = json.loads((final / "manifest.json").read_text())
    assert sorted(files) == ["state.json", "weights.bin"]
