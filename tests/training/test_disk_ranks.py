"""A write that fails on one rank: all ranks raise the same line, and none leaves the others in a wait."""

import errno
import importlib.util
import shutil
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from mesa_train.training import disk
from mesa_train.training.checkpoints import CheckpointError
from mesa_train.training.classification import accelerated
from mesa_train.training.config_schema import ConfigError
from mesa_train.training.data import sources
from mesa_train.training.mistakes import in_one_line, told_once
from mesa_train.training.vit22b import checkpoint as sharded_checkpoint
from mesa_train.training.vit22b import zero3_checkpoint as sharded_zero

REPOSITORY = Path(__file__).resolve().parents[2]
FULL = OSError(errno.ENOSPC, "No space left on device")


class Writer:
    """DeepSpeed's writer of files; `fails` names the method that does."""

    def __init__(self, fails):
        self.fails = fails

    def makedirs(self, path, exist_ok=False):
        self.done("makedirs")

    def save(self, state, path):
        self.done("save")

    def commit(self, info):
        self.done("commit")

    def done(self, name):
        if name == self.fails:
            raise FULL


class Engine(nn.Module):
    """DeepSpeed's engine: writes with waits for all ranks in between."""

    def __init__(self, fails):
        super().__init__()
        self.checkpoint_engine, self.fails, self.waits = Writer(fails), fails, []

    def save_checkpoint(self, folder):
        self.checkpoint_engine.makedirs(folder)
        self.waits.append("folder")
        self.checkpoint_engine.save({}, folder)
        self._copy_recovery_script(folder)
        self.checkpoint_engine.commit(None)
        if self.fails == "latest":
            raise FULL
        self.waits.append("last")

    def _copy_recovery_script(self, folder):
        if self.fails == "script":
            raise FULL


@pytest.mark.parametrize("fails", ["makedirs", "save", "commit", "script", "latest", None])
def test_a_rank_that_cannot_write_takes_part_in_all_waits(fails, monkeypatch):
    engine = Engine(fails)
    before = set(vars(engine)), set(vars(engine.checkpoint_engine))
    monkeypatch.setattr("torch.distributed.barrier", lambda: engine.waits.append("last"))
    if fails is None:
        with disk.to_the_end(engine):
            engine.save_checkpoint("folder")
    else:
        with pytest.raises(OSError, match="No space"), disk.to_the_end(engine):
            engine.save_checkpoint("folder")
    assert engine.waits == ["folder", "last"]
    assert (set(vars(engine)), set(vars(engine.checkpoint_engine))) == before


def test_torch_save_fails_after_what_follows_it(tmp_path):
    save, followed = torch.save, []

    def write():
        with disk.to_the_end():
            torch.save({}, tmp_path / "no/such/file")
            followed.append("the optimizer's shards are gathered")

    with pytest.raises(RuntimeError, match="no/such"):
        write()
    assert followed
    assert torch.save is save


def test_an_interrupt_is_no_failure_to_write():
    def interrupted(*args):
        raise KeyboardInterrupt

    engine = Engine(None)
    engine.checkpoint_engine.save = interrupted
    with pytest.raises(KeyboardInterrupt), disk.to_the_end(engine):
        engine.save_checkpoint("folder")
    assert engine.checkpoint_engine.save is interrupted
    assert engine.waits == ["folder"]


def test_other_files_name_the_folder_of_checkpoints(tmp_path):
    (tmp_path / "checkpoints/step-00000001").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"best could .*checkpoint is .*/step-00000001$"):
        disk.together(
            lambda: (tmp_path / "no/best").write_text(""),
            tmp_path / "best",
            tmp_path / "partial",
            lambda texts: texts,
            tmp_path / "checkpoints",
        )


def test_consolidated_weights_that_another_rank_could_not_write(tmp_path, monkeypatch):
    (tmp_path / "step-00000003").mkdir()
    fault = f"{tmp_path}/weights could not be written (No space left on device)"
    monkeypatch.setattr(sharded_checkpoint, "gather", lambda own: [fault, *own])
    with pytest.raises(CheckpointError) as error:
        sharded_checkpoint.export(tmp_path / "weights", nn.Linear(2, 2))
    assert str(error.value) == f"{fault}; the last good checkpoint is {tmp_path}/step-00000003"
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def test_two_ranks_remove_a_folder_at_once(tmp_path, monkeypatch, caplog):
    folder, remove, turns = tmp_path / "partial", shutil.rmtree, []
    folder.mkdir()
    (folder / "left").write_text("")

    def beaten(path):
        turns.append(path)
        if len(turns) == 1:
            raise FileNotFoundError(errno.ENOENT, "another rank was first", "a file")
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", beaten)
    disk.remove(folder)
    assert not folder.exists()
    assert not caplog.text


def test_a_line_is_told_by_the_rank_that_knows_it(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert told_once(ConfigError("all ranks read the same file"), "litv2") == 1
    corrupt = sources.CorruptImage("a.png is no\nimage")
    assert told_once(corrupt, "mocov3") == "mocov3: a.png is no image"
    monkeypatch.setenv("RANK", "0")
    assert told_once(ConfigError("all\nranks"), "litv2") == "litv2: all ranks"


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_a_mistake_in_a_configuration_is_one_line_of_all_ranks(rank, lines, monkeypatch, capsys):
    path = REPOSITORY / "recipes/vit22b/train.py"
    specification = importlib.util.spec_from_file_location("vit22b_train", path)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    codes = []
    monkeypatch.setattr(script, "leave", codes.append)
    monkeypatch.setenv("RANK", rank)
    script.main(REPOSITORY / "recipes/vit22b/tiny.yaml", ["train.steps=0"])
    assert codes[0] == 2
    assert capsys.readouterr().err.count("error: ") == lines


def test_a_rank_whose_peer_has_ended_says_nothing():
    gone = RuntimeError("[pair.cc:561] Connection closed by peer [127.0.0.1]:3781. This is typ")
    assert disk.peer_ended(gone)
    assert not disk.peer_ended(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize("fails", [False, True])
def test_the_group_of_processes_outlives_a_failure(fails):
    ended = []
    accelerator = types.SimpleNamespace(
        log_with=["a tracker"],
        init_trackers=lambda name, config: None,
        end_training=lambda: ended.append("trackers and group"),
        trackers=[types.SimpleNamespace(finish=lambda: ended.append("tracker"))],
    )
    config = types.SimpleNamespace(to_dict=dict)
    run = types.SimpleNamespace(accelerator=accelerator, config=config)
    if fails:
        with (
            pytest.raises(OSError, match="No space"),
            accelerated.trackers(run.config, run.accelerator),
        ):
            raise FULL
    else:
        with accelerated.trackers(run.config, run.accelerator):
            pass
    assert ended == ["tracker" if fails else "trackers and group"]


class Shards:
    """DeepSpeed's engine and its optimizer: a load ends with a wait for all ranks, the epilogue."""

    def __init__(self, fails):
        self.optimizer, self.fails, self.order = self, fails, []

    def checkpoint_event_epilogue(self):
        self.order.append("all ranks gather")

    def load_checkpoint(self, folder, tag):
        if self.fails:
            raise RuntimeError("failed finding central directory\nat zip.cc")
        self.order.append("read")
        self.optimizer.checkpoint_event_epilogue()
        return folder, {}


@pytest.mark.parametrize("fails", [True, False])
def test_shards_that_one_rank_cannot_read(fails, monkeypatch):
    """Either rank of two, the one that fails and the other: both raise, and none gathers."""
    engine, theirs = Shards(fails), "c cannot be read, it is damaged"
    monkeypatch.setattr(sharded_zero, "gather", lambda own: own if fails else [*own, theirs])
    with pytest.raises(CheckpointError, match=r"^c cannot be read, it is damaged") as error:
        sharded_zero._load(engine, Path("c"), "zero")
    assert "\n" not in str(error.value)
    assert engine.order == ([] if fails else ["read"])


def test_shards_that_all_ranks_can_read(monkeypatch):
    engine = Shards(fails=False)
    monkeypatch.setattr(sharded_zero, "gather", lambda own: engine.order.append("told") or own)
    sharded_zero._load(engine, Path("c"), "zero")
    assert engine.order == ["read", "told", "all ranks gather"]
    assert "checkpoint_event_epilogue" not in vars(engine)


def test_nothing_to_read_is_a_mistake_of_the_folder(monkeypatch):
    engine = Shards(fails=False)
    monkeypatch.setattr(engine, "load_checkpoint", lambda folder, tag: (None, {}))
    monkeypatch.setattr(sharded_zero, "gather", lambda own: own)
    with pytest.raises(CheckpointError, match="c: DeepSpeed found nothing to read in it"):
        sharded_zero._load(engine, Path("c"), "zero")


def test_a_script_ends_with_one_line_or_with_none():
    with pytest.raises(SystemExit) as ended, in_one_line("mocov3"):
        raise ConfigError("a\nmistake")
    assert ended.value.code == "mocov3: a mistake"
    with pytest.raises(SystemExit) as ended, in_one_line("mocov3"):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:4711")
    assert ended.value.code == 1
    with pytest.raises(RuntimeError, match="shapes"), in_one_line("mocov3"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
