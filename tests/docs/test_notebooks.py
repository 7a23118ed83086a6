"""The notebooks: their cells run in order on a CPU, and stay as they were made."""

import contextlib
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "docs/notebooks").glob("*.ipynb"))


def cells(path, kind="code"):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_there_are_two_and_their_outputs_are_not_stored():
    assert [path.stem for path in NOTEBOOKS] == ["finetune_dinov2", "first_steps"]
    for path in NOTEBOOKS:
        stored = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert not any(cell.get("outputs") for cell in stored)
        assert len({cell["id"] for cell in stored}) == len(stored)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_installs_an_uploaded_wheel(path, tmp_path, monkeypatch):
    install, commands = cells(path)[0], []
    monkeypatch.chdir(tmp_path)
    exec(install, {})
    assert not commands
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append((command, check)))
    with pytest.raises(FileNotFoundError, match="mesa_train-"):
        exec(install, {})
    (tmp_path / "mesa_train-0.1.0-py3-none-any.whl").touch()
    exec(install, {})
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "./mesa_train-0.1.0-py3-none-any.whl[timm]",
    ]
    assert commands == [(pip, True)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "notebook"}
    printed = io.StringIO()
    for number, cell in enumerate(cells(path)):
        with contextlib.redirect_stdout(printed):
            exec(compile(cell, f"{path.name}, cell {number}", "exec"), names)
    text = printed.getvalue()
    if path.stem == "first_steps":
        plain, *others = names["losses"].values()
        assert plain[0] == others[0][0] == others[1][0]
        assert plain[-1] < plain[0]
        for losses in others:
            assert losses == pytest.approx(plain, rel=0.02)
        assert "gelu" in text or "activation" in text
    else:
        assert "held-out accuracy" in text
        assert (tmp_path / "tuned.pt").exists()
        assert "the nearest picture has the same class" in text
