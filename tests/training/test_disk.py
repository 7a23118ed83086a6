"""Files that cannot be written or read are one line with the path and the last good checkpoint."""

import contextlib
import json
import resource
import shutil

import pytest
import torch
from torch import nn

from mesa_train.training import checkpoints, disk
from mesa_train.training.checkpoints import CheckpointError
from mesa_train.training.vit22b import checkpoint as sharded_checkpoint
from mesa_train.utils import records


@contextlib.contextmanager
def no_file_above(size):
    """Writing a file beyond `size` bytes fails, as on a full disk, for this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def trained():
    """A model of 1 MiB with its moments."""
    model = nn.Linear(512, 512)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 512)).sum().backward()
    optimizer.step()
    return model, optimizer


def in_one_line(error, *parts):
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


def test_torch_save_on_a_full_disk(tmp_path):
    _, optimizer = trained()
    partial, final = tmp_path / ".partial-step-2", tmp_path / "step-00000002"
    (tmp_path / "step-00000001").mkdir()

    def write():
        partial.mkdir()
        torch.save(optimizer.state_dict(), partial / "optimizer.bin")

    with no_file_above(300_000), pytest.raises(CheckpointError) as error:
        disk.together(write, final, partial, lambda texts: texts)
    in_one_line(
        error, f"{final} could not be written (torch.save could not write all of it; ",
        f"left on the disk); the last good checkpoint is {tmp_path}/step-00000001",
    )  # fmt: skip
    assert not partial.exists()


def test_all_ranks_raise_what_one_of_them_could_not(tmp_path):
    with pytest.raises(CheckpointError, match=r"x could not be written \(No space; no ch"):
        disk.together(
            lambda: None, tmp_path / "step-1", tmp_path / "p",
            lambda own: [*own, "x could not be written (No space", ""],
        )  # fmt: skip


def test_safetensors_on_a_full_disk_leave_the_old_file(tmp_path):
    path = tmp_path / "best.safetensors"
    checkpoints.save_weights(path, {"w": torch.ones(3)}, {})
    with no_file_above(100_000), pytest.raises(CheckpointError) as error:
        checkpoints.save_weights(path, trained()[0].state_dict(), {})
    in_one_line(error, f"{path} could not be written", "File too large")
    assert [p.name for p in tmp_path.iterdir()] == ["best.safetensors"]
    from safetensors.torch import load_file

    assert load_file(path)["w"].tolist() == [1, 1, 1]


def test_sharded_checkpoints_on_a_full_disk(tmp_path):
    model, optimizer = trained()
    first = sharded_checkpoint.save(tmp_path, model, optimizer, {"step": 1})
    with no_file_above(300_000), pytest.raises(CheckpointError) as error:
        sharded_checkpoint.save(tmp_path, model, optimizer, {"step": 2})
    in_one_line(error, "step-00000002 could not be written", f"last good checkpoint is {first}")
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert sharded_checkpoint.load(first, model, optimizer)["step"] == 1


def test_consolidated_weights_on_a_full_disk_leave_the_old_ones(tmp_path):
    model, _ = trained()
    sharded_checkpoint.export(tmp_path / "weights", model)
    with no_file_above(300_000), pytest.raises(CheckpointError) as error:
        sharded_checkpoint.export(tmp_path / "weights", model)
    in_one_line(error, "weights/model-00001-of-00001.safetensors could not be written")
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]
    sharded_checkpoint.load_export(tmp_path / "weights", nn.Linear(512, 512))


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_in_the_folders_place(tmp_path, place):
    (tmp_path / "file").write_text("")
    model, optimizer = trained()
    with pytest.raises(CheckpointError) as error:
        sharded_checkpoint.save(tmp_path / place, model, optimizer, {"step": 1})
    in_one_line(
        error, "step-00000001 could not be written (Not a directory", "no checkpoint is ther"
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: (c / "state.json").write_text("{"), "state.json cannot be read, it is damaged"),
        (
            lambda c: (c / "state.json").write_text("[1]"),
            "state.json cannot be read, it is damaged",
        ),
        (lambda c: (c / "state.json").unlink(), "is no complete checkpoint: it has no state.json"),
        (lambda c: (c / ".metadata").write_bytes(b"junk"), ".metadata cannot be read"),
        (lambda c: (c / "__0_0.distcp").write_bytes(b"junk"), "step-00000001 cannot be read"),
        (lambda c: (c / "__0_0.distcp").unlink(), "step-00000001 cannot be read"),
    ],
)
def test_damaged_sharded_checkpoints(tmp_path, damage, message):
    model, optimizer = trained()
    checkpoint = sharded_checkpoint.save(tmp_path, model, optimizer, {"step": 1})
    damage(checkpoint)
    with pytest.raises(CheckpointError) as error:
        sharded_checkpoint.load(checkpoint, model, optimizer)
    in_one_line(error, message, str(checkpoint))


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_damaged_index_of_weights(tmp_path, text):
    model, _ = trained()
    sharded_checkpoint.export(tmp_path / "w", model)
    (tmp_path / "w" / sharded_checkpoint.INDEX).write_text(text)
    with pytest.raises(CheckpointError) as error:
        sharded_checkpoint.load_export(tmp_path / "w", model)
    in_one_line(error, f"{sharded_checkpoint.INDEX} cannot be read, it is damaged")


def test_rows_on_a_full_disk_name_their_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    records.append(path, {"step": 1})
    with no_file_above(1000), pytest.raises(OSError, match=r"File too large: '.*/rows\.jsonl'"):
        records.append(path, {"step": 2, "text": "x" * 2000})
    # The row that was cut short goes with the next one.
    records.append(path, {"step": 3})
    assert records.read(path) == [{"step": 1}, {"step": 3}]


@pytest.mark.parametrize("text", ["[", "3", "null"])
def test_a_state_file_that_is_none(tmp_path, text):
    place = checkpoints.partial(tmp_path, 1)
    checkpoints.clear(place)
    final = checkpoints.commit(place, {}, 1)
    (final / "state.json").write_text(text)
    files = {
        "state.json": {"bytes": len(text), "sha256": checkpoints._digest(final / "state.json")}
    }
    (final / "manifest.json").write_text(json.dumps(files))
    with pytest.raises(CheckpointError, match=r"state\.json (cannot be read|is damaged)"):
        checkpoints.verify(final)


def test_removing_what_is_not_there(tmp_path, caplog):
    disk.remove(tmp_path / "nothing")
    (tmp_path / "link").symlink_to(tmp_path)
    disk.remove(tmp_path / "link")
    assert tmp_path.is_dir()
    assert not caplog.text
    shutil.rmtree(tmp_path)


def test_rows_after_a_resume(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    disk.forget_after(metrics, 3)  # a checkpoint before the first row leaves no file
    assert not metrics.exists()
    records.append(metrics, {"step": 3}, {"step": 4})
    disk.forget_after(metrics, 3)
    assert [row["step"] for row in records.read(metrics)] == [3]
    disk.forget_after(metrics, 2)
    assert records.read(metrics) == []
